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


def build() -> torch.nn.Module:
    namespace: dict[str, Any] = {}
    exec(NET, namespace)
    net: torch.nn.Module = namespace["build"]()
    return net


def write_foreign_models(folder: Path) -> None:
    """A classifier and a detector, as another tool might export them."""
    generator = np.random.default_rng(0)
    weights = {"w": generator.standard_normal((8, 3, 3, 3)), "h": generator.standard_normal((3, 8, 1, 1))}
    initializers = [numpy_helper.from_array(0.1 * w.astype(np.float32), key) for key, w in weights.items()]
    body = [
        helper.make_node("Conv", ["images", "w"], ["a"], "/body/Conv", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], "/body/Relu"),
        helper.make_node("Conv", ["b", "h"], ["c"], "/head/Conv"),
    ]
    classify = [
        helper.make_node("GlobalAveragePool", ["c"], ["p"], "/head/Pool"),
        helper.make_node("Flatten", ["p"], ["y"], "/head/Flatten"),
    ]
    detect = [helper.make_node("Sigmoid", ["c"], ["y"], "/head/Sigmoid")]
    for name, tail, size, output in (
        ("model", classify, (16, 16), ["n", 3]),
        ("detector", detect, ("h", "w"), ["n", 3, "h", "w"]),
    ):
        inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, *size])]
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)]
        graph = helper.make_graph([*body, *tail], name, inputs, outputs, initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        onnx.save(model, folder / f"{name}.onnx")


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
                # The small network loses more than a real one may.
                extra += ["--max-top1-drop", "100"]
            with monkeypatch.context() as context:
                if "tensorrt" in words:
                    fake_tensorrt.install("10.13.3.9", fake_cuda.install(context), context)
                ran = cli(*words[1:], *extra)
            # A gate may judge the small network either way; anything else must succeed.
            allowed = (0, 1) if words[1] == "compare" else (0,)
            assert ran.code in allowed, f"{page}: {command}\n{ran.out}\n{ran.err}"
            after(words)
