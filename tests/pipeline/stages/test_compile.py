"""The stage that compiles the line's ONNX files: what runs it again, what it leaves, how it does without a compiler."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from compiled_graphs import graph, needs_rtx
from run_reports import compiled_result, engine, refused_result

from maskplan.engines.sidecar import read_engine, write_sidecar
from maskplan.engines.trt.compile_options import CompileOptions
from maskplan.engines.trt.compile_process import Compiled
from maskplan.pipeline.core.artifacts import OnnxModel
from maskplan.pipeline.core.errors import HostError
from maskplan.pipeline.core.files import write_atomically
from maskplan.pipeline.models.checkpoint import ModelOptions
from maskplan.pipeline.recipe import Recipe
from maskplan.pipeline.stages import compile as stage
from maskplan.pipeline.stages.compile import CompileOutcome, compile_files
from maskplan.pipeline.stages.job import Job
from maskplan.pipeline.stages.workspace import Workspace

MISSING = HostError("TensorRT-RTX is not installed", where="tensorrt_rtx", fix="pip install 'maskplan[rtx]'")
BOTH = {"compile-dense", "compile-sparse"}


class World:
    """A compiler that answers as told, and the stage around it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.version, self.answer = folder, "1.7.1.116", compiled_result
        self.error: HostError | None = None
        self.files = [graph(folder / name) for name in ("dense.fp16.onnx", "sparse.fp16.onnx")]

    def compile(self, model: OnnxModel, *_: object, out: Path | None, **__: object) -> Compiled:
        if self.error is not None:
            raise self.error
        result = replace(self.answer(), onnx=model.path.name, version=self.version)
        if out is None or not result.accepted:
            return Compiled(result, None)
        made = engine(out.parent, path=out, sha256=write_atomically(out, b"plan"), bytes=4)
        write_sidecar(made)
        return Compiled(replace(result, path=out, sha256=made.sha256), made)

    def run(self, mode: str = "auto", backend: Any = "onnxruntime") -> tuple[CompileOutcome, set[str]]:
        with Workspace(self.folder / "out") as ws:
            job = Job(ws, ModelOptions("net"), replace(Recipe(), compile=CompileOptions(mode)))
            return compile_files(job, backend, *self.files), set(ws.seconds)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)
    monkeypatch.setattr(stage, "compile_onnx", made.compile)
    monkeypatch.setattr(stage, "installed_version", lambda: made.version)
    return made


def test_unchanged_files_are_not_compiled_again(world: World) -> None:
    outcome, ran = world.run()
    assert ran == BOTH
    assert outcome.report is not None
    assert outcome.report.accepted
    assert outcome.report.sparse.path == world.folder / "out" / "sparse.rtx.plan"
    assert world.run() == (outcome, set())


@pytest.mark.parametrize("name", ["sparse.rtx.plan", "sparse.rtx.plan.json"])
def test_a_plan_or_sidecar_that_was_lost_is_made_again(name: str, world: World) -> None:
    world.run()
    (world.folder / "out" / name).unlink()
    assert world.run()[1] == {"compile-sparse"}
    assert (world.folder / "out" / name).is_file()


def test_another_version_compiles_again_and_none_keeps_what_is_there(world: World) -> None:
    outcome, _ = world.run()
    world.version = "1.8.0.1"
    assert world.run()[1] == BOTH
    world.version, world.error = None, MISSING  # type: ignore[assignment]
    kept, ran = world.run()
    assert ran == set()
    assert kept.report is not None
    assert kept.report.sparse.sha256 == outcome.report.sparse.sha256  # type: ignore[union-attr]


def test_without_the_compiler_one_line_says_what_is_left_out(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.error = MISSING
    with caplog.at_level(logging.INFO):
        outcome, _ = world.run()
    assert outcome.report is None
    assert outcome.reason is not None
    assert "TensorRT-RTX is not installed" in outcome.reason
    assert "pip install 'maskplan[rtx]'" in outcome.reason
    assert [r.message for r in caplog.records if "left out" in r.message] == [f"compile: left out: {outcome.reason}"]
    with pytest.raises(HostError, match="not installed"):
        world.run("required")


def test_off_asks_nothing(world: World) -> None:
    world.error = MISSING
    assert world.run("off") == (CompileOutcome(), set())


def test_a_refusal_is_a_warning_and_leaves_no_plan_of_older_masks(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.run()
    world.files[1], world.answer = graph(world.folder / "sparse.fp16.onnx", "unsupported"), refused_result
    outcome, ran = world.run()
    assert ran == {"compile-sparse"}
    assert outcome.report is not None
    assert not outcome.report.accepted
    (warning,) = [r.message for r in caplog.records if r.levelno == logging.WARNING and "refuses" in r.message]
    assert "node layer.unique (Unique): the operator is not supported; write it with others" in warning
    assert not list((world.folder / "out").glob("sparse.rtx.plan*"))


def test_the_backend_of_the_same_compiler_has_the_plan_already(world: World) -> None:
    outcome, _ = world.run(backend="tensorrt-rtx")
    assert outcome.report is not None
    assert outcome.report.sparse.path is None
    assert not list((world.folder / "out").glob("*.plan"))


@needs_rtx
def test_the_digits_have_a_real_engine_in_which_everything_runs_in_fp16(
    finished_digits: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    engine_file = read_engine(finished_digits / "sparse.rtx.plan")
    assert (engine_file.backend, engine_file.precision) == ("tensorrt-rtx", "fp16")
    report = tmp_path / "check.json"
    assert cli("check", finished_digits / "sparse.fp16.onnx", "--compile", "--report", report).code == 0
    compiled = json.loads(report.read_text())["compile"]
    in_line = json.loads((finished_digits / "report.json").read_text())["compile"]["sparse"]
    assert compiled["accepted"]
    assert in_line["sha256"] == engine_file.sha256
    assert in_line["profiles"][-1]["products"] == compiled["profiles"][0]["products"] == {"Half": 10}
    weights = {"stem", "head", *(f"blocks.{i}.{n}" for i in range(3) for n in ("conv1", "conv2"))}
    named = {n for layer in compiled["profiles"][0]["layers"] if layer["role"] == "product" for n in layer["nodes"]}
    assert weights | {"blocks.1.shortcut.0", "blocks.2.shortcut.0"} <= named
