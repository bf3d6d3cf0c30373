"""Building a plan with the fake TensorRT: what is requested from the builder, and the errors when it fails."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from fake_tensorrt import Control
from plan_builds import PROFILES, build
from small_net import small_net

from maskplan.engines.sidecar import read_engine
from maskplan.engines.trt.build import FP32_NOTE
from maskplan.engines.trt.options import TrtOptions
from maskplan.engines.trt.progress import _monitor_class
from maskplan.pipeline.cli.app import main
from maskplan.pipeline.core.errors import HostError, InputError


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
    "parse": (InputError, "cannot parse the model: 3 problems"),
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
        assert f"node strange_{number} (Strange): " in str(caught.value)


def test_tensorrts_own_words_are_quoted_and_logged(
    trt: Control, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trt.failures.add("build")
    level = caplog.at_level(logging.DEBUG, logger="maskplan.engines.trt.log_capture")
    with level, pytest.raises(InputError, match="Could not find any implementation"):
        build(source)
    assert "TensorRT: Could not find any implementation" in caplog.text
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING], "one message is enough"


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


def test_a_phase_within_another_is_a_part_of_its_step(trt: Control) -> None:
    """A bar of the outermost phase alone would stand still for minutes."""
    import tensorrt

    drawn: list[tuple[int, int | None]] = []
    monitor = _monitor_class(tensorrt)(lambda done, total: drawn.append((done, total)))
    monitor.phase_start("Building Engine", None, 2)
    assert monitor.step_complete("Building Engine", 0)
    monitor.phase_start("Tactics", "Building Engine", 4)
    assert monitor.step_complete("Tactics", 0)
    assert monitor.step_complete("Tactics", 2)
    monitor.phase_finish("Tactics")
    # Repeated for the next profile: the bar waits.
    monitor.phase_start("Tactics", "Building Engine", 4)
    assert monitor.step_complete("Tactics", 0)
    monitor.phase_finish("Tactics")
    monitor.phase_finish("Building Engine")
    assert drawn == [(share, 100) for share in (0, 50, 50, 62, 87, 87, 87, 87, 87, 100)]


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
