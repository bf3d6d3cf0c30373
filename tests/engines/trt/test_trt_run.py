"""Running a plan, against the stand-ins: results, GPU time, graphs, and what is told when something does not fit."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fake_cuda
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from fake_cuda import World
from fake_tensorrt import Control

from maskplan.engines.build import BuildOptions, build_engine, open_engine
from maskplan.engines.sidecar import sidecar_path, write_sidecar
from maskplan.engines.trt.cuda import Context
from maskplan.engines.trt.graph import capture
from maskplan.engines.trt.options import TrtOptions
from maskplan.engines.trt.run import TrtEngine
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.core.artifacts import EngineFile, Profile
from maskplan.pipeline.core.errors import HostError, InputError, PipelineError

PROFILES = (Profile(1, 1, 1), Profile(1, 8, 16))


def images(batch: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(batch).normal(size=(batch, 3, 8, 8)).astype(np.float32)


def expected(source: Path, batch: int) -> npt.NDArray[np.float32]:
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    return session.run(None, {"input": images(batch)})[0]


@pytest.fixture
def plan(trt: Control, source: Path) -> EngineFile:
    return build_engine(describe_onnx(source), BuildOptions("tensorrt", PROFILES), source.with_name("engine.plan"))


@pytest.mark.parametrize("graphs", [True, False])
def test_results_are_the_graphs_own_at_every_batch(plan: EngineFile, source: Path, gpu: World, graphs: bool) -> None:
    engine = TrtEngine(plan, graphs=graphs)
    for batch in (1, 4, 16, 4, 4, 4, 1, 1, 1):
        found = engine.infer({"input": images(batch)})
        assert np.allclose(found["logits"], expected(source, batch), atol=1e-3)
    assert (gpu.launches > 0) == graphs
    engine.close()


def test_a_batch_runs_in_the_profile_tuned_closest_to_it(
    trt: Control, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiles = (Profile(1, 8, 16), Profile(1, 1, 1), Profile(1, 4, 16))
    plan = build_engine(describe_onnx(source), BuildOptions("tensorrt", profiles), source.with_name("engine.plan"))
    context = sys.modules["tensorrt"].IExecutionContext
    select, selected = context.set_optimization_profile_async, list[int]()
    monkeypatch.setattr(
        context, "set_optimization_profile_async", lambda self, i, stream: selected.append(i) or select(self, i, stream)
    )
    engine = TrtEngine(plan)
    for batch, profile in ((1, 1), (2, 2), (5, 2), (7, 0), (16, 0)):
        selected.clear()
        engine.infer({"input": images(batch)})
        assert set(selected) == {profile}
    engine.close()


def test_a_graph_is_replayed_only_while_the_shapes_stay(plan: EngineFile, gpu: World) -> None:
    engine = TrtEngine(plan)
    for batch, launches in ((4, 0), (4, 1), (4, 2), (1, 2), (4, 2), (4, 3)):
        engine.infer({"input": images(batch)})
        assert gpu.launches == launches
        assert gpu.graphs <= 1
    engine.close()
    assert (gpu.graphs, gpu.captures) == (0, 0)


@pytest.mark.parametrize("call", ["begin", "end", "instantiate", "launch"])
def test_a_graph_that_the_driver_refuses_costs_no_result(plan: EngineFile, source: Path, gpu: World, call: str) -> None:
    gpu.refused.add(call)
    engine = TrtEngine(plan)
    for _ in range(4):
        assert np.allclose(engine.infer({"input": images(2)})["logits"], expected(source, 2), atol=1e-3)
    engine.close()
    assert (gpu.launches, gpu.graphs, gpu.captures) == (0, 0, 0)


def test_work_that_tensorrt_refuses_to_have_captured_is_not_replayed(
    plan: EngineFile, source: Path, gpu: World, trt: Control, caplog: pytest.LogCaptureFixture
) -> None:
    """The graph would be an empty one."""
    trt.failures.add("capture")
    engine = TrtEngine(plan)
    with caplog.at_level(logging.INFO):
        for batch in (2, 2, 2, 3, 3, 3):
            assert np.allclose(engine.infer({"input": images(batch)})["logits"], expected(source, batch), atol=1e-3)
    engine.close()
    assert (gpu.launches, gpu.graphs, gpu.captures) == (0, 0, 0)
    assert "cannot be captured as a CUDA graph" in caplog.text


def test_without_cuda_python_the_engine_runs_all_the_same(
    plan: EngineFile, source: Path, gpu: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("cuda.bindings.driver")
    engine = TrtEngine(plan)
    for _ in range(3):
        assert np.allclose(engine.infer({"input": images(2)})["logits"], expected(source, 2), atol=1e-3)
    assert gpu.launches == 0
    engine.close()


def test_time_is_told_by_events_and_on_the_host(plan: EngineFile) -> None:
    engine = TrtEngine(plan)
    engine.infer({"input": images(4)})
    last_timing = engine.last_timing
    assert last_timing is not None
    # The stand-in's clock ticks once an event.
    assert (last_timing.gpu_ms, last_timing.copy_in_ms, last_timing.copy_out_ms) == (1.0, 1.0, 1.0)
    assert last_timing.host_ms > 0
    engine.close()


def test_time_between_two_marks_waits_for_them(gpu: World) -> None:
    context = Context()
    with context.active():
        first, second = context.record_event(), context.record_event()
        assert context.elapsed_ms(first, second) == 1.0
    context.close()


def test_work_that_breaks_off_within_a_capture_leaves_none_behind(gpu: World) -> None:
    def break_off() -> bool:
        raise KeyboardInterrupt

    context = Context()
    with context.active():
        with pytest.raises(KeyboardInterrupt):
            capture(context.stream_handle, break_off)
        assert gpu.streams[context.stream_handle].captured is None
        assert gpu.captures == 0
    context.close()


def test_what_was_current_stays_so_and_all_is_freed_where_it_was_made(plan: EngineFile, gpu: World) -> None:
    """Another library's context is not ours to displace; the primary one stays with the process, held once."""
    others = fake_cuda.Context(gpu)
    others.push()
    for _ in range(2):
        engine = TrtEngine(plan)
        for batch in (2, 2, 2, 16):
            engine.infer({"input": images(batch)})
            assert gpu.current == [others]
        engine.close()
        assert gpu.current == [others]
        assert gpu.retained == 2
        assert (gpu.memory, gpu.alive, gpu.graphs, gpu.misplaced) == ({}, 0, 0, 0)
    engine.close()


def test_two_engines_have_streams_of_their_own(plan: EngineFile, gpu: World) -> None:
    first, second = TrtEngine(plan), TrtEngine(plan)
    assert len(gpu.streams) == 2
    first.close()
    assert len(gpu.streams) == 1
    assert second.infer({"input": images(2)})["logits"].shape == (2, 5)
    second.close()


@pytest.mark.parametrize("failure", ["runtime", "deserialize", "context"])
def test_an_engine_that_cannot_be_made_frees_what_it_took(
    plan: EngineFile, trt: Control, gpu: World, failure: str
) -> None:
    trt.failures.add(failure)
    others = fake_cuda.Context(gpu)
    others.push()
    with pytest.raises(PipelineError) as caught:
        TrtEngine(plan)
    # The error holds the frames that it came through.
    assert caught.value.__traceback__ is not None
    assert (gpu.alive, gpu.misplaced, gpu.current) == (0, 0, [others])


@pytest.mark.parametrize("call", ["push", "stream"])
def test_a_gpu_that_fails_at_once_is_told(plan: EngineFile, gpu: World, call: str) -> None:
    gpu.refused.add(call)
    with pytest.raises(HostError, match=f"the GPU reported an error(.|\n)*{call} failed"):
        TrtEngine(plan)
    assert gpu.alive == 0


def test_an_answer_outlives_the_next_call(plan: EngineFile, source: Path) -> None:
    engine = TrtEngine(plan)
    first = engine.infer({"input": images(2)})["logits"]
    engine.infer({"input": 2 * images(2)})
    assert np.allclose(first, expected(source, 2), atol=1e-3)
    engine.close()


def test_a_batch_outside_every_profile(plan: EngineFile) -> None:
    engine = TrtEngine(plan)
    with pytest.raises(InputError, match="no profile contains the batch size") as caught:
        engine.infer({"input": images(17)})
    assert "1:8:16" in str(caught.value)
    assert np.isfinite(engine.infer({"input": images(16)})["logits"]).all()
    engine.close()


FAILURES = {
    "select": (HostError, r"failed to change the profile(.|\n)*Error in set optimization profile async\."),
    "input_shape": (InputError, "rejects an input shape"),
    "address": (HostError, "rejects a tensor address"),
    "execute": (HostError, "failed to run the engine"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_each_refusal_is_one_clear_error(plan: EngineFile, trt: Control, failure: str) -> None:
    engine = TrtEngine(plan)
    trt.failures.add(failure)
    kind, message = FAILURES[failure]
    with pytest.raises(kind, match=message):
        engine.infer({"input": images(2)})
    trt.failures.clear()
    assert engine.infer({"input": images(2)})["logits"].shape == (2, 5)
    engine.close()


def test_a_plan_that_tensorrt_does_not_take(plan: EngineFile, trt: Control) -> None:
    trt.failures.add("deserialize")
    with pytest.raises(InputError, match="cannot load the plan") as caught:
        open_engine(plan)
    assert "magicTagRead" in str(caught.value)


def test_no_runtime_is_told(plan: EngineFile, trt: Control) -> None:
    trt.failures.add("runtime")
    with pytest.raises(HostError, match=r"failed to create a Runtime(.|\n)*CUDA initialization failure with error: 35"):
        open_engine(plan)


@pytest.mark.parametrize("failure", ["deserialize", "context"])
@pytest.mark.parametrize("severity", ["ERROR", "WARNING"])
def test_no_memory_for_an_engine_or_its_context(plan: EngineFile, trt: Control, failure: str, severity: str) -> None:
    trt.failures.add(failure)
    trt.says = (severity, "Requested amount of GPU memory (8192 bytes) could not be allocated.")
    with pytest.raises(HostError, match=r"insufficient GPU memory for the engine(.|\n)*8192 bytes"):
        open_engine(plan)


def test_no_context_for_another_reason(plan: EngineFile, trt: Control) -> None:
    trt.failures.add("context")
    trt.says = ("ERROR", "Cuda failure: 700")
    with pytest.raises(HostError, match=r"failed to create an execution context for the plan(.|\n)*Cuda failure: 700"):
        open_engine(plan)


def test_a_plan_without_weights_is_refused(trt: Control, source: Path) -> None:
    options = BuildOptions("tensorrt", PROFILES, True, TrtOptions(strip_plan=True))
    record = build_engine(describe_onnx(source), options, source.with_name("engine.plan"))
    with pytest.raises(InputError, match="the plan contains no weights") as caught:
        open_engine(record)
    assert str(record.path) in str(caught.value)


def test_a_type_that_numpy_has_not_is_refused(plan: EngineFile, gpu: World) -> None:
    (logits,) = plan.outputs
    record = replace(plan, outputs=(replace(logits, dtype="bfloat16"),))
    with pytest.raises(InputError, match=r"NumPy does not support the type(.|\n)*logits bfloat16"):
        TrtEngine(record)


def changed_inputs(plan: EngineFile) -> dict[str, EngineFile]:
    (image,), (logits,) = plan.inputs, plan.outputs
    return {
        "no input picture float32": replace(plan, inputs=(replace(image, name="picture"),)),
        "no input input float16": replace(plan, inputs=(replace(image, dtype="float16"),)),
        "no output aux float32": replace(plan, outputs=(logits, replace(logits, name="aux"))),
        "output logits float32, which is not in the sidecar": replace(plan, outputs=()),
        "no output input float32": replace(plan, inputs=(logits,), outputs=(image,)),
        "2 profiles, the sidecar has 1": replace(plan, profiles=PROFILES[:1]),
        "2 profiles, the sidecar has 3": replace(plan, profiles=(*PROFILES, PROFILES[0])),
    }


@pytest.mark.parametrize("number", range(7))
def test_a_plan_that_is_not_what_its_sidecar_describes(plan: EngineFile, gpu: World, number: int) -> None:
    """As one of trtexec's that was imported with another graph, or another profile."""
    told, record = list(changed_inputs(plan).items())[number]
    write_sidecar(record)
    with pytest.raises(InputError, match="the plan does not match its sidecar") as caught:
        open_engine(plan.path)
    assert told in str(caught.value)
    assert gpu.alive == 0


HALF = images(2).astype(np.float16)


@pytest.mark.parametrize(
    ("feeds", "told"),
    [
        ({}, "no input, expected float32 (batch, 3, 8, 8)"),
        ({"picture": images(2)}, "picture, which is not an input"),
        ({"input": images(2), "picture": images(2)}, "picture, which is not an input"),
        ({"input": HALF}, "input float16 (2, 3, 8, 8), expected float32 (batch, 3, 8, 8)"),
        ({"input": images(2)[:, :1]}, "input float32 (2, 1, 8, 8)"),
        ({"input": images(2)[..., :4]}, "input float32 (2, 3, 8, 4)"),
        ({"input": images(2)[0]}, "input float32 (3, 8, 8)"),
        ({"input": np.zeros((), np.float32)}, "input float32 ()"),
        ({"input": images(2), "picture": images(3)}, "batch sizes 2 and 3"),
    ],
)
def test_feeds_that_do_not_fit_are_told_before_anything_is_copied(
    plan: EngineFile, gpu: World, feeds: dict[str, npt.NDArray[np.float32]], told: str
) -> None:
    engine = TrtEngine(plan)
    with pytest.raises(InputError, match="the feeds do not match the engine's inputs") as caught:
        engine.infer(feeds)
    assert told in str(caught.value)
    assert gpu.memory == {}
    engine.close()


def test_an_output_whose_shape_depends_on_the_data_is_told(trt: Control, source: Path) -> None:
    model = onnx.load(source)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "as many as there are"
    onnx.save(model, source)
    record = build_engine(describe_onnx(source), BuildOptions("tensorrt", PROFILES), source.with_name("engine.plan"))
    engine = open_engine(record)
    with pytest.raises(InputError, match="shape depends on the data") as caught:
        engine.infer({"input": images(2)})
    assert "logits" in str(caught.value)
    engine.close()


def test_no_memory_for_a_batch(plan: EngineFile, gpu: World, source: Path) -> None:
    engine = TrtEngine(plan)
    engine.infer({"input": images(1)})
    gpu.free_bytes = 1000
    with pytest.raises(HostError, match="insufficient GPU memory"):
        engine.infer({"input": images(16)})
    assert np.allclose(engine.infer({"input": images(1)})["logits"], expected(source, 1), atol=1e-3)
    engine.close()


def test_a_gpu_that_fails_is_told(plan: EngineFile, gpu: World) -> None:
    engine = TrtEngine(plan)
    gpu.broken = True
    with pytest.raises(HostError, match="illegal memory access"):
        engine.infer({"input": images(2)})
    gpu.broken = False
    engine.close()


@pytest.mark.parametrize("call", ["copy_in", "copy_out", "event", "record", "elapsed", "push"])
def test_each_call_that_the_gpu_refuses_is_told(plan: EngineFile, gpu: World, source: Path, call: str) -> None:
    engine = TrtEngine(plan)
    gpu.refused.add(call)
    with pytest.raises(HostError, match=rf"the GPU reported an error(.|\n)*{call} failed"):
        engine.infer({"input": images(2)})
    gpu.refused.clear()
    assert np.allclose(engine.infer({"input": images(2)})["logits"], expected(source, 2), atol=1e-3)
    engine.close()


def test_plans_of_another_tensorrt_and_of_another_gpu_are_refused_before_they_are_loaded(
    plan: EngineFile, gpu: World, another: Callable[[str], Control]
) -> None:
    gpu.capability = (9, 0)
    other = another("10.16.1.11")
    other.failures.add("deserialize")
    with pytest.raises(InputError, match="not built for this host") as caught:
        open_engine(plan)
    assert plan.runtime_version in str(caught.value)
    assert "10.16.1.11" in str(caught.value)
    assert "compute capability 8.0 (Fake GPU), this GPU has 9.0" in str(caught.value)


def test_compatible_plans_are_not_refused(
    trt: Control, gpu: World, source: Path, another: Callable[[str], Control]
) -> None:
    options = BuildOptions("tensorrt", PROFILES, True, TrtOptions(version_compatible=True, hardware_compatible=True))
    record = build_engine(describe_onnx(source), options, source.with_name("engine.plan"))
    gpu.capability = (9, 0)
    another("10.16.1.11")
    engine = open_engine(record)
    assert np.allclose(engine.infer({"input": images(2)})["logits"], expected(source, 2), atol=1e-3)
    engine.close()


def test_a_plan_for_other_versions_runs_in_its_own_too(trt: Control, source: Path) -> None:
    options = BuildOptions("tensorrt", PROFILES, True, TrtOptions(version_compatible=True))
    record = build_engine(describe_onnx(source), options, source.with_name("engine.plan"))
    engine = open_engine(record)
    assert np.allclose(engine.infer({"input": images(2)})["logits"], expected(source, 2), atol=1e-3)
    engine.close()


def test_truncated_and_changed_plans_never_reach_tensorrt(plan: EngineFile, trt: Control) -> None:
    data = plan.path.read_bytes()
    for changed in (data[: len(data) // 2], data[:-1] + bytes([data[-1] ^ 1]), b""):
        plan.path.write_bytes(changed)
        with pytest.raises(InputError, match="does not match its sidecar"):
            open_engine(plan)


def test_a_truncated_plan_with_a_sidecar_of_its_own(plan: EngineFile) -> None:
    """Whoever wrote the digest anew still meets TensorRT's own check."""
    import hashlib

    data = plan.path.read_bytes()[:200]
    plan.path.write_bytes(data)
    write_sidecar(replace(plan, sha256=hashlib.sha256(data).hexdigest()))
    assert sidecar_path(plan.path).is_file()
    with pytest.raises(InputError, match="cannot load the plan"):
        open_engine(plan.path)
