"""Commands that must be refused: exit 3, one message that says what and where, and nothing left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

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
    """Every folder, and every file with its bytes; without `__pycache__` and the process number in lock files."""
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
        assert len(message) < 1500, "the message is too long to read"
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
    """A recipe that keeps the run short if the command is not refused."""
    file = tmp_path / "quick.toml"
    file.write_text(QUICK)
    return file
