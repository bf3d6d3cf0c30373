"""Every command in the README and in docs/ is run in order, with a small network in place of resnet50.

docs/gpu-host.md and docs/serving.md have tests of their own (test_gpu_host.py, pipeline/triton/test_serving_page.py).
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_cuda
import fake_tensorrt
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tensorrt_hosts import HAS_RTX

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.models import registry

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/masks.md",
    "docs/networks.md",
    "docs/int8.md",
    "docs/fp16.md",
    "docs/tensorrt-rtx.md",
    "docs/stability.md",
    "docs/ci.md",
    "CONTRIBUTING.md",
)
# Commands of other programs: what they do is tested elsewhere, or is not ours.
OTHERS = ("make ", "pip install ", "torchrun --nproc-per-node 8 -m maskplan.pipeline mask ")

NET = """
import torch
from torch import nn

PREPROCESSING = {"height": 16, "width": 16, "resize": 0, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))


def build():
    return Net()
"""
QUICK = """
[learn]
epochs = 1
[time]
seconds = 0.05
batches = [1]
[compile]
mode = "off"
"""


def commands(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def page_file(page: str, marker: str) -> str:
    """The Python file of a page that contains the marker."""
    blocks: list[str] = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    (found,) = (block for block in blocks if marker in block)
    return found


def build() -> torch.nn.Module:
    namespace: dict[str, Any] = {}
    exec(NET, namespace)
    net: torch.nn.Module = namespace["build"]()
    return net


def write_foreign_models(folder: Path) -> None:
    """A classifier, a segmenter and a detector of any size of images, as another tool might export them."""
    generator = np.random.default_rng(0)
    shapes = {"w": (8, 3, 3, 3), "v": (8, 8, 3, 3), "h": (4, 8, 1, 1), "s": (8, 8, 1, 1)}
    arrays = {name: 0.2 * generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    def conv(source: str, weight: str, name: str) -> onnx.NodeProto:
        pads = [1] * 4 if shapes[weight][2] == 3 else None
        return helper.make_node("Conv", [source, weight], [name], f"/{name}/Conv", pads=pads)

    body = [conv("images", "w", "a"), helper.make_node("Relu", ["a"], ["b"], "/body/Relu"), conv("b", "v", "c")]
    classify = [
        conv("c", "h", "d"),
        helper.make_node("GlobalAveragePool", ["d"], ["p"], "/head/Pool"),
        helper.make_node("Flatten", ["p"], ["y"], "/head/Flatten"),
    ]
    detect = [
        conv("c", "h", "boxes"),
        conv("c", "s", "d"),
        helper.make_node("Sigmoid", ["d"], ["scores"], "/head/Sigmoid"),
    ]
    any_size: dict[str, list[int | str]] = {"boxes": ["n", 4, "h", "w"], "scores": ["n", 8, "h", "w"]}
    for name, tail, size, outputs in (
        ("model", classify, [16, 16], {"y": ["n", 4]}),
        ("segmenter", [conv("c", "s", "out")], [16, 16], {"out": ["n", 8, 16, 16]}),
        ("detector", detect, ["h", "w"], any_size),
    ):
        nodes = [*body, *tail]
        used = {given for node in nodes for given in node.input}
        initializers = [numpy_helper.from_array(array, key) for key, array in arrays.items() if key in used]
        inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, *size])]
        returned = [helper.make_tensor_value_info(key, TensorProto.FLOAT, shape) for key, shape in outputs.items()]
        graph = helper.make_graph(nodes, name, inputs, returned, initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        onnx.save(model, folder / f"{name}.onnx")


def write_networks_page_files(folder: Path) -> None:
    """The Python files of docs/networks.md, weights for one of them, and arrays with a label for each pixel."""
    page = "docs/networks.md"
    for name, marker in (("city", "class Net"), ("backbone", "import timm"), ("metrics", "def mean_iou")):
        (folder / f"{name}.py").write_text(page_file(page, marker), encoding="utf-8")
    namespace: dict[str, Any] = {}
    exec((folder / "city.py").read_text(), namespace)
    from safetensors.torch import save_file

    save_file(namespace["build"]().state_dict(), folder / "city.safetensors")
    (folder / "scenes").mkdir()
    generator = np.random.default_rng(1)
    for role in ("train", "val"):
        images = generator.standard_normal((16, 3, 16, 16), np.float32)
        labels = generator.integers(0, 8, (16, 16, 16)).astype(np.uint8)
        labels[:, 0] = 255
        np.savez(folder / "scenes" / f"{role}.npz", images=images, labels=labels)


def trained() -> torch.nn.Module:
    """Tells the classes of the toy data, which are colors."""
    torch.manual_seed(5)
    net = build()
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(60):
        labels = torch.randint(3, (32,))
        pixels = 120 * torch.rand(32, 3, 16, 16)
        pixels[torch.arange(32), 2 - labels] += 120
        loss = torch.nn.functional.cross_entropy(net((pixels / 255 - 0.5) / 0.25), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, toy_data: Path, finished_digits: Path) -> Path:
    """What a reader has: weights, images, a model's file, ONNX files of other tools, a finished run of the digits."""
    folder = tmp_path_factory.mktemp("reader")
    net = trained()
    torch.save(net.state_dict(), folder / "w.pth")
    from safetensors.torch import save_file

    save_file(net.state_dict(), folder / "w.safetensors")
    (folder / "my_net.py").write_text(NET)
    write_foreign_models(folder)
    write_networks_page_files(folder)
    (folder / "quick.toml").write_text(QUICK)
    (folder / "gate.toml").write_text("[compare]\nmax_top1_drop = 50.0\n")
    for name in ("imagenet", "photos"):
        (folder / name).symlink_to(toy_data)
    shutil.copytree(finished_digits, folder / "build" / "digits_resnet")
    return folder


@pytest.fixture
def small_resnet50(monkeypatch: pytest.MonkeyPatch) -> None:
    """`resnet50` is the small network."""
    preprocessing = Preprocessing(3, 16, 16, 0, "bilinear", (0.5,) * 3, (0.25,) * 3)
    monkeypatch.setattr(
        registry,
        "_torchvision",
        lambda name, classes, pretrained: registry.Architecture("", build(), preprocessing, ()),
    )


def after(words: list[str]) -> None:
    """The files that later commands name."""
    out = Path("build/resnet50")
    if words[:3] == ["maskplan", "engine", "resnet50"]:
        for name, source in {
            "sparse.onnx": "sparse.onnx",
            "dense.onnx": "dense.onnx",
            "first.onnx": "sparse.onnx",
            "second.onnx": "sparse.onnx",
            "somebody_elses.onnx": "sparse.onnx",
            "masks.safetensors": "masks.safetensors",
            "sparse.safetensors": "sparse.safetensors",
        }.items():
            shutil.copy(out / source, name)


def test_the_commands_of_other_programs_are_known() -> None:
    others = [command for page in PAGES for command in commands(page) if not command.startswith("maskplan ")]
    assert others
    assert [command for command in others if not command.startswith(OTHERS)] == []


def test_every_command_is_in_a_console_block() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert len(re.findall(r"^\s*\$ ", text, re.MULTILINE)) == len(commands(page)), page
    assert sum(len(commands(page)) for page in PAGES) > 25
    with_commands = {f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md") if "```console" in p.read_text()}
    assert with_commands - set(PAGES) == {"docs/gpu-host.md", "docs/serving.md"}


def test_the_metric_of_the_page_is_mean_iou() -> None:
    namespace: dict[str, Any] = {}
    exec(page_file("docs/networks.md", "def mean_iou"), namespace)
    labels = np.array([[[0, 0, 1, 255]], [[1, 1, 1, 0]]], np.uint8)
    predicted = np.array([[[0, 1, 1, 1]], [[1, 1, 0, 0]]])
    logits = np.eye(3, dtype=np.float32)[predicted].transpose(0, 3, 1, 2)
    # Class 0: 2 of 4 pixels, class 1: 3 of 5; class 2 is in neither.
    assert namespace["mean_iou"]({"out": logits}, {"labels": labels}) == pytest.approx((2 / 4 + 3 / 5) / 2)


@pytest.mark.parametrize("pages", [PAGES[:1], pytest.param(PAGES, marks=pytest.mark.slow)], ids=["README", "all"])
def test_the_commands_run_as_printed(
    pages: tuple[str, ...], folder: Path, small_resnet50: None, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for page in pages:
        for command in commands(page):
            words = shlex.split(command)
            if words[0] != "maskplan":
                continue
            if {"tensorrt-rtx", "--compile"} & set(words) and not HAS_RTX:
                continue
            extra = ["--recipe", "quick.toml"] if words[1] in ("engine", "mask") else []
            if words[1] == "engine":
                # The small networks lose more than real ones may.
                for limit, value in (("--max-top1-drop", "100"), ("--min-sqnr", "-100"), ("--max-metric-drop", "100")):
                    extra += [limit, value] if limit in words or limit == "--max-top1-drop" else []
            with monkeypatch.context() as context:
                if "tensorrt" in words:
                    fake_tensorrt.install("10.13.3.9", fake_cuda.install(context), context)
                ran = cli(*words[1:], *extra)
            # A gate may judge the small network either way; anything else must succeed.
            allowed = (0, 1) if words[1] == "compare" else (0,)
            assert ran.code in allowed, f"{page}: {command}\n{ran.out}\n{ran.err}"
            after(words)
