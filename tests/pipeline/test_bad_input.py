"""Bad input through the command line: exit 3, one message that says what and where, and nothing left behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image

WIDE = (12, 8, 3, 3)

QUICK = """
[learn]
epochs = 1
[time]
seconds = 0.1
batches = [1]
[compare]
fixed_images = 2
"""

OTHER_MODELS = """
import torch
from torch import nn

PREPROCESSING = {"height": 16, "width": 16, "resize": 0, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.wide, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 3)

    def forward(self, x):
        x = self.wide(self.stem(x))
        if x.mean() > 0:
            x = x * 2
        return self.head(x.mean((2, 3)))


class OnlyDepthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.deep(self.stem(x)).mean((2, 3)))


class NotAClassifier(OnlyDepthwise):
    def forward(self, x):
        return self.deep(self.stem(x))


class AnotherInput(OnlyDepthwise):
    def forward(self, x):
        return super().forward(x[:, :2])


def branching():
    return Branching()


def only_depthwise():
    return OnlyDepthwise()


def not_a_classifier():
    return NotAClassifier()


def another_input():
    return AnotherInput()


def fails():
    raise RuntimeError("no weights today")


def a_list():
    return [1, 2]
"""


class Ran(Protocol):
    code: int
    out: str
    err: str


Refused = Callable[..., str]


def everything_below(folder: Path) -> dict[str, bytes | None]:
    """Every file with its bytes and every folder; without Python's own cache, and whatever process a lock names."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() and p.name != "lock" else None
        for p in sorted(folder.rglob("*"))
        if "__pycache__" not in p.parts
    }


@pytest.fixture
def refused(cli: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Run a command that must be refused, from within `tmp_path`; return the one message."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> str:
        before = everything_below(tmp_path)
        ran = cli(*args)
        assert ran.code == 3, ran
        assert ran.out == ""
        assert "Traceback" not in ran.err
        assert sum(line.startswith("error:") for line in ran.err.splitlines()) == 1, ran.err
        message = ran.err[ran.err.index("error:") :]
        assert len(message) < 1500, "a message is for reading"
        assert everything_below(tmp_path) == before
        return message

    return run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output folder that does not exist, two levels below one that does."""
    return tmp_path / "made" / "by" / "run"


@pytest.fixture
def state(tiny_spec: str) -> dict[str, torch.Tensor]:
    """A state dict of the tiny model."""
    namespace: dict[str, Any] = {}
    exec(Path(tiny_spec.rpartition(":")[0]).read_text(), namespace)
    torch.manual_seed(1)
    return dict(namespace["build"]().state_dict())


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """A file of models that cannot go through the line."""
    file = tmp_path / "others.py"
    file.write_text(OTHER_MODELS)
    return file


@pytest.fixture
def data(toy_data: Path, tmp_path: Path) -> Path:
    """A copy of the toy data, to spoil."""
    return Path(shutil.copytree(toy_data, tmp_path / "data"))


@pytest.fixture
def quick(tmp_path: Path) -> Path:
    """A recipe that keeps a run short should it not be refused."""
    file = tmp_path / "quick.toml"
    file.write_text(QUICK)
    return file


def wide_mask() -> np.ndarray[Any, Any]:
    """A mask for the eligible convolution: the first two of every four along C."""
    mask = np.zeros(WIDE, np.bool_)
    mask[:, np.arange(WIDE[1]) % 4 < 2] = True
    return mask


# --- models


@pytest.mark.parametrize(
    "command",
    [
        ("engine", "resnet5O", "--out", "o"),
        ("mask", "resnet5O", "-o", "m.safetensors"),
        ("export", "resnet5O", "-o", "m.onnx"),
    ],
    ids=lambda c: c[0],
)
def test_an_unknown_model_is_answered_with_the_likely_one(refused: Refused, command: tuple[str, ...]) -> None:
    message = refused(*command)

    assert "unknown model 'resnet5O'" in message
    assert "did you mean 'resnet50'" in message


def test_an_unknown_model_of_timm_is_answered_with_the_likely_one(refused: Refused, out: Path) -> None:
    pytest.importorskip("timm", reason="timm is not installed")

    message = refused("engine", "timm/resnet5O", "--weights", "random", "--out", out)

    assert "did you mean 'resnet50" in message


def test_a_word_like_no_model_is_answered_with_the_kinds_of_models(refused: Refused, out: Path) -> None:
    message = refused("engine", "xyzzyplugh", "--out", out)

    assert "did you mean" not in message
    assert "file.py:factory" in message


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("branching", "cannot export the model"),
        ("only_depthwise", "no layer of the model can be masked 2:4"),
        ("not_a_classifier", "not a classifier"),
        ("another_input", "cannot run on its own input"),
        ("fails", "no weights today"),
        ("a_list", "does not make a torch module"),
        ("no_such", "does not make a torch module"),
    ],
)
def test_a_model_that_cannot_go_through_the_line_is_refused(
    refused: Refused, others: Path, out: Path, factory: str, says: str
) -> None:
    message = refused("engine", f"{others}:{factory}", "--weights", "random", "--out", out)

    assert says in message


def test_layers_that_cannot_be_masked_are_named_with_their_reasons(refused: Refused, others: Path, out: Path) -> None:
    message = refused("engine", f"{others}:only_depthwise", "--weights", "random", "--out", out)

    assert "deep.weight (8, 1, 3, 3) (grouped)" in message
    assert "stem.weight (8, 3, 3, 3) (channels_not_multiple_of_4)" in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def build(:\n", "SyntaxError"),
        ("import no_such_module_anywhere\n", "ModuleNotFoundError"),
        ("from torch import nn\nPREPROCESSING = {'hight': 3}\n\ndef build():\n    return nn.Linear(4, 2)\n", "hight"),
        (
            "from torch import nn\nPREPROCESSING = {'channels': 1}\n\ndef build():\n    return nn.Linear(4, 2)\n",
            "PREPROCESSING does not fit together",
        ),
    ],
    ids=["syntax", "import", "unknown preprocessing", "preprocessing of another channel count"],
)
def test_a_model_file_that_fails_is_named_with_its_error(
    refused: Refused, tmp_path: Path, out: Path, text: str, says: str
) -> None:
    (tmp_path / "broken.py").write_text(text)

    message = refused("engine", "broken.py:build", "--weights", "random", "--out", out)

    assert says in message
    assert "broken.py" in message


@pytest.mark.parametrize(("spec", "says"), [("nowhere.py:build", "file not found"), ("nowhere.py", "no factory named")])
def test_a_model_file_that_is_not_there_is_refused(refused: Refused, out: Path, spec: str, says: str) -> None:
    assert says in refused("engine", spec, "--out", out)


# --- weights


def test_a_missing_checkpoint_is_named(refused: Refused, tiny_spec: str, out: Path) -> None:
    message = refused("engine", tiny_spec, "--weights", "nowhere.safetensors", "--out", out)

    assert "nowhere.safetensors" in message
    assert "not found" in message


@pytest.mark.parametrize("kind", ["safetensors", "pth", "old.pth"])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.6], ids=["empty", "in the header", "in the tensors"])
def test_a_truncated_checkpoint_is_refused(
    refused: Refused, tiny_spec: str, state: dict[str, torch.Tensor], tmp_path: Path, out: Path, kind: str, keep: float
) -> None:
    file = tmp_path / f"w.{kind}"
    if kind == "safetensors":
        safetensors.numpy.save_file({k: v.numpy() for k, v in state.items()}, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=kind == "pth")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole))])

    message = refused("engine", tiny_spec, "--weights", file, "--out", out)

    assert "the checkpoint cannot be read" in message
    assert str(file) in message


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("text", ["<!doctype html><title>404 Not Found</title>", "These are not the weights.\n"])
def test_a_text_file_is_called_unreadable_and_not_malicious(
    refused: Refused, tiny_spec: str, tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text * 20)

    message = refused("export", tiny_spec, "--weights", name, "-o", "m.onnx")

    assert "the checkpoint cannot be read" in message
    assert name in message


class WantsToRun:
    """Unpickles to a call that leaves a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "plain pickle"])
@pytest.mark.parametrize("command", ["engine", "mask"])
def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(
    refused: Refused, tiny_spec: str, tmp_path: Path, zipped: bool, command: str
) -> None:
    ran = tmp_path / "it-ran"
    file = tmp_path / "w.pth"
    torch.save({"state_dict": {"w": torch.zeros(1)}, "x": WantsToRun(ran)}, file, _use_new_zipfile_serialization=zipped)

    message = refused(command, tiny_spec, "--weights", file, "--out" if command == "engine" else "-o", tmp_path / "o")

    assert "wants to run code" in message
    assert "system" in message
    assert not ran.exists()


def test_keys_that_do_not_fit_are_counted_and_the_first_few_named(
    refused: Refused, tiny_spec: str, state: dict[str, torch.Tensor], tmp_path: Path, out: Path
) -> None:
    torch.save({f"encoder.{k}": v for k, v in state.items()}, tmp_path / "w.pth")
    counted = [k for k in state if not k.endswith("num_batches_tracked")]

    message = refused("engine", tiny_spec, "--weights", "w.pth", "--out", out)

    assert f"{len(counted)} missing: {', '.join(counted[:5])} and {len(counted) - 5} more" in message
    assert f"{len(state)} not in the model: encoder.stem.weight" in message


def test_shapes_that_do_not_fit_are_named_with_both_shapes(
    refused: Refused, tiny_spec: str, state: dict[str, torch.Tensor], tmp_path: Path, out: Path
) -> None:
    torch.save({**state, "head.weight": torch.zeros(5, 8), "head.bias": torch.zeros(5)}, tmp_path / "w.pth")

    message = refused("engine", tiny_spec, "--weights", "w.pth", "--out", out)

    assert "2 of another shape" in message
    assert "head.weight is (5, 8) where the model has (3, 8)" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(
    refused: Refused, tiny_spec: str, state: dict[str, torch.Tensor], tmp_path: Path, out: Path, value: float
) -> None:
    state["wide.weight"][3, 1, 2, 0] = value
    torch.save(state, tmp_path / "w.pth")

    message = refused("engine", tiny_spec, "--weights", "w.pth", "--out", out)

    assert "1 tensors hold NaN or infinity" in message
    assert "wide.weight" in message


def test_pretrained_weights_that_do_not_exist_are_refused(refused: Refused, tiny_spec: str, out: Path) -> None:
    assert "no pretrained weights" in refused("engine", tiny_spec, "--weights", "pretrained", "--out", out)


# --- masks


Masks = dict[str, np.ndarray[Any, Any]]


def foreign(mask: np.ndarray[Any, Any]) -> Masks:
    return {"layer1.0.conv1.weight": mask}


def of_another_shape(mask: np.ndarray[Any, Any]) -> Masks:
    return {"wide.weight": mask[:, :4]}


def not_2_to_4(mask: np.ndarray[Any, Any]) -> Masks:
    mask[5, :4, 1, 1] = (True, True, True, False)
    return {"wide.weight": mask}


def of_a_depthwise_layer(mask: np.ndarray[Any, Any]) -> Masks:
    return {"wide.weight": mask, "depthwise.weight": np.ones((12, 1, 3, 3), np.bool_)}


def of_floats(mask: np.ndarray[Any, Any]) -> Masks:
    return {"wide.weight": mask.astype(np.float32)}


def none_at_all(mask: np.ndarray[Any, Any]) -> Masks:
    return {}


@pytest.mark.parametrize("command", ["engine", "bake"])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (foreign, ("the masks are of another model", "1 of 1 names", "layer1.0.conv1.weight")),
        (of_another_shape, ("shape (12, 4, 3, 3) where the weight has (12, 8, 3, 3)",)),
        (not_2_to_4, ("wide.weight: 1 groups keep more than 2 of 4",)),
        (of_a_depthwise_layer, ("depthwise.weight", "grouped")),
        (of_floats, ("not a mask file", "wide.weight is F32")),
        (none_at_all, ("not a mask file", "no tensors")),
    ],
)
def test_masks_that_do_not_fit_are_refused(
    refused: Refused,
    tiny_spec: str,
    tmp_path: Path,
    command: str,
    spoil: Callable[[np.ndarray[Any, Any]], Masks],
    says: tuple[str, ...],
) -> None:
    safetensors.numpy.save_file(spoil(wide_mask()), tmp_path / "m.safetensors")

    message = refused(command, tiny_spec, "--masks", "m.safetensors", *_target(command))

    for text in says:
        assert text in message


@pytest.mark.parametrize("command", ["engine", "bake"])
def test_masks_in_the_flat_layout_are_refused(
    refused: Refused, cli: Callable[..., Ran], tiny_spec: str, tmp_path: Path, command: str
) -> None:
    made = tmp_path / "m.safetensors"
    assert cli("mask", tiny_spec, "--weights", "random", "--layout", "flat", "-o", made).code == 0

    message = refused(command, tiny_spec, "--masks", made, *_target(command))

    assert "'flat' cannot be deployed" in message


@pytest.mark.parametrize("command", ["engine", "bake"])
@pytest.mark.parametrize("content", [None, b"", b"\x10\0\0\0\0\0\0\0{not json at all", b"x" * 100])
def test_a_mask_file_that_cannot_be_read_is_refused(
    refused: Refused, tiny_spec: str, tmp_path: Path, command: str, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "m.safetensors").write_bytes(content)

    message = refused(command, tiny_spec, "--masks", "m.safetensors", *_target(command))

    assert "m.safetensors" in message


def _target(command: str) -> tuple[str, str]:
    return ("--out", "o") if command == "engine" else ("-o", "o.safetensors")


def test_an_unknown_mask_method_is_answered_with_the_known_ones(refused: Refused, tiny_spec: str, out: Path) -> None:
    message = refused("engine", tiny_spec, "--masks", "random", "--out", out)

    assert "unknown mask method 'random'" in message
    assert "learned" in message
    assert "magnitude" in message


def test_mask_refuses_an_unknown_method(refused: Refused, tiny_spec: str) -> None:
    assert "unknown mask method" in refused("mask", tiny_spec, "--method", "oracle", "-o", "m.safetensors")


@pytest.mark.parametrize("command", [("engine", "--masks"), ("mask", "--method")], ids=lambda c: c[0])
def test_learned_masks_without_images_say_what_they_need(
    refused: Refused, tiny_spec: str, command: tuple[str, str]
) -> None:
    target = "--out" if command[0] == "engine" else "-o"

    message = refused(command[0], tiny_spec, command[1], "learned", target, "o.safetensors")

    assert "learned masks need images" in message
    assert "--data" in message


# --- data


def no_folder(data: Path) -> None:
    shutil.rmtree(data)


def empty_folder(data: Path) -> None:
    shutil.rmtree(data)
    data.mkdir()


def no_val(data: Path) -> None:
    shutil.rmtree(data / "val")


def loose_images(data: Path) -> None:
    for file in sorted((data / "train").rglob("*.png")):
        file.rename(data / "train" / f"{file.parent.name}-{file.name}")
    for folder in list((data / "train").iterdir()):
        if folder.is_dir():
            folder.rmdir()


def an_empty_class(data: Path) -> None:
    for file in (data / "train" / "green").iterdir():
        file.unlink()


def another_class_in_val(data: Path) -> None:
    (data / "val" / "green").rename(data / "val" / "yellow")


def classes_txt_of_others(data: Path) -> None:
    (data / "classes.txt").write_text("blue\ngreen\nyellow\n")


def four_classes(data: Path) -> None:
    for part in ("train", "val"):
        shutil.copytree(data / part / "red", data / part / "yellow")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (no_folder, ("data folder not found", "train/CLASS")),
        (empty_folder, ("no train/ in the data folder", "nothing")),
        (no_val, ("no val/ in the data folder", "train")),
        (loose_images, ("no class folders and 60 loose images",)),
        (an_empty_class, ("green",)),
        (another_class_in_val, ("only in train: green", "only in val: yellow")),
        (classes_txt_of_others, ("classes.txt", "not listed: red", "without a folder: yellow")),
        (four_classes, ("4 class folders, 3 model outputs", "--classes 4")),
    ],
)
def test_a_data_folder_laid_out_wrongly_is_refused(
    refused: Refused, tiny_spec: str, data: Path, out: Path, spoil: Callable[[Path], None], says: tuple[str, ...]
) -> None:
    spoil(data)

    message = refused("engine", tiny_spec, "--weights", "random", "--data", data, "--out", out)

    for text in says:
        assert text in message


def test_corrupt_images_are_counted_and_the_first_few_named(
    refused: Refused, tiny_spec: str, data: Path, out: Path
) -> None:
    folder = data / "val" / "blue"
    whole = (folder / "00.png").read_bytes()
    (folder / "00.png").write_bytes(b"")
    (folder / "01.png").write_bytes(b"no image")
    (folder / "02.png").write_bytes(whole[: len(whole) // 2])
    (folder / "03.png").write_bytes(whole[:8] + b"\xff" * 40 + whole[48:])
    for i in range(4, 7):
        (folder / f"{i:02}.png").write_bytes(b"\x89PNG")

    message = refused("engine", tiny_spec, "--weights", "random", "--data", data, "--out", out)

    assert "7 of 24 val images cannot be decoded" in message
    assert ", ".join(f"blue/{i:02}.png" for i in range(5)) + " and 2 more" in message


def test_validation_images_that_were_trained_on_are_refused(
    refused: Refused, tiny_spec: str, data: Path, out: Path
) -> None:
    for i in range(4):
        shutil.copy(data / "train" / "red" / f"{i:02}.png", data / "val" / "red" / f"{i:02}.png")

    message = refused("engine", tiny_spec, "--weights", "random", "--data", data, "--out", out)

    assert "val images also shaped the model" in message


@pytest.mark.parametrize(
    "command",
    [
        ("mask", "--method", "learned", "-o", "m.safetensors", "--data"),
        ("bake", "--masks", "m.safetensors", "-o", "b.safetensors", "--recalibrate"),
    ],
    ids=lambda c: c[0],
)
def test_every_command_that_reads_images_refuses_a_missing_folder(
    refused: Refused, tiny_spec: str, command: tuple[str, ...]
) -> None:
    assert "data folder not found" in refused(command[0], tiny_spec, *command[1:], "nowhere")


def test_compare_refuses_a_missing_data_folder(refused: Refused, finished_digits: Path) -> None:
    sides = (finished_digits / "dense_engine.onnx", finished_digits / "engine.onnx")

    assert "data folder not found" in refused("compare", *sides, "--data", "nowhere")


def test_compare_refuses_data_of_another_class_count(refused: Refused, finished_digits: Path, toy_data: Path) -> None:
    sides = (finished_digits / "dense_engine.onnx", finished_digits / "engine.onnx")

    assert "3 class folders, 10 model outputs" in refused("compare", *sides, "--data", toy_data)


# --- ONNX files and engines


@pytest.mark.parametrize(
    "command",
    [("check", "x.onnx"), ("build", "x.onnx", "-o", "e.onnx"), ("prune", "x.onnx", "-o", "s.onnx")],
    ids=lambda c: c[0],
)
@pytest.mark.parametrize("content", ["missing", "empty", "text", "image", "truncated"])
def test_a_file_that_is_not_onnx_is_refused(
    refused: Refused, finished_digits: Path, tmp_path: Path, command: tuple[str, ...], content: str
) -> None:
    write_bad_onnx(tmp_path / "x.onnx", content, finished_digits)

    assert "x.onnx" in refused(*command)


@pytest.mark.parametrize("content", ["missing", "empty", "text", "image", "truncated"])
@pytest.mark.parametrize("side", [0, 1], ids=["as dense", "as sparse"])
def test_compare_refuses_a_file_that_is_not_onnx(
    refused: Refused, finished_digits: Path, tmp_path: Path, content: str, side: int
) -> None:
    write_bad_onnx(tmp_path / "x.onnx", content, finished_digits)
    sides = [finished_digits / "dense.onnx"]
    sides.insert(side, Path("x.onnx"))

    assert "x.onnx" in refused("compare", *sides)


def write_bad_onnx(path: Path, content: str, finished: Path) -> None:
    whole = (finished / "sparse.onnx").read_bytes()
    if content == "image":
        Image.new("RGB", (4, 4)).save(path, "PNG")
    elif content != "missing":
        path.write_bytes({"empty": b"", "text": b"not ONNX\n" * 9, "truncated": whole[: len(whole) // 2]}[content])


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("inspect", "e.onnx"), "engine not found"),
        (("deploy", "e.onnx", "--repository", "models"), "engine not found"),
        (("time", "e.onnx", "e.onnx"), "engine not found"),
    ],
    ids=lambda c: c[0] if isinstance(c, tuple) else None,
)
def test_an_engine_that_is_not_there_is_refused(refused: Refused, command: tuple[str, ...], says: str) -> None:
    assert says in refused(*command)


@pytest.mark.parametrize("command", [("inspect",), ("deploy", "--repository", "models"), ("time", "engine.onnx")])
def test_an_engine_that_is_not_what_its_sidecar_says_is_refused(
    refused: Refused, digits: Path, command: tuple[str, ...]
) -> None:
    shutil.copy(digits / "dense_engine.onnx", digits / "engine.onnx")

    message = refused(command[0], digits / "engine.onnx", *[digits / a if "." in a else a for a in command[1:]])

    assert "not the one that its sidecar describes" in message


def test_an_engine_without_its_sidecar_is_refused(refused: Refused, digits: Path) -> None:
    (digits / "engine.onnx.json").unlink()

    assert "no engine.onnx.json" in refused("inspect", digits / "engine.onnx")


def test_compare_refuses_what_is_no_model(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")

    assert "not something to compare" in refused("compare", "notes.txt", "notes.txt")


# --- options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--backend", "openvino"), ("unknown backend 'openvino'", "onnxruntime")),
        (("--precision", "int3"), ("unknown precision 'int3'", "fp16")),
        (("--weights", "best"), ("best",)),
    ],
)
def test_an_unknown_choice_is_answered_with_the_known_ones(
    refused: Refused, tiny_spec: str, out: Path, options: tuple[str, str], says: tuple[str, ...]
) -> None:
    message = refused("engine", tiny_spec, *options, "--out", out)

    for text in says:
        assert text in message


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("build", "sparse.onnx", "--backend", "openvino", "-o", "e.onnx"), "unknown backend"),
        (("build", "sparse.onnx", "--profile", "8:1:4", "-o", "e.onnx"), "not a profile"),
        (("check", "sparse.onnx", "--pattern", "4"), "not an N:M pattern"),
        (("check", "sparse.onnx", "--masks", "nowhere.safetensors"), "mask file not found"),
        (("time", "engine.onnx", "engine.onnx", "--batch", "1,two"), "not a list of batch sizes"),
        (("compare", "sparse.onnx", "sparse.safetensors", "--max-top1-drop", "nan"), "nan"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(
    refused: Refused, digits: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(digits)

    assert says in refused(*command)


def test_a_seed_below_zero_is_refused(refused: Refused, tiny_spec: str, toy_data: Path, quick: Path, out: Path) -> None:
    message = refused(
        "engine", tiny_spec, "--weights", "random", "--data", toy_data, "--recipe", quick, "--out", out, "--seed", "-1"
    )

    assert "seed" in message


def test_every_problem_of_a_recipe_is_named_at_once(
    refused: Refused, tiny_spec: str, tmp_path: Path, out: Path
) -> None:
    (tmp_path / "r.toml").write_text(
        "[lern]\nepochs = 3\n[learn]\nepochs = 'many'\nepoch = 2\n[time]\nbatches = 8\n[export]\nopset = 18\n"
    )

    message = refused("engine", tiny_spec, "--recipe", "r.toml", "--out", out)

    assert "5 problems in the recipe" in message
    for text in ("[lern]", "did you mean 'learn'", "'epoch'", "did you mean 'epochs'", "batches", "'opset'", "'many'"):
        assert text in message


@pytest.mark.parametrize("content", [None, "[learn\nepochs = 3", "\xff\xfe", "learn = 3\n"])
def test_a_recipe_that_cannot_be_read_is_refused(
    refused: Refused, tiny_spec: str, tmp_path: Path, out: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "r.toml").write_bytes(content.encode("latin-1"))

    assert "r.toml" in refused("engine", tiny_spec, "--recipe", "r.toml", "--out", out)


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ("learn", "batch = 0"),
        ("learn", "epochs = -1"),
        ("learn", "rate = nan"),
        ("learn", "seed = -1"),
        ("learn", "tau_end = 0.0"),
        ("recalibrate", "batch = 0"),
        ("recalibrate", "images = -1"),
        ("compare", "fixed_images = 0"),
        ("compare", "max_top1_drop = nan"),
        ("time", "batches = [0]"),
        ("time", "seconds = nan"),
        ("mask", "pattern = '5:4'"),
        ("mask", "layout = 'diagonal'"),
        ("mask", "method = 'oracle'"),
    ],
)
def test_a_recipe_whose_values_make_no_sense_is_refused(
    refused: Refused, tiny_spec: str, toy_data: Path, tmp_path: Path, out: Path, table: str, line: str
) -> None:
    key = line.partition(" =")[0]
    quick = "\n".join(text for text in QUICK.splitlines() if not text.startswith(f"{key} ="))
    text = quick.replace(f"[{table}]", f"[{table}]\n{line}") if f"[{table}]" in quick else f"{quick}\n[{table}]\n{line}"
    (tmp_path / "r.toml").write_text(text)

    message = refused(
        "engine", tiny_spec, "--weights", "random", "--data", toy_data, "--recipe", "r.toml", "--out", out
    )

    assert key in message or "pattern" in message


def test_a_recipe_with_the_flat_layout_is_refused_before_anything_is_kept(
    refused: Refused, tiny_spec: str, tmp_path: Path, out: Path
) -> None:
    (tmp_path / "r.toml").write_text(f"{QUICK}\n[mask]\nlayout = 'flat'\n")

    message = refused("engine", tiny_spec, "--masks", "magnitude", "--recipe", "r.toml", "--out", out)

    assert "flat" in message


# --- the output


def test_an_output_folder_below_a_file_is_refused(refused: Refused, tiny_spec: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, not a folder")

    message = refused("engine", tiny_spec, "--weights", "random", "--out", "file/out")

    assert "cannot write" in message
    assert str(tmp_path / "file" / "out") in message
    assert "--out" in message


@pytest.mark.parametrize("out", ["file", "/proc/maskplan", "/dev/null/x"])
def test_an_output_folder_that_cannot_be_written_is_refused(
    refused: Refused, tiny_spec: str, tmp_path: Path, out: str
) -> None:
    (tmp_path / "file").write_text("a file, not a folder")

    assert "cannot write" in refused("engine", tiny_spec, "--weights", "random", "--out", out)


@pytest.mark.parametrize("command", [("mask", "-o"), ("export", "-o"), ("mask", "--report")], ids=lambda c: " ".join(c))
def test_an_output_file_that_cannot_be_written_is_refused(
    refused: Refused, tiny_spec: str, tmp_path: Path, command: tuple[str, str]
) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    target = ("-o", "/dev/null") if command[1] == "--report" else ()

    message = refused(command[0], tiny_spec, "--weights", "random", *target, command[1], "file/out")

    assert "cannot write" in message


def test_bad_input_leaves_a_finished_folder_as_it_is(refused: Refused, digits: Path) -> None:
    message = refused("engine", "digits_resnet", "--out", digits, "--weights", "nowhere.pth")

    assert "nowhere.pth" in message


def test_bad_input_leaves_an_empty_folder_empty(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()

    refused("engine", "resnet5O", "--out", "mine")

    assert (tmp_path / "mine").is_dir()
