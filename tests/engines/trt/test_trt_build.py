"""Building a plan, against the stand-in for TensorRT: what is asked of the builder, and what is told when it fails."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import World
from fake_tensorrt import Control

from engines.build import BuildOptions, build_engine
from engines.sidecar import read_engine
from engines.trt.options import TrtOptions
from exporters.metadata import describe_onnx
from pipeline.artifacts import EngineFile, Profile
from pipeline.cli.app import main
from pipeline.errors import HostError, InputError, PipelineError
from pipeline.interrupts import INTERRUPTS, listening

PROFILES = (Profile(1, 1, 1), Profile(1, 8, 16))


def build(source: Path, *, sparse: bool = True, profiles: tuple[Profile, ...] = PROFILES, **options: Any) -> EngineFile:
    chosen = BuildOptions("tensorrt", profiles, sparse, TrtOptions(**options))
    return build_engine(describe_onnx(source), chosen, source.with_name("engine.plan"))


def left(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_a_plan_and_its_record(trt: Control, source: Path) -> None:
    record = build(source)
    assert record == read_engine(source.with_name("engine.plan"))
    assert (record.backend, record.typing, record.device) == ("tensorrt", "strong", "Fake GPU")
    assert record.compute_capability == "8.0"
    assert record.device_memory_bytes == 4096
    assert record.profiles == PROFILES
    assert record.bytes == record.path.stat().st_size
    states = {layer.name: layer.state for layer in record.layers}
    assert states["mix"] == "sparse"
    assert states["stem"] == "dense"


@pytest.mark.parametrize("sparse", [True, False])
def test_flags_are_those_asked_for(trt: Control, source: Path, sparse: bool) -> None:
    record = build(source, sparse=sparse)
    assert trt.flags == ({"SPARSE_WEIGHTS"} if sparse else set())
    assert any(layer.state == "sparse" for layer in record.layers) == sparse
    assert trt.config.profiling_verbosity.name == "DETAILED"
    assert trt.config.hardware_compatibility_level.name == "NONE"
    assert trt.config.builder_optimization_level == 3
    build(source, tf32=True, version_compatible=True, stripped=True, hardware_compatible=True, optimization_level=5)
    assert trt.flags == {"SPARSE_WEIGHTS", "TF32", "VERSION_COMPATIBLE", "STRIP_PLAN", "REFIT"}
    assert trt.config.hardware_compatibility_level.name == "AMPERE_PLUS"
    assert trt.config.builder_optimization_level == 5


def test_the_network_is_strongly_typed(trt: Control, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorrt

    made = []
    real = tensorrt.Builder.create_network
    monkeypatch.setattr(tensorrt.Builder, "create_network", lambda *a: made.append(real(*a)) or made[-1])
    build(source)
    assert [network._strong for network in made] == [True]


def test_workspace_and_profiles(trt: Control, source: Path) -> None:
    import tensorrt

    build(source, workspace_bytes=123456)
    assert trt.config.get_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE) == 123456
    shapes = [profile._shapes["input"] for profile in trt.config._profiles]
    assert shapes == [[(1, 3, 8, 8)] * 3, [(1, 3, 8, 8), (8, 3, 8, 8), (16, 3, 8, 8)]]


def test_a_low_level_and_a_graph_of_floats_are_warned_of(
    trt: Control, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert build(source).notes == ()
        (note,) = build(source, optimization_level=2).notes
    assert "sparse ones among them" in note
    assert note in caplog.text
    assert build(source, sparse=False, optimization_level=2).notes == ()


FAILURES = {
    "builder": (HostError, "no builder here"),
    "network": (InputError, "makes no network"),
    "parse": (InputError, "cannot parse the model: 3 errors"),
    "profile": (InputError, "refuses a profile"),
    "build": (InputError, "cannot build the model"),
    "out_of_memory": (HostError, "memory does not suffice for the build"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_each_failure_is_one_clear_error_and_leaves_nothing(trt: Control, source: Path, failure: str) -> None:
    trt.failures.add(failure)
    kind, message = FAILURES[failure]
    before = left(source.parent)
    with pytest.raises(kind, match=message):
        build(source)
    assert left(source.parent) == before


def test_a_parser_failure_lists_nodes_and_operators(trt: Control, source: Path) -> None:
    trt.failures.add("parse")
    with pytest.raises(InputError) as caught:
        build(source)
    for number in range(3):
        assert f"node strange_{number} (Strange): no importer registered" in str(caught.value)


def test_tensorrts_own_words_are_quoted_and_logged(
    trt: Control, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trt.failures.add("build")
    with caplog.at_level(logging.ERROR), pytest.raises(InputError, match="Could not find any implementation"):
        build(source)
    assert "TensorRT: Could not find any implementation" in caplog.text


def test_without_a_gpu_nothing_is_built(trt: Control, gpu: World, source: Path) -> None:
    gpu.devices = 0
    with pytest.raises(HostError, match="no GPU can be used"):
        build(source)


def test_a_plan_that_cannot_be_inspected_is_kept_without_evidence(trt: Control, source: Path) -> None:
    trt.failures.add("deserialize")
    record = build(source)
    assert record.layers == ()
    assert record.path.is_file()


def test_the_timing_cache_is_kept_between_builds_and_shared(trt: Control, source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "timing.cache"
    build(source, timing_cache=cache)
    first = set(cache.read_bytes().splitlines())
    other = first.copy().pop().replace(b"tactic 0", b"tactic of another process")

    def meanwhile() -> None:
        cache.write_bytes(cache.read_bytes() + b"\n" + other)
        trt.during_build = lambda: None

    trt.during_build = meanwhile
    build(source, timing_cache=cache)
    lines = set(cache.read_bytes().splitlines())
    assert first < lines
    assert other in lines
    assert len(lines) == 3


def test_a_cache_of_another_tensorrt_is_begun_anew(
    trt: Control, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"TensorRT 9.0 tactic 1")
    with caplog.at_level(logging.WARNING):
        build(source, timing_cache=cache)
    assert "of another TensorRT" in caplog.text
    assert b"tactic 0" in cache.read_bytes()


def test_a_busy_timing_cache_is_told_before_the_build(trt: Control, source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    with (tmp_path / "timing.cache.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(HostError, match="the timing cache is busy"):
            build(source, timing_cache=cache, timing_cache_wait_s=0.2)
    assert trt.builds == 0
    assert not cache.exists()


def test_a_cache_that_gets_busy_during_the_build_costs_no_plan(
    trt: Control, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "timing.cache"
    held = []

    def meanwhile() -> None:
        if not held:
            held.append((tmp_path / "timing.cache.lock").open("a"))
            fcntl.flock(held[0], fcntl.LOCK_EX)

    trt.during_build = meanwhile
    with caplog.at_level(logging.WARNING):
        record = build(source, timing_cache=cache, timing_cache_wait_s=0.2)
    held[0].close()
    assert record.path.is_file()
    assert "not updated" in caplog.text
    assert not cache.exists()


def test_a_gpu_that_makes_no_cache_builds_without(
    trt: Control, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trt.failures.add("cache")
    with caplog.at_level(logging.WARNING):
        assert build(source, timing_cache=tmp_path / "timing.cache").path.is_file()
    assert "makes no timing cache" in caplog.text


def test_ctrl_c_ends_a_build_between_two_steps_and_leaves_nothing(
    trt: Control, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(INTERRUPTS, "came", None)
    before = left(source.parent)
    trt.during_build = lambda: os.kill(os.getpid(), signal.SIGINT)
    with listening(), pytest.raises(KeyboardInterrupt):
        build(source)
    assert left(source.parent) == before
    assert trt.builds == 0


@pytest.mark.parametrize("options", [{"optimization_level": 6}, {"optimization_level": -1}, {"workspace_bytes": 0}])
def test_senseless_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(InputError):
        TrtOptions(**options)  # type: ignore[arg-type]


def test_a_profile_that_a_fixed_batch_does_not_take(trt: Control, source: Path) -> None:
    import tensorrt

    def refuse(self: object, name: str, *shapes: object) -> None:
        raise ValueError("shapes do not fit")

    tensorrt.IOptimizationProfile.set_shape = refuse
    with pytest.raises(InputError, match="refuses a profile"):
        build(source)


def test_missing_tensorrt_is_told_with_what_to_install(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(PipelineError, match=r"pip install 'maskplan\[tensorrt\]'"):
        build(source)


def test_why_a_layer_runs_dense_is_told_by_inspect(
    trt: Control, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = build(source)
    assert {layer.name: layer.reason for layer in record.layers} == {"stem": "not_2to4", "mix": None}
    assert main(["inspect", str(record.path)]) == 0
    text = capsys.readouterr().out
    assert "1 layers sparse, 1 dense, 0 unknown" in text
    assert re.search(r"dense +C 3 K 16 +stem: sm70_xmma\w+ \(not_2to4\)", text)
    assert re.search(r"sparse +C 16 K 16 +mix: sm80_xmma_fprop_avdt_sparse\w+$", text, re.MULTILINE)
