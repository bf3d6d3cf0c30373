"""When the load stage runs again, and when the stages behind it do: the graph of the user's module decides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import HostError
from maskplan.pipeline.models.checkpoint import ModelOptions
from maskplan.pipeline.models.graph_digest import GraphDigest, graph_digest
from maskplan.pipeline.models.registry import Architecture, build_model
from maskplan.pipeline.recipe import Recipe
from maskplan.pipeline.stages import model
from maskplan.pipeline.stages.job import Job
from maskplan.pipeline.stages.workspace import Workspace

NET = """
import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

BESIDE = Path(__file__).parent
CONFIG = json.loads((BESIDE / "config.json").read_text())
PREPROCESSING = {"height": 8, "width": 8, "resize": 0, "mean": CONFIG["mean"], "std": [0.25] * 3}
LABELS = CONFIG["labels"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.register_buffer("gain", torch.from_numpy(np.load(BESIDE / "gain.npy")), persistent=False)
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        x = getattr(torch, CONFIG["activation"])(self.conv(x)) * self.gain
        if "NET_POWER" in os.environ:
            x = x ** float(os.environ["NET_POWER"])
        return self.head(x.mean((2, 3)) * 1.0)


def net():
    return Net()
"""


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """A model's file that reads a JSON file, an array and the environment."""
    config = {"activation": "relu", "mean": [0.5] * 3, "labels": ["a", "b"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    np.save(tmp_path / "gain.npy", np.float32(2))
    file = tmp_path / "net.py"
    file.write_text(NET)
    return file


def load(net: Path, folder: Path) -> tuple[bool, str, str]:
    """Whether the stage ran, the digest of its checkpoint, and that of the code."""
    with Workspace(folder) as ws:
        checkpoint, job = model.load(Job(ws, ModelOptions(f"{net}:net", weights="random"), Recipe()))
        return "load" in ws.seconds, checkpoint.sha256, job.code


def change_config(net: Path, **values: object) -> None:
    config = json.loads((net.parent / "config.json").read_text())
    (net.parent / "config.json").write_text(json.dumps(config | values))


def change_text(net: Path, old: str, new: str) -> None:
    assert net.read_text().count(old) == 1
    net.write_text(net.read_text().replace(old, new))


CHANGES: dict[str, Callable[[Path], object]] = {
    "the file's own code": lambda net: change_text(net, "* 1.0", "* 1.5"),
    "code that the configuration names": lambda net: change_config(net, activation="sigmoid"),
    "the mean of the images": lambda net: change_config(net, mean=[0.4] * 3),
    "labels": lambda net: change_config(net, labels=["a", "c"]),
    "a tensor that no checkpoint holds": lambda net: np.save(net.parent / "gain.npy", np.float32(3)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_whatever_changes_the_graph_runs_the_stages_again(
    change: Callable[[Path], object], net: Path, tmp_path: Path
) -> None:
    first, (again, *same) = load(net, tmp_path / "out"), load(net, tmp_path / "out")
    assert first == (True, *same)
    assert not again
    change(net)
    ran, _, code = load(net, tmp_path / "out")
    assert ran
    assert code != first[2]
    assert load(net, tmp_path / "out") == (False, *load(net, tmp_path / "fresh")[1:])


def test_the_environment_counts_too(net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, weights, code = load(net, tmp_path / "out")
    monkeypatch.setenv("NET_POWER", "2")
    ran, other_weights, other_code = load(net, tmp_path / "out")
    assert ran
    assert other_weights == weights
    assert other_code != code


def test_a_comment_keeps_everything_behind_the_load(net: Path, tmp_path: Path) -> None:
    first = load(net, tmp_path / "out")
    net.write_text("# A comment.\n" + net.read_text())
    assert load(net, tmp_path / "out") == first


def test_code_that_torch_export_cannot_read_counts_by_its_text(net: Path, tmp_path: Path) -> None:
    change_text(net, "* 1.0", "* (1.0 if float(x.sum()) > 0 else 2.0)")
    _, weights, code = load(net, tmp_path / "out")
    assert not graph_digest(build_model(f"{net}:net", seed=0)).exported
    change_text(net, "else 2.0", "else 3.0")
    ran, other_weights, other_code = load(net, tmp_path / "out")
    assert ran
    assert other_weights == weights
    assert other_code != code


def test_graphs_of_another_pytorch_are_not_compared(net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(net, tmp_path / "out")
    monkeypatch.setattr(model, "graph_digest", lambda _: GraphDigest("other", "0.0", True))
    assert load(net, tmp_path / "out") == (False, *first[1:])
    monkeypatch.setattr(model, "graph_digest", lambda _: GraphDigest("other", torch.__version__, True))
    assert load(net, tmp_path / "out")[0]


def test_a_finished_folder_is_read_without_pytorch(net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(net, tmp_path / "out")

    def missing(*_: object) -> None:
        raise HostError("PyTorch is not installed")

    monkeypatch.setattr(model, "load_architecture", missing)
    assert load(net, tmp_path / "out") == (False, *first[1:])


def test_weights_that_no_longer_fit_are_made_again(net: Path, tmp_path: Path) -> None:
    change_text(net, "nn.Linear(16, 2)", 'nn.Linear(16, CONFIG.get("classes", 2))')
    first = load(net, tmp_path / "out")
    change_config(net, classes=3, labels=["a", "b", "c"])
    ran, weights, code = load(net, tmp_path / "out")
    assert ran
    assert weights != first[1]
    assert code != first[2]


def test_the_digest_is_of_the_graph_and_not_of_the_values_of_weights() -> None:
    def digest(module: nn.Module) -> str:
        return graph_digest(Architecture("net", module.eval(), preprocessing, ())).sha256

    preprocessing = Preprocessing(3, 8, 8, 0, "bilinear", (0.5,) * 3, (0.25,) * 3)
    convolution = nn.Conv2d(3, 4, 3)
    first = digest(nn.Sequential(convolution, nn.ReLU()))
    with torch.no_grad():
        convolution.weight.add_(1.0)
    assert digest(nn.Sequential(convolution, nn.ReLU())) == first
    others = [
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.1)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2)),
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(0.1)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(0.2)),
    ]
    assert len({first, *map(digest, others)}) == 1 + len(others)
