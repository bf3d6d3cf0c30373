"""Building a plan, against the stand-in for TensorRT: what is asked of the builder, and what is told when it fails."""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import re
import signal
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from fake_cuda import World
from fake_tensorrt import Control
from small_net import small_net

from maskplan.engines.build import BuildOptions, build_engine
from maskplan.engines.sidecar import read_engine
from maskplan.engines.trt.build import FP32_NOTE
from maskplan.engines.trt.log_capture import TrtLogCapture
from maskplan.engines.trt.options import TrtOptions
from maskplan.engines.trt.progress import _monitor_class
from maskplan.engines.trt.versions import import_tensorrt, network_flags
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.cli.app import main
from maskplan.pipeline.core.artifacts import EngineFile, Profile
from maskplan.pipeline.core.errors import HostError, InputError, PipelineError
from maskplan.pipeline.core.interrupts import INTERRUPTS, handle_signals

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
    build(source, tf32=True, version_compatible=True, strip_plan=True, hardware_compatible=True, optimization_level=5)
    assert trt.flags == {"SPARSE_WEIGHTS", "TF32", "VERSION_COMPATIBLE", "STRIP_PLAN", "REFIT_IDENTICAL"}
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
    assert "including sparse ones" in note
    assert note in caplog.text
    assert build(source, sparse=False, optimization_level=2).notes == ()


def test_floats_alone_are_said_to_have_no_sparse_kernels(trt: Control, tmp_path: Path) -> None:
    """Nothing is documented of BF16, so nothing is said of it."""
    assert build(small_net(tmp_path / "full.onnx")).notes == (FP32_NOTE,)
    narrow = small_net(tmp_path / "bf16.onnx", "float16")
    model = onnx.load(narrow)
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, onnx.TensorProto.BFLOAT16, values.shape, values.ravel()))
    onnx.save(model, narrow)
    # The stand-in runs graphs with ONNX Runtime, whose CPU has no BF16 to run.
    trt.failures.add("deserialize")
    record = build(narrow)
    assert record.precision == "bf16"
    assert FP32_NOTE not in record.notes


FAILURES = {
    "builder": (HostError, "failed to create a Builder"),
    "network": (InputError, "failed to create a network"),
    "parser": (HostError, "failed to create a OnnxParser"),
    "config": (InputError, "failed to create a builder configuration"),
    "parse": (InputError, "cannot parse the model: 3 errors"),
    "profile": (InputError, "rejects a profile"),
    "build": (InputError, "cannot build the model"),
    "out_of_memory": (HostError, "insufficient GPU memory for the build"),
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


def test_what_stood_in_the_way_of_a_builder_is_told(
    trt: Control, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT's own words where it logged some, else those of the bindings' exception, of whichever kind."""
    import tensorrt

    trt.failures.add("builder")
    with pytest.raises(HostError, match="CUDA initialization failure with error: 35"):
        build(source)

    def refuse(logger: object) -> None:
        raise RuntimeError("the builder's library cannot be loaded")

    monkeypatch.setattr(tensorrt, "Builder", refuse)
    with pytest.raises(HostError, match="the builder's library cannot be loaded"):
        build(source)


def test_a_graph_that_cannot_be_read_is_told_without_a_node(trt: Control, source: Path) -> None:
    described = describe_onnx(source)
    out = source.with_name("engine.plan")
    source.write_bytes(b"no model any more")
    with pytest.raises(InputError, match=r"found: node -1 \(\?\): Failed to parse the ONNX model"):
        build_engine(described, BuildOptions("tensorrt", PROFILES), out)
    source.unlink()
    with pytest.raises(InputError, match="found: Could not open file"):
        build_engine(described, BuildOptions("tensorrt", PROFILES), out)
    assert left(source.parent) == set()


def test_only_the_batch_may_be_dynamic(trt: Control, source: Path) -> None:
    free = small_net(source.with_name("free.onnx"), "float16", size="size")
    with pytest.raises(InputError, match="only the batch may be dynamic") as caught:
        build(free)
    assert "(None, 3, None, None)" in str(caught.value)
    assert left(source.parent) == {"net.onnx", "free.onnx"}


@pytest.mark.parametrize(
    ("refittable", "strip_plan", "flags"),
    [
        (False, False, set()),
        (True, False, {"REFIT"}),
        (False, True, {"STRIP_PLAN", "REFIT_IDENTICAL"}),
        (True, True, {"STRIP_PLAN", "REFIT"}),
    ],
)
def test_a_plan_can_be_refittable_and_without_its_weights_and_its_record_says_so(
    trt: Control, source: Path, refittable: bool, strip_plan: bool, flags: set[str]
) -> None:
    record = build(source, refittable=refittable, strip_plan=strip_plan)
    assert trt.flags == {"SPARSE_WEIGHTS"} | flags
    assert (record.refittable, record.strip_plan) == (refittable, strip_plan)


def test_a_version_without_a_figure_of_device_memory_leaves_it_open(trt: Control, source: Path) -> None:
    import tensorrt

    del tensorrt.ICudaEngine.device_memory_size_v2
    assert build(source).device_memory_bytes is None


def test_a_version_in_which_every_network_is_strongly_typed_needs_no_flag() -> None:
    trt = SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace(), __version__="11.0.0.114")
    assert network_flags(trt) == 0


def test_an_older_one_without_the_flag_is_refused() -> None:
    """Its networks would be weakly typed, and run in FP32."""
    trt = SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace(), __version__="10.13.3.9")
    with pytest.raises(HostError, match=r"TensorRT 10.13.3.9 without the flag STRONGLY_TYPED"):
        network_flags(trt)


@pytest.mark.parametrize("version", ["8.6.1", "9.3.0.post12.dev1", "10.2.0", "10.0.1"])
def test_a_tensorrt_that_is_too_old_is_told_with_what_is_needed(
    source: Path, another: Callable[[str], Control], version: str
) -> None:
    another(version)
    with pytest.raises(HostError, match="too old") as caught:
        build(source)
    assert f"TensorRT {version}, required is 10.3 or newer" in str(caught.value)


def test_a_folder_that_is_called_tensorrt_is_not_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    with pytest.raises(HostError, match="TensorRT is not installed"):
        import_tensorrt()


def test_without_a_gpu_nothing_is_built(trt: Control, gpu: World, source: Path) -> None:
    gpu.devices = 0
    with pytest.raises(HostError, match="no usable GPU"):
        build(source)


NO_EVIDENCE = "the plan cannot be inspected on this host, so it is unknown which layers run sparse: "


@pytest.mark.parametrize(
    ("failure", "why"),
    [
        ("deserialize", "Serialization assertion magicTagRead == kMAGIC_TAG failed."),
        ("runtime", "TensorRT failed to create a Runtime: CUDA initialization failure with error: 35"),
        ("inspector", "TensorRT gave no reason"),
    ],
)
def test_a_plan_that_cannot_be_inspected_is_kept_and_its_record_says_so(
    trt: Control, source: Path, caplog: pytest.LogCaptureFixture, failure: str, why: str
) -> None:
    trt.failures.add(failure)
    with caplog.at_level(logging.WARNING):
        record = build(source)
    assert record.notes == (NO_EVIDENCE + why,)
    assert record.notes[0] in caplog.text
    assert (record.layers, record.device_memory_bytes) == ((), None)
    assert read_engine(record.path) == record


@pytest.mark.parametrize("text", ["", "{}", '{"Layers": 3}'])
def test_nor_does_an_inspectors_answer_that_cannot_be_read_cost_the_plan(
    trt: Control, source: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    import tensorrt

    monkeypatch.setattr(tensorrt.EngineInspector, "get_engine_information", lambda self, format: text)
    record = build(source)
    assert record.notes[0].startswith(NO_EVIDENCE + "the layer information cannot be read")
    assert read_engine(record.path) == record


def test_a_plan_for_other_versions_is_inspected_like_any_other(trt: Control, source: Path) -> None:
    """It carries host code, which has to be allowed before TensorRT takes it."""
    record = build(source, version_compatible=True)
    assert record.notes == ()
    assert {layer.name: layer.state for layer in record.layers}["mix"] == "sparse"


def test_the_timing_cache_is_kept_between_builds_and_shared(trt: Control, source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "timing.cache"
    build(source, timing_cache=cache)
    first = set(cache.read_bytes().splitlines())
    other = first.copy().pop().replace(b"tactic 0", b"tactic of another process")

    given = []

    def meanwhile() -> None:
        given.append(bytes(trt.config.get_timing_cache().serialize()))
        cache.write_bytes(cache.read_bytes() + b"\n" + other)
        trt.during_build = lambda: None

    trt.during_build = meanwhile
    build(source, timing_cache=cache)
    assert given == [b"\n".join(first)]
    lines = set(cache.read_bytes().splitlines())
    assert first < lines
    assert other in lines
    assert len(lines) == 3


@pytest.mark.parametrize("stored", [b"TensorRT 9.0 tactic 1", b"no cache at all"])
def test_a_cache_of_another_tensorrt_is_begun_anew(
    trt: Control, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, stored: bytes
) -> None:
    cache = tmp_path / "timing.cache"
    cache.write_bytes(stored)
    with caplog.at_level(logging.WARNING):
        build(source, timing_cache=cache)
    assert "belongs to another TensorRT version or GPU; starting a new one" in caplog.text
    assert b"tactic 0" in cache.read_bytes()
    assert stored not in cache.read_bytes()


def test_a_cache_that_another_tensorrt_wrote_during_the_build_is_replaced(
    trt: Control, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "timing.cache"
    trt.during_build = lambda: cache.write_bytes(b"TensorRT 9.0 tactic 1") and None
    with caplog.at_level(logging.WARNING):
        build(source, timing_cache=cache)
    assert "replacing it" in caplog.text
    assert b"tactic 0" in cache.read_bytes()
    assert b"TensorRT 9.0" not in cache.read_bytes()


def test_a_busy_timing_cache_is_told_before_the_build(trt: Control, source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    with (tmp_path / "timing.cache.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(HostError, match="the timing cache is locked"):
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
    assert "failed to create a timing cache" in caplog.text


def test_ctrl_c_ends_a_build_between_two_steps_and_leaves_nothing(
    trt: Control, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(INTERRUPTS, "pending", None)
    before = left(source.parent)
    trt.during_build = lambda: os.kill(os.getpid(), signal.SIGINT)
    with handle_signals(), pytest.raises(KeyboardInterrupt):
        build(source)
    assert left(source.parent) == before
    assert trt.builds == 0


def test_the_outermost_phase_is_drawn(trt: Control) -> None:
    """TensorRT nests phases; a bar that jumps between them would tell nothing."""
    import tensorrt

    drawn: list[tuple[int, int | None]] = []
    monitor = _monitor_class(tensorrt)(lambda done, total: drawn.append((done, total)))
    monitor.phase_start("Building Engine", None, 2)
    assert monitor.step_complete("Building Engine", 0)
    monitor.phase_start("Tactics", "Building Engine", 40)
    assert monitor.step_complete("Tactics", 0)
    monitor.phase_finish("Tactics")
    assert monitor.step_complete("Building Engine", 1)
    monitor.phase_finish("Building Engine")
    assert drawn == [(0, 2), (1, None), (2, None)]


@pytest.mark.parametrize(
    ("lines", "note"),
    [
        (
            [
                "(Sparsity) Found 39 layer(s) eligible to use sparse tactics",
                "(Sparsity) Chose 12 layer(s) using sparse tactics",
            ],
            "found 39 layers eligible, chose 12",
        ),
        (
            [
                "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: mix, mix2 + relu",
                "(Sparsity) Chose 1 layer(s) using sparse tactics: mix",
                "(Sparsity) Found 1 layer(s) eligible to use sparse tactics: other",
                "(Sparsity) Chose 0 layer(s) using sparse tactics",
            ],
            "found 2 layers eligible, chose 1; found 1 layers eligible, chose 0;"
            " eligible: mix, mix2 + relu, other; chosen: mix",
        ),
        (["(Sparsity) Perhaps"], "1 lines could not be parsed"),
    ],
)
def test_what_the_builder_logs_of_sparsity_is_kept_with_the_plan(
    trt: Control, source: Path, lines: list[str], note: str
) -> None:
    trt.sparsity = (*lines, "an ordinary line")
    record = build(source)
    assert record.notes == (f"TensorRT's log: {note}",)
    assert read_engine(record.path).notes == record.notes


def test_every_listener_hears_all_for_as_long_as_it_lives(trt: Control, source: Path) -> None:
    """TensorRT takes one logger for the process; a second build must not lose what a first began."""
    import tensorrt

    first = TrtLogCapture(tensorrt)
    second = TrtLogCapture(tensorrt)
    assert first.logger is second.logger
    trt.failures.add("build")
    with pytest.raises(InputError, match="Could not find any implementation"):
        build(source)
    for log_capture in (first, second):
        assert log_capture.errors == ["Could not find any implementation for node conv1."]
        assert log_capture.warnings == []
    gone = weakref.ref(first)
    del first, log_capture
    gc.collect()
    assert gone() is None


def test_a_warning_tells_why_where_there_is_no_error(trt: Control, source: Path) -> None:
    """Some versions speak of a CUDA that does not start as a warning only."""
    trt.failures.add("builder")
    trt.says = ("WARNING", "Unable to determine GPU memory usage: CUDA driver version is insufficient")
    with pytest.raises(HostError, match="CUDA driver version is insufficient"):
        build(source)


MEMORY = (
    "Cuda Runtime (out of memory)",
    "OutOfMemory Error in computeCosts: 0",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "Requested amount of GPU memory (1024 bytes) could not be allocated. There may not be enough free memory.",
    "GPU memory allocation error during getBestTactic: conv",
    "Could not find any implementation for node conv1 due to insufficient workspace. See verbose log.",
    "Skipping tactic 3 due to insufficient memory on requested size of 8589934592",
    "Tactic Device request: 1146MB Available: 100MB. Device memory is insufficient to use tactic.",
    "Cuda failure: 2",
    "CUDA initialization failure with error: 2",
)


@pytest.mark.parametrize("message", MEMORY)
def test_every_way_to_say_that_memory_does_not_suffice_is_known(trt: Control, source: Path, message: str) -> None:
    trt.failures.add("build")
    trt.says = ("ERROR", message)
    with pytest.raises(HostError, match="insufficient GPU memory for the build") as caught:
        build(source)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "message",
    [
        "Could not find any implementation for node conv1.",
        "CUDA initialization failure with error: 35",
        "Cuda failure: 222",
        "Cuda failure: 700",
        "CUDA driver version is insufficient for CUDA runtime version",
        "Memory usage of plan: 2 MiB",
    ],
)
def test_and_other_failures_are_not_taken_for_it(trt: Control, source: Path, message: str) -> None:
    trt.failures.add("build")
    trt.says = ("ERROR", message)
    with pytest.raises(InputError, match="cannot build the model"):
        build(source)


def test_lines_about_sparsity_and_errors_are_kept_apart(trt: Control) -> None:
    import tensorrt

    log_capture = TrtLogCapture(tensorrt)
    log_capture.logger.log(tensorrt.ILogger.INFO, "(Sparsity) Chose 2 layer(s) using sparse tactics")
    log_capture.logger.log(tensorrt.ILogger.WARNING, "something else")
    assert log_capture.reason() == "something else"
    log_capture.logger.log(tensorrt.ILogger.INTERNAL_ERROR, "an assertion failed")
    assert log_capture.sparsity == ["(Sparsity) Chose 2 layer(s) using sparse tactics"]
    assert log_capture.warnings == ["something else"]
    assert log_capture.errors == ["an assertion failed"]
    assert log_capture.reason() == "an assertion failed"
    assert TrtLogCapture(tensorrt).reason() == "TensorRT gave no reason"


@pytest.mark.parametrize("options", [{"optimization_level": 6}, {"optimization_level": -1}, {"workspace_bytes": 0}])
def test_senseless_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(InputError):
        TrtOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_a_profile_that_the_bindings_refuse(trt: Control, source: Path, kind: type[Exception]) -> None:
    import tensorrt

    def refuse(self: object, name: str, *shapes: object) -> None:
        raise kind("Shape provided for min is inconsistent with other shapes.")

    tensorrt.IOptimizationProfile.set_shape = refuse
    with pytest.raises(InputError, match="rejects a profile") as caught:
        build(source)
    assert "net.onnx: input" in str(caught.value)
    assert "Shape provided for min is inconsistent" in str(caught.value)


@pytest.mark.parametrize(
    "error", ["ImportError('no bindings')", "OSError('libnvinfer.so.10: cannot open')", "RuntimeError('no wheel')"]
)
def test_a_tensorrt_that_does_not_load_is_told(
    source: Path, tmp_path: Path, error: str, gpu: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its package looks for the shared libraries when it is imported."""
    package = tmp_path / "packages" / "tensorrt"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"raise {error}\n")
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.syspath_prepend(package.parent)
    with pytest.raises(HostError, match="TensorRT is not installed") as caught:
        build(source)
    assert error.partition("(")[0] in str(caught.value)


def test_missing_pycuda_is_told_apart_from_a_missing_gpu(
    trt: Control, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    monkeypatch.setitem(sys.modules, "pycuda", None)
    with pytest.raises(HostError, match=r"pycuda is not installed(.|\n)*pip install 'maskplan\[tensorrt\]'"):
        build(source)
    package = tmp_path / "packages" / "pycuda"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "driver.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')\n")
    for name in ("pycuda.driver", "pycuda"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(package.parent)
    with pytest.raises(HostError, match=r"no usable GPU(.|\n)*libcuda.so.1"):
        build(source)


def test_missing_tensorrt_is_told_with_what_to_install(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
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
