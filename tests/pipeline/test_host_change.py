"""A folder that was finished on one GPU host and goes on at another: plans are built anew there, and judged anew."""

from __future__ import annotations

from pathlib import Path

import fake_cuda
import fake_tensorrt
import pytest
from fake_tensorrt import Control
from small_net import small_net

from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.core.artifacts import Profile
from maskplan.pipeline.models.checkpoint import ModelOptions
from maskplan.pipeline.recipe import Recipe
from maskplan.pipeline.stages import engines as engine_stages
from maskplan.pipeline.stages.job import Job
from maskplan.pipeline.stages.workspace import Workspace
from maskplan.pipeline.timing.interleaved import TimeOptions

RECIPE = Recipe(time=TimeOptions((1, 3), seconds=0.0, warm_up=0))


def host(monkeypatch: pytest.MonkeyPatch, version: str, capability: tuple[int, int], name: str) -> Control:
    world = fake_cuda.install(monkeypatch)
    world.capability, world.name = capability, name
    return fake_tensorrt.install(version, world, monkeypatch)


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return small_net(tmp_path / "net.onnx")


def go_on(out: Path, net: Path, backend: str = "tensorrt") -> tuple[list[str], engine_stages.Engines, str]:
    """Which stages were not run again, the engines, and what timed them."""
    with Workspace(out) as ws:
        job = Job(ws, ModelOptions("net"), RECIPE)
        model = describe_onnx(net)
        engines = engine_stages.build(job, backend, model, model)
        device = engine_stages.time_stage(job, engines).device
        return sorted(ws.reused), engines, device


ALL = ["build-dense", "build-pruned", "build-sparse", "time"]


def test_on_the_same_host_nothing_is_built_again(tmp_path: Path, net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host(monkeypatch, "10.13.3.9", (8, 0), "A100")
    first = go_on(tmp_path / "out", net)
    again = go_on(tmp_path / "out", net)
    assert first[0] == []
    assert again[0] == ALL
    assert again[1] == first[1]


@pytest.mark.parametrize(
    ("version", "capability", "name"),
    [("11.4.0.106", (8, 0), "A100"), ("10.13.3.9", (9, 0), "H200")],
    ids=["another TensorRT", "another GPU"],
)
def test_on_another_host_plans_are_built_and_timed_anew(
    version: str, capability: tuple[int, int], name: str, tmp_path: Path, net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host(monkeypatch, "10.13.3.9", (8, 0), "A100")
    go_on(tmp_path / "out", net)
    control = host(monkeypatch, version, capability, name)
    reused, engines, device = go_on(tmp_path / "out", net)
    assert reused == []
    assert control.builds == 3
    assert (engines.sparse.runtime_version, engines.sparse.device) == (version, name)
    assert engines.sparse.compute_capability == "{}.{}".format(*capability)
    assert device == name


def test_a_host_without_a_gpu_leaves_plans_as_they_are(
    tmp_path: Path, net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        host(patch, "10.13.3.9", (8, 0), "A100")
        _, first, _ = go_on(tmp_path / "out", net)
    reused, engines, _ = go_on(tmp_path / "out", net)
    assert reused == ALL
    assert engines == first


def test_each_timed_batch_has_a_profile_of_its_own(tmp_path: Path, net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host(monkeypatch, "10.13.3.9", (8, 0), "A100")
    _, engines, _ = go_on(tmp_path / "out", net)
    assert engines.sparse.profiles == (Profile(1, 1, 1), Profile(1, 3, 3))
