"""docs/gpu-host.md, followed line by line: maskplan's commands against stand-ins, the others known by name."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_cuda
import fake_cusparselt
import fake_tensorrt
import onnx
import pytest
from digits_run import LEARN
from tensorrt_hosts import HAS_RTX

from maskplan.engines import cusparselt
from maskplan.engines.sidecar import read_engine
from maskplan.pipeline.core.artifacts import Profile

PAGE = Path(__file__).parents[1] / "docs" / "gpu-host.md"
VERSION = "10.13.3.9"
# What these do cannot be done here: their first words.
ELSEWHERE = {
    "nvidia-smi --query-gpu=name,compute_cap,driver_version",
    "nvcc --version",
    "python3 --version",
    "python3 -m venv",
    ". .venv/bin/activate",
    "pip install 'tensorrt==10.13.3.*'",
    "pip install cuda-python",
    "pip install 'tensorrt-rtx-cu13==1.7.1.116' pycuda",
    "docker run --rm",
    "python benchmarks/gpu.py",
    "scp -r build/digits_resnet",
    "scp gpu-host:theirs.plan gpu-host:theirs.plan.layers.json",
}
# Repeated options take the last value; nothing but the time they take is changed.
QUICKER = {"time": ["--seconds", "0.1"], "engine": ["--recipe", "quick.toml"]}


def lines() -> list[str]:
    """The lines of the page's console blocks, in order."""
    blocks = re.findall(r"^```console\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def commands() -> list[str]:
    return [line.removeprefix("$ ") for line in lines() if line.startswith("$ ")]


def test_every_other_command_is_known() -> None:
    others = [command for command in commands() if not command.startswith("maskplan ")]
    unknown = [command for command in others if not any(command.startswith(known) for known in ELSEWHERE)]
    unused = [known for known in ELSEWHERE if not any(command.startswith(known) for command in others)]
    assert (unknown, unused) == ([], [])


def test_every_command_of_the_page_stands_in_a_console_block() -> None:
    fences = re.findall(r"^```(\w*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(fences) == {"console", ""}
    assert re.findall(r"^\s*\$ ", PAGE.read_text(encoding="utf-8"), re.MULTILINE) == ["$ "] * len(commands())


@pytest.mark.slow
def test_the_commands_lead_from_a_folder_to_a_deployed_and_measured_plan(
    finished_digits: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_digits, "build/digits_resnet")
    Path("quick.toml").write_text(f"{LEARN}[compile]\nmode = 'off'\n[time]\nseconds = 0.1\n")
    monkeypatch.setattr(cusparselt, "find_cusparselt_host", lambda: fake_cusparselt.HOST)
    arrived = False
    printed: dict[str, str] = {}
    here = [command for command in commands() if HAS_RTX or "tensorrt-rtx" not in command]
    for command in here:
        words = shlex.split(command)
        if words[:2] == ["maskplan", "serve-check"]:
            # It needs a server: tests/pipeline/triton/test_serving_page.py.
            continue
        if words[0] == "maskplan":
            ran = cli(*words[1:], *QUICKER.get(words[1], []))
            assert ran.code == 0, f"{command}\n{ran.out}\n{ran.err}"
            printed[command] = ran.out
            _after(words, ran.out)
        elif words[:2] == ["scp", "-r"]:
            # From here on the host has a GPU.
            fake_tensorrt.install(VERSION, fake_cuda.install(monkeypatch), monkeypatch)
            arrived = True
        elif words[:2] == ["scp", "gpu-host:theirs.plan"]:
            _run_trtexec()
    assert arrived
    assert len(printed) == sum(command.startswith("maskplan ") for command in here) - 1 > 10
    assert read_engine(Path("wide.plan")).profiles == (Profile(1, 1, 1), Profile(1, 16, 64))
    assert {len(read_engine(path).profiles) for path in Path("build/digits_resnet/three_way").glob("*.plan")} == {3}
    assert _served("models") == ["1", "2"]
    assert _served("elsewhere") == ["1"]
    assert Path("models/digits_resnet/1/golden/golden.json").is_file()
    assert {"verdict", "layers", "device"} <= set(json.loads(Path("probe.json").read_text()))
    assert [b["batch"] for b in json.loads(Path("three_way.json").read_text())] == [1, 8, 32]
    assert json.loads(Path("parity.json").read_text())["verdict"] == "pass"


def _after(words: list[str], out: str) -> None:
    """What the page says that a command does."""
    if "--print-trtexec" in words:
        (shown,) = [line for line in lines() if line.startswith("trtexec ")]
        assert out.startswith(f"{shown} ")
        assert "force" not in out
    elif "--rollback" in words:
        assert "version 1 is served again" in out
    elif words[1] == "inspect":
        assert f"tensorrt {VERSION}" in out
        assert "layers sparse" in out
        assert ("as stated, not verified" in out) == (words[2] == "imported.plan")
    elif words[1] == "deploy":
        assert "tensorrt_plan" in out
    elif "--three-way" in words and words[1] == "time":
        assert out.count("builds differ by") == 3


def _run_trtexec() -> None:
    """What the printed command leaves: a plan, and layers in the documented keys."""
    nodes = onnx.load("build/digits_resnet/sparse.fp16.onnx").graph.node
    name = next(node.name for node in nodes if node.op_type == "Conv")
    layer = {"Name": name, "LayerType": "CaskConvolution", "TacticName": "sm80_xmma_fprop_conv", "Metadata": ""}
    shutil.copy("build/digits_resnet/three_way/sparse.0.plan", "theirs.plan")
    Path("theirs.plan.layers.json").write_text(json.dumps({"Layers": [layer], "Bindings": ["input", "logits"]}))


def _served(repository: str) -> list[str]:
    return sorted(p.name for p in Path(repository, "digits_resnet").iterdir() if p.is_dir() and p.name.isdecimal())
