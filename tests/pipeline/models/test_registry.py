"""From names to modules. Sockets cannot connect in these tests, and an unexpected attempt fails the test."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import HostError, InputError, PipelineError
from maskplan.pipeline.data.preprocessing import IMAGENET
from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
from maskplan.pipeline.models.registry import Architecture, build_model, folder_name, model_identity

NET = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
"""


@pytest.fixture(autouse=True)
def attempts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """What was asked of the network; a test that expects something takes it off the list."""
    asked: list[str] = []

    def refuse(*address: object, **_: object) -> None:
        asked.append(str(address))
        raise OSError("no network in tests")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    for proxy in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    # Nothing that this machine holds already may stand in for a download.
    for cache in ("TORCH_HOME", "HF_HOME"):
        monkeypatch.setenv(cache, str(tmp_path / "cache"))
    yield asked
    assert asked == []


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], str]:
    """Write a model's file and return `file.py:build`."""

    def write(source: str) -> str:
        (tmp_path / "net.py").write_text(source)
        return f"{tmp_path / 'net.py'}:build"

    return write


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def outputs(made: Architecture) -> int:
    how = made.preprocessing
    with torch.no_grad():
        return int(made.module(torch.zeros(1, how.channels, how.height, how.width)).shape[1])


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "shufflenet_v2_x0_5"])
def test_a_torchvision_name_is_its_model_with_seeded_weights(name: str) -> None:
    made = build_model(name, seed=3)
    torch.manual_seed(3)
    assert same(made.module, torchvision.models.get_model(name, weights=None))
    assert not made.module.training
    assert made.name == name
    best = torchvision.models.get_model_weights(name).DEFAULT
    assert made.labels == tuple(best.meta["categories"])
    transforms, how = best.transforms(), made.preprocessing
    assert [how.height, how.width] == transforms.crop_size * 2
    assert [how.resize] == transforms.resize_size
    assert (how.interpolation, how.mean, how.std) == ("bilinear", tuple(transforms.mean), tuple(transforms.std))
    assert outputs(made) == 1000


def test_a_detection_model_is_refused_with_a_way_to_its_backbone() -> None:
    with pytest.raises(InputError, match="cannot be one graph") as caught:
        build_model("fasterrcnn_resnet50_fpn", seed=0)
    assert ".backbone" in str(caught.value.fix)


def test_models_of_other_tasks_are_not_known() -> None:
    for name in ("raft_small", "r3d_18", "quantized_resnet18", ""):
        with pytest.raises(InputError, match=r"unknown model") as caught:
            build_model(name, seed=0)
        assert repr(name) in caught.value.what
        assert caught.value.fix


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("resnt50", "resnet50"),
        ("ResNet50", "resnet50"),
        ("resnet-18", "resnet18"),
        ("digit_resnet", "digits_resnet"),
        ("timm/resnt50", "resnet50"),
        ("timm/efficientnet-b0", "efficientnet_b0"),
    ],
)
def test_the_error_for_a_misspelled_name_suggests_a_similar_one(asked: str, meant: str) -> None:
    with pytest.raises(InputError) as caught:
        build_model(asked, seed=0)
    assert "did you mean" in str(caught.value.fix)
    assert f"'{meant}'" in str(caught.value.fix)


def test_the_error_for_an_unknown_name_lists_the_kinds_of_names() -> None:
    with pytest.raises(InputError) as caught:
        build_model("qqqqqqqq", seed=0)
    assert all(kind in str(caught.value.fix) for kind in ("resnet50", "timm/NAME", "file.py:factory", "digits_resnet"))


def test_an_unknown_timm_tag_does_not_blame_the_network() -> None:
    with pytest.raises(PipelineError) as caught:
        build_model("timm/resnet10t.nope", seed=0)
    assert "nope" in str(caught.value)
    assert "network" not in str(caught.value.fix)


def test_a_timm_name_is_its_model_with_seeded_weights() -> None:
    made = build_model("timm/resnet10t", seed=3)
    torch.manual_seed(3)
    reference = timm.create_model("resnet10t", pretrained=False)
    assert same(made.module, reference)
    assert (made.name, made.module.training) == ("timm/resnet10t", False)


@pytest.mark.parametrize(
    "name",
    [
        "resnet10t",
        "efficientnet_lite0",
        "mobilenetv3_small_050",
        # The picture is squashed to a square, and not cropped.
        "convnextv2_nano.fcmae_ft_in22k_in1k_384",
    ],
)
def test_preprocessing_is_timms_own(name: str) -> None:
    how = build_model(f"timm/{name}", seed=0).preprocessing
    config = resolve_model_data_config(timm.create_model(name, pretrained=False))
    steps = {type(step).__name__: step for step in create_transform(**config, is_training=False).transforms}
    resize, normalize = steps["Resize"], steps["Normalize"]
    assert (how.channels, how.height, how.width) == config["input_size"]
    # A pair is a size to be squashed to; one number is that of the shorter side.
    squashed = not isinstance(resize.size, int)
    assert how.resize == (0 if squashed else resize.size)
    assert how.interpolation == resize.interpolation.value
    assert how.mean == pytest.approx(normalize.mean.tolist())
    assert how.std == pytest.approx(normalize.std.tolist())


def test_the_bundled_model_comes_with_its_preprocessing_and_labels() -> None:
    made = build_model("digits_resnet", seed=0)
    assert (made.name, made.labels) == ("digits_resnet", tuple("0123456789"))
    assert (made.preprocessing.channels, made.preprocessing.height, made.preprocessing.resize) == (1, 8, 0)
    assert outputs(made) == 10


@pytest.mark.parametrize("spec", ["digits_resnet", "squeezenet1_1", "timm/resnet10t", "own"])
def test_random_weights_are_repeatable_and_differ_by_seed(spec: str, file: Callable[[str], str]) -> None:
    spec = file(NET) if spec == "own" else spec
    first = build_model(spec, seed=1).module
    torch.rand(17)
    assert same(first, build_model(spec, seed=1).module)
    assert not same(first, build_model(spec, seed=2).module)


@pytest.mark.parametrize("spec", ["digits_resnet", "resnet18", "squeezenet1_1", "timm/resnet10t"])
def test_classes_set_the_number_of_outputs(spec: str) -> None:
    made = build_model(spec, seed=0, classes=7)
    assert outputs(made) == 7
    assert len(made.labels) in (0, 10)


def test_classes_are_refused_for_a_model_in_a_file(file: Callable[[str], str]) -> None:
    with pytest.raises(InputError, match="classes"):
        open_checkpoint(ModelOptions(file(NET), "random", classes=7))


def test_labels_are_not_kept_for_other_classes() -> None:
    assert len(build_model("squeezenet1_1", seed=0, classes=1000).labels) == 1000
    assert build_model("squeezenet1_1", seed=0, classes=999).labels == ()


def test_a_users_file_sets_its_preprocessing_and_labels(file: Callable[[str], str]) -> None:
    own = "PREPROCESSING = {'height': 32, 'width': 48, 'resize': 0, 'std': [0.5, 0.25, 1.0]}\nLABELS = ['cat', 'dog']\n"
    made = build_model(file(NET + own), seed=0)
    wanted = replace(IMAGENET, height=32, width=48, resize=0, std=(0.5, 0.25, 1.0))
    assert (made.preprocessing, made.labels, made.name) == (wanted, ("cat", "dog"), "net_build")
    assert outputs(made) == 2
    plain = build_model(file(NET), seed=0)
    assert (plain.preprocessing, plain.labels, plain.module.training) == (IMAGENET, (), False)
    gray = "PREPROCESSING = {'channels': 1, 'mean': [0.5], 'std': (0.5,), 'interpolation': 'nearest'}\n"
    wanted = Preprocessing(1, 224, 224, 256, "nearest", (0.5,), (0.5,))
    assert build_model(file(NET + gray), seed=0).preprocessing == wanted


def test_a_users_file_may_contain_data_classes_and_warnings(file: Callable[[str], str], tmp_path: Path) -> None:
    # A data class under postponed annotations looks for its own module while it is made.
    source = "from __future__ import annotations\nfrom dataclasses import dataclass\n" + NET
    source += "\n@dataclass\nclass Options:\n    width: int = 4\n"
    assert outputs(build_model(file(source), seed=0)) == 2
    # Warnings of the user's own code are no concern of ours.
    assert outputs(build_model(file("import warnings\nwarnings.warn('old')\n" + NET), seed=0)) == 2


BROKEN = {
    "syntax": ("def (", "SyntaxError"),
    "import": ("import nothing_of_this_name", "ModuleNotFoundError"),
    "raises": ("def build():\n    raise KeyError('width')", "KeyError: 'width'"),
    "ends": ("import sys\nsys.exit('no accelerator')", "no accelerator"),
    "ends well": ("def build():\n    raise SystemExit(0)", "SystemExit"),
    "arguments": ("def build(width):\n    pass", "width"),
    "missing": ("def other():\n    pass", "defines other"),
    "empty": ("", "defines no functions"),
    "not callable": ("build = 3", "'build'"),
    "nothing": ("def build():\n    pass", "NoneType"),
    "a class": ("from torch import nn\ndef build():\n    return nn.Linear", "type"),
    "keys": (NET + "PREPROCESSING = {'hight': 3}", "hight"),
    "channels": (NET + "PREPROCESSING = {'channels': 4}", "1 or 3 channels"),
    "mean": (NET + "PREPROCESSING = {'mean': [0.5]}", "mean"),
    "interpolation": (NET + "PREPROCESSING = {'interpolation': 'cubic'}", "bicubic"),
    "no table": (NET + "PREPROCESSING = 5", "PREPROCESSING"),
    "none": (NET + "PREPROCESSING = None", "PREPROCESSING"),
    "one number": (NET + "PREPROCESSING = {'mean': 0.5, 'std': 0.5}", "PREPROCESSING"),
    "zero std": (NET + "PREPROCESSING = {'std': [0.2, 0.0, 0.2]}", "std"),
    "negative": (NET + "PREPROCESSING = {'height': -4}", "-4"),
    "negative resize": (NET + "PREPROCESSING = {'resize': -1}", "resize"),
    "text": (NET + "PREPROCESSING = {'width': '16'}", "16"),
    "mean of text": (NET + "PREPROCESSING = {'mean': ['a', 'b', 'c']}", "mean"),
    "nan": (NET + "PREPROCESSING = {'mean': [float('nan')] * 3}", "mean"),
    "labels": (NET + "LABELS = 5", "LABELS"),
    "labels of numbers": (NET + "LABELS = [0, 1]", "LABELS"),
    "labels of another count": (NET + "LABELS = ['a', 'b', 'c']", "LABELS"),
    "one word": (NET + "LABELS = 'ab'", "LABELS"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_cannot_be_used_is_refused_in_one_message(kind: str, file: Callable[[str], str]) -> None:
    source, says = BROKEN[kind]
    spec = file(source)
    try:
        open_checkpoint(ModelOptions(spec, "random"))
    except InputError as error:
        message = str(error)
    except BaseException as error:  # SystemExit too: it would end the command as if all were well
        pytest.fail(f"{type(error).__name__}: {error}")
    else:
        pytest.fail("it was taken")
    assert says in message
    assert "net.py" in message or "PREPROCESSING" in message


def test_a_binary_or_missing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_bytes(b"\xff\x00\xfe")
    (tmp_path / "folder.py").mkdir()
    for name in ("net.py", "folder.py", "none.py"):
        with pytest.raises(InputError) as caught:
            build_model(f"{tmp_path / name}:build", seed=0)
        assert name in str(caught.value)
    with pytest.raises(InputError, match="no factory named") as caught:
        build_model(str(tmp_path / "net.py"), seed=0)
    assert f"{tmp_path / 'net.py'}:" in str(caught.value.fix)


def test_names_of_models_become_names_of_folders() -> None:
    names = {"resnet50": "resnet50", "timm/resnet50.a1_in1k": "timm_resnet50.a1_in1k", "a/b.py:net": "b_net"}
    assert {spec: folder_name(spec) for spec in names} == names


def test_a_models_digest_is_that_of_its_code(file: Callable[[str], str], tmp_path: Path) -> None:
    spec = file(NET)
    name, digest = model_identity(spec)
    assert name == "net_build"
    assert digest == hashlib.sha256(f"{hashlib.sha256(NET.encode()).hexdigest()}:build".encode()).hexdigest()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/net.py").write_text(NET)
    assert model_identity(f"{tmp_path}/elsewhere/net.py:build") == (name, digest)
    assert model_identity(spec.replace(":build", ":nn"))[1] != digest
    assert model_identity(file(NET + "\n# more"))[1] != digest
    assert model_identity("resnet50")[1] != model_identity("resnet18")[1]


def test_the_error_for_a_failed_download_names_the_address(attempts: list[str]) -> None:
    with pytest.raises(HostError) as caught:
        build_model("squeezenet1_1", seed=0, pretrained=True)
    assert "https://download.pytorch.org/models/squeezenet1_1" in str(caught.value)
    assert "--weights FILE" in str(caught.value.fix)
    assert len(attempts) == 1
    attempts.clear()


def test_a_model_without_pretrained_weights_uses_no_network(file: Callable[[str], str]) -> None:
    for spec in (file(NET), "digits_resnet"):
        with pytest.raises(HostError) as caught:
            build_model(spec, seed=0, pretrained=True)
        assert "--weights FILE" in str(caught.value.fix)


def test_the_default_socket_timeout_is_restored(attempts: list[str]) -> None:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(11.5)
    try:
        with pytest.raises(HostError):
            build_model("squeezenet1_1", seed=0, pretrained=True)
        assert socket.getdefaulttimeout() == 11.5
    finally:
        socket.setdefaulttimeout(before)
    attempts.clear()


def test_the_list_of_broken_files_starts_from_one_that_works(file: Callable[[str], str]) -> None:
    made: Any = build_model(file(NET), seed=0)
    assert sum(NET in source for source, _ in BROKEN.values()) >= 14
    assert outputs(made) == 2
