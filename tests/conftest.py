"""Shared fixtures: a tiny user model, a small data folder, and one finished run on the digits."""

from __future__ import annotations

import fcntl
import functools
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from digits_run import LEARN
from hypothesis import settings
from PIL import Image
from report_schema import validate_report

# The same examples every time, so that a failure in CI can be reproduced.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

TINY_CLASSES = ("blue", "green", "red")

TINY_MODEL = '''
import torch
from torch import nn

PREPROCESSING = {"height": 16, "width": 16, "resize": 0, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


class Tiny(nn.Module):
    """A stem, an eligible and a depthwise convolution, one with 6 channels, and a head."""

    def __init__(self, classes=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 12, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, 1, 1, groups=12)
        self.narrow = nn.Conv2d(12, 6, 1)
        self.odd = nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.stem(x)))
        x = torch.relu(self.bn2(self.wide(x)))
        x = self.odd(torch.relu(self.narrow(self.depthwise(x))))
        return self.head(x.mean((2, 3)))


def build():
    return Tiny()
'''


@pytest.fixture(scope="session", autouse=True)
def _quick_exports() -> None:
    """Do once what PyTorch's exporter does for each network, which takes longer than exporting a small one."""
    from torch._export import utils
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))  # type: ignore[method-assign]
    utils._materialize_cpp_cia_ops = functools.cache(utils._materialize_cpp_cia_ops)  # type: ignore[assignment]
    # Tests make much garbage; the libraries and the collected tests need not be searched for it each time.
    gc.collect()
    gc.freeze()


# The defaults, but for epochs and seconds of timing that no test needs.
DIGITS_RECIPE = LEARN + "[time]\nseconds = 0.5\n"


@dataclass(frozen=True)
class Ran:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run a command in this process."""
    from maskplan.pipeline.cli.app import main

    def run(*args: object) -> Ran:
        capsys.readouterr()
        code = main([str(a) for a in args])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


def spawn(*args: object, cwd: Path | None = None, timeout: float = 550) -> Ran:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "maskplan.pipeline", *(str(a) for a in args)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def maskplan() -> Callable[..., Ran]:
    """Run a command in a process of its own; `cwd` and `timeout` by keyword."""
    return spawn


@pytest.fixture(scope="session")
def tiny_source() -> str:
    """The source of the tiny model."""
    return TINY_MODEL


@pytest.fixture
def tiny_spec(tmp_path: Path) -> str:
    """The tiny model as `file.py:factory`."""
    file = tmp_path / "tiny.py"
    file.write_text(TINY_MODEL)
    return f"{file}:build"


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that differ in color: 20 training and 8 validation images each, 20x20, PNG. Do not write to it."""
    folder = tmp_path_factory.mktemp("toy")
    generator = np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 8)):
        for channel, name in zip((2, 1, 0), TINY_CLASSES, strict=True):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 120, (20, 20, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(folder / part / name / f"{i:02}.png")
    return folder


def build_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]) -> Path:
    """A folder that the first test process to need it builds for all of them. Do not write to it."""
    base = factory.getbasetemp()
    # Under pytest-xdist each worker has a folder of its own below the common one.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"shared-{name}"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            build(folder)
            (folder / "done").touch()
    return folder


@pytest.fixture(scope="session")
def finished_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `maskplan engine digits_resnet`, run once. Do not write to it; `digits` is a copy."""

    def build(folder: Path) -> None:
        recipe = folder / "recipe.toml"
        recipe.write_text(DIGITS_RECIPE)
        ran = spawn("engine", "digits_resnet", "--recipe", recipe, "--out", folder / "digits_resnet")
        assert ran.code == 0, ran.err
        validate_report(folder / "digits_resnet" / "report.json")

    return build_once(tmp_path_factory, "digits", build) / "digits_resnet"


@pytest.fixture
def digits(finished_digits: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to modify."""
    return Path(shutil.copytree(finished_digits, tmp_path / "digits_resnet"))
