"""What holds of TensorRT wherever it runs: the same bodies against the stand-in here and the real one on a GPU host.

On a GPU host `pytest -m tensorrt` runs these and the contract of every backend; elsewhere they say why they are skipped.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from small_net import small_net

from maskplan.engines.base import Classifier
from maskplan.engines.build import BuildOptions, build_engine, open_engine
from maskplan.engines.sidecar import read_engine, write_sidecar
from maskplan.engines.trt.options import TrtOptions
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.core.artifacts import EngineFile, Profile
from maskplan.pipeline.core.errors import HostError, InputError
from maskplan.pipeline.timing.compare_latency import time_engines
from maskplan.pipeline.timing.interleaved import GPU, TimeOptions

PROFILES = (Profile(1, 1, 1), Profile(1, 8, 16))

pytestmark = pytest.mark.usefixtures("tensorrt_host")


def build(source: Path, *, sparse: bool = True, **options: object) -> EngineFile:
    chosen = BuildOptions("tensorrt", PROFILES, sparse, TrtOptions(**options))  # type: ignore[arg-type]
    return build_engine(describe_onnx(source), chosen, source.with_name("engine.plan"))


def images(batch: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(batch).normal(size=(batch, 3, 8, 8)).astype(np.float32)


def assert_right(found: npt.NDArray[np.float32], source: Path, batch: int) -> None:
    """Within what half precision may differ by, in sums of another order."""
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {"input": images(batch)})
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-2 * float(np.abs(wanted).max()))


def test_the_record_tells_where_and_how_the_plan_was_built(source: Path) -> None:
    import tensorrt

    record = build(source)
    assert record == read_engine(record.path)
    assert (record.backend, record.precision, record.typing) == ("tensorrt", "fp16", "strong")
    assert record.runtime_version == tensorrt.__version__
    assert record.device
    assert record.compute_capability is not None
    assert [int(part) >= 0 for part in record.compute_capability.split(".")] == [True, True]
    assert record.device_memory_bytes is not None
    assert record.build_s >= 0


@pytest.mark.parametrize("sparse", [True, False])
def test_the_inspector_gives_evidence_of_every_layer_with_weights(source: Path, sparse: bool) -> None:
    layers = build(source, sparse=sparse).layers
    assert layers
    assert {layer.state for layer in layers} <= {"sparse", "dense", "unknown"}
    assert all(layer.kernel for layer in layers if layer.state != "unknown")
    assert sparse or not any(layer.state == "sparse" for layer in layers)


def test_results_are_the_graphs_own_through_changes_of_batch_and_profile(source: Path) -> None:
    """Batches that stay are replayed as CUDA graphs where cuda-python is installed."""
    engine = open_engine(build(source))
    for batch in (1, 4, 16, 4, 4, 4, 1, 1, 1, 8):
        assert_right(engine.infer({"input": images(batch)})["logits"], source, batch)
    engine.close()


def test_a_batch_outside_every_profile_is_told_and_costs_nothing(source: Path) -> None:
    engine = open_engine(build(source))
    with pytest.raises(InputError, match="no profile contains the batch size") as caught:
        engine.infer({"input": images(17)})
    assert "1:8:16" in str(caught.value)
    assert_right(engine.infer({"input": images(16)})["logits"], source, 16)
    engine.close()


def test_the_gpus_time_is_told_beside_the_hosts(source: Path) -> None:
    record = build(source)
    engine = open_engine(record)
    assert engine.last_timing is None
    engine.infer({"input": images(8)})
    last_timing = engine.last_timing
    assert last_timing is not None
    figures = (last_timing.gpu_ms, last_timing.copy_in_ms, last_timing.copy_out_ms, last_timing.host_ms)
    assert all(math.isfinite(ms) and ms >= 0 for ms in figures)
    assert last_timing.gpu_ms > 0
    assert last_timing.host_ms > 0
    engine.close()


def test_engines_are_timed_by_the_gpu(source: Path) -> None:
    record = build(source)
    with (
        Classifier(open_engine(record), "a", PROFILES) as dense,
        Classifier(open_engine(record), "b", PROFILES) as sparse,
    ):
        report = time_engines(dense, sparse, None, TimeOptions((1, 8), warm_up=2, seconds=0, min_repeats=5))
    assert [(b.batch, b.by) for b in report.batches] == [(1, GPU), (8, GPU)]
    for timed in report.batches:
        for latency in (timed.dense, timed.sparse):
            assert latency.gpu_ms is not None
            assert latency.gpu_ms > 0
            assert latency.copies_ms is not None


@pytest.mark.parametrize("change", ["cut", "one bit", "empty"])
def test_a_plan_that_changed_after_its_sidecar_was_written_is_refused(source: Path, change: str) -> None:
    record = build(source)
    data = record.path.read_bytes()
    changed = {"cut": data[: len(data) // 2], "one bit": data[:-1] + bytes([data[-1] ^ 1]), "empty": b""}[change]
    record.path.write_bytes(changed)
    with pytest.raises(InputError, match="does not match its sidecar"):
        open_engine(record)


def test_a_cut_plan_with_a_digest_of_its_own_is_refused_by_tensorrt(source: Path) -> None:
    record = build(source)
    data = record.path.read_bytes()[:200]
    record.path.write_bytes(data)
    write_sidecar(replace(record, sha256=hashlib.sha256(data).hexdigest()))
    with pytest.raises(InputError, match="cannot load the plan") as caught:
        open_engine(record)
    assert "gave no reason" not in str(caught.value)


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"runtime_version": "8.5.1"}, "built by TensorRT 8.5.1"),
        ({"compute_capability": "1.0"}, "compute capability 1.0"),
    ],
)
def test_a_plan_of_another_tensorrt_or_gpu_is_refused(source: Path, told: dict[str, str], says: str) -> None:
    record = replace(build(source), **told)  # type: ignore[arg-type]
    write_sidecar(record)
    with pytest.raises(InputError, match="not built for this host") as caught:
        open_engine(record)
    assert says in str(caught.value)


def test_a_file_that_is_no_longer_a_model_leaves_nothing(source: Path) -> None:
    described = describe_onnx(source)
    source.write_bytes(b"no model any more")
    with pytest.raises(InputError, match="not an ONNX file") as caught:
        build_engine(described, BuildOptions("tensorrt", PROFILES), source.with_name("engine.plan"))
    assert str(source) in str(caught.value)
    assert [p.name for p in source.parent.iterdir()] == [source.name]


def test_a_graph_of_a_fixed_batch_takes_no_other(source: Path) -> None:
    fixed = small_net(source.with_name("fixed.onnx"), "float16", batch=4)
    before = {p.name for p in source.parent.iterdir()}
    with pytest.raises(InputError, match="cannot be built for these shapes") as caught:
        build(fixed)
    assert "profile" in str(caught.value)
    assert {p.name for p in source.parent.iterdir()} == before


def test_a_timing_cache_is_kept_and_taken_again(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "kept" / "timing.cache"
    build(source, timing_cache=cache)
    first = cache.read_bytes()
    assert first
    again = build(source, timing_cache=cache)
    assert len(cache.read_bytes()) >= len(first)
    engine = open_engine(again)
    assert_right(engine.infer({"input": images(2)})["logits"], source, 2)
    engine.close()


def test_a_file_that_is_no_timing_cache_costs_no_plan(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"no timing cache at all")
    assert build(source, timing_cache=cache).path.is_file()
    assert cache.read_bytes() != b"no timing cache at all"


def test_memory_that_the_gpu_does_not_have_is_told(source: Path) -> None:
    """More than any GPU has, asked of the same code that takes a batch's memory."""
    from maskplan.engines.trt.cuda import Context

    context = Context()
    with context.active(), pytest.raises(HostError, match="insufficient GPU memory"):
        context.allocate(1 << 50)
    with context.active():
        assert int(context.allocate(1 << 20)) > 0
    context.close()
