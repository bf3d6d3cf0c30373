"""Three kinds of engine with several builds each: what is built, and when a gain counts."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_cuda
import fake_tensorrt
import numpy as np
import numpy.typing as npt
import pytest
from deployable import contents, killed, plan
from onnx import TensorProto, helper, numpy_helper

from maskplan.engines.base import Arrays, Classifier
from maskplan.engines.build import BuildOptions
from maskplan.engines.ort import NO_SPARSE_KERNELS
from maskplan.engines.trt.options import TrtOptions
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.cli.app import main
from maskplan.pipeline.core.artifacts import Profile, TensorSpec
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.timing.interleaved import TimeOptions
from maskplan.pipeline.timing.three_way import KINDS, ThreeWayBatch, build_three_way, read_three_way, time_three_way


def net(path: Path, *, dense: bool) -> Path:
    weight = np.random.default_rng(0).normal(size=(5, 4, 8, 8)).astype(np.float32)
    weight[:, 2:] *= dense
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"]), helper.make_node("Flatten", ["y"], ["logits"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


class Clock:
    """Seconds that pass only while an engine runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow:
    """An engine whose runs take the given durations, one after the other."""

    inputs = (TensorSpec("x", "float32", (None, 3, 8, 8)),)
    outputs = (TensorSpec("y", "float32", (None, 5)),)
    last_timing = None

    def __init__(self, clock: Clock, seconds: Iterator[float], log: list[str], name: str) -> None:
        self._clock, self._seconds, self._log, self._name = clock, seconds, log, name

    def infer(self, feeds: Arrays) -> dict[str, npt.NDArray[np.float32]]:
        self._clock.now += next(self._seconds)
        self._log.append(self._name)
        return {"y": np.zeros((len(feeds["x"]), 5), np.float32)}

    def close(self) -> None: ...


def timed(builds: dict[str, list[float]], note: str = "") -> tuple[ThreeWayBatch, list[str]]:
    """The verdict on engines with these latencies in seconds, and the order of their runs."""
    clock, log = Clock(), list[str]()
    engines = {
        kind: [Classifier(Slow(clock, itertools.repeat(s), log, f"{kind}{i}"), kind) for i, s in enumerate(seconds)]
        for kind, seconds in builds.items()
    }
    (found,) = time_three_way(engines, TimeOptions((2,), seconds=0.0, min_repeats=6), clock, note)
    return found, log


@pytest.mark.parametrize(
    ("pruned", "sparse", "gain", "spread", "is_faster"),
    [
        ([1.10, 1.11, 1.12], [1.00, 1.00, 1.00], 0.11, 1.12 / 1.10 - 1, True),
        ([1.05, 1.05, 1.05], [1.00, 0.95, 1.10], 0.05, 1.10 / 0.95 - 1, False),
        ([1.00, 1.00, 1.00], [1.00, 1.00, 1.00], 0.0, 0.0, False),
        ([1.00, 1.00, 1.00], [1.20, 1.20, 1.20], 1 / 1.2 - 1, 0.0, False),
    ],
)
def test_a_gain_counts_when_it_exceeds_the_difference_between_builds_of_one_graph(
    pruned: list[float], sparse: list[float], gain: float, spread: float, is_faster: bool
) -> None:
    found, _ = timed({"dense": [1.3] * 3, "pruned": pruned, "sparse": sparse})
    assert found.gain == pytest.approx(gain)
    assert found.spread == pytest.approx(spread)
    assert found.is_faster == is_faster
    assert found.p50_ms["pruned"] == pytest.approx([1000 * s for s in pruned])


def test_a_backend_without_sparse_kernels_is_never_faster_because_of_them() -> None:
    builds = {"dense": [1.3] * 3, "pruned": [1.1] * 3, "sparse": [1.0] * 3}
    assert timed(builds)[0].is_faster
    found, _ = timed(builds, "no sparse kernels")
    assert (found.is_faster, found.note) == (False, "no sparse kernels")


def test_runs_are_interleaved_in_rotating_order() -> None:
    _, log = timed({"dense": [1.0] * 3, "pruned": [1.0] * 3, "sparse": [1.0] * 3})
    rounds = [log[i : i + 9] for i in range(18, len(log), 9)]
    assert len(rounds) == 6
    assert all(sorted(r) == sorted(rounds[0]) for r in rounds)
    assert len({r[0] for r in rounds}) == 6


def test_three_builds_of_each_kind_are_written_and_read_back(tmp_path: Path) -> None:
    dense, pruned = net(tmp_path / "d.onnx", dense=True), net(tmp_path / "p.onnx", dense=False)
    made = build_three_way(describe_onnx(dense), describe_onnx(pruned), BuildOptions("onnxruntime"), tmp_path / "out")
    assert read_three_way(tmp_path / "out") == made
    assert {kind: len(builds) for kind, builds in made.items()} == dict.fromkeys(KINDS, 3)
    digests = {kind: {e.onnx_sha256 for e in builds} for kind, builds in made.items()}
    assert digests["pruned"] == digests["sparse"] != digests["dense"]


def test_a_rebuild_removes_all_old_engines_and_no_other_files(tmp_path: Path) -> None:
    out, model = tmp_path / "out", describe_onnx(net(tmp_path / "d.onnx", dense=True))
    build_three_way(model, model, BuildOptions("onnxruntime"), out, builds=4)
    plan(out / "dense.0.plan")
    others = {"dense.onnx": b"not ours", "sparse.fp16.onnx": b"nor this", "notes.txt": b"!"}
    for name, data in others.items():
        (out / name).write_bytes(data)
    pruned = describe_onnx(net(tmp_path / "p.onnx", dense=False))
    made = build_three_way(model, pruned, BuildOptions("onnxruntime"), out)
    engines = {f"{kind}.{number}.onnx" for kind in KINDS for number in range(3)}
    assert {p.name for p in out.iterdir()} == engines | {f"{name}.json" for name in engines} | set(others)
    assert {name: (out / name).read_bytes() for name in others} == others
    assert read_three_way(out) == made
    assert {e.onnx_sha256 for e in made["pruned"]} == {pruned.sha256}


def test_a_failed_build_keeps_the_old_engines(tmp_path: Path) -> None:
    out, model = tmp_path / "out", describe_onnx(net(tmp_path / "d.onnx", dense=True))
    made = build_three_way(model, model, BuildOptions("onnxruntime"), out)
    before = contents(out)
    (tmp_path / "bad.onnx").write_bytes((tmp_path / "d.onnx").read_bytes().replace(b"Conv", b"Vonc"))
    with pytest.raises(InputError, match="ONNX Runtime does not accept"):
        build_three_way(model, describe_onnx(tmp_path / "bad.onnx"), BuildOptions("onnxruntime"), out)
    assert contents(out) == before
    assert read_three_way(out) == made


# Builds by copying: the test is about how files are replaced.
COPYING_BUILDER = """
from maskplan.engines.build import BuildOptions
from maskplan.engines.sidecar import read_engine, sidecar_path
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.timing import three_way


def copy_engine(model, options, out):
    out.parent.mkdir(parents=True, exist_ok=True)
    source = Path({new_engines!r}) / out.name
    shutil.copy(sidecar_path(source), sidecar_path(out))
    shutil.copy(source, out)
    return read_engine(out)


three_way.build_engine = copy_engine
"""


def test_a_rebuild_killed_at_any_moment_leaves_no_mixture(tmp_path: Path) -> None:
    old, new = (net(tmp_path / f"{name}.onnx", dense=dense) for name, dense in (("old", True), ("new", False)))
    base, new_engines = tmp_path / "base", tmp_path / "new engines"
    for model, folder in ((old, base), (new, new_engines)):
        build_three_way(describe_onnx(model), describe_onnx(model), BuildOptions("onnxruntime"), folder)
    copies = killed(
        base,
        tmp_path / "copies",
        COPYING_BUILDER.format(new_engines=str(new_engines)),
        f"three_way.build_three_way(*[describe_onnx(Path({str(new)!r}))] * 2, BuildOptions('onnxruntime'), models)",
    )
    states = []
    for folder in copies:
        if len(list(folder.glob("*.onnx"))) < 9:
            with pytest.raises(InputError, match="3 engines of each kind are required"):
                read_three_way(folder)
            states.append("missing")
        else:
            states.extend({e.onnx_sha256 for builds in read_three_way(folder).values() for e in builds})
    assert [state for state, _ in itertools.groupby(states)] == [
        describe_onnx(old).sha256,
        "missing",
        describe_onnx(new).sha256,
    ]


def comparable(folder: Path, **changed: dict[str, Any]) -> Path:
    """Nine plans with sidecars; `changed` overrides sidecar fields by name."""
    graphs = {"dense": "d" * 64, "pruned": "p" * 64, "sparse": "p" * 64}
    for kind, digest in graphs.items():
        for number in range(3):
            values = {"onnx_sha256": digest, "sparse_weights": kind == "sparse", **changed.get(f"{kind}_{number}", {})}
            plan(folder / f"{kind}.{number}.plan", **values)
    return folder


def test_nine_plans_of_one_host_are_comparable(tmp_path: Path) -> None:
    found = read_three_way(comparable(tmp_path / "plans"))
    assert {kind: [e.path.name for e in builds] for kind, builds in found.items()} == {
        kind: [f"{kind}.{number}.plan" for number in range(3)] for kind in KINDS
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"onnx_sha256": "e" * 64}, "ONNX file sha256 eeeeeeeeeeee, others sha256 "),
        ({"precision": "fp32"}, "precision fp32, others fp16"),
        ({"runtime_version": "10.4.0"}, "runtime tensorrt 10.4.0, others tensorrt 10.3.0"),
        ({"device": "Another"}, r"device Another \(compute capability 9.0\), others GPU"),
        ({"compute_capability": "8.0"}, r"device GPU \(compute capability 8.0\), others GPU"),
        ({"profiles": (Profile(1, 8, 8), Profile(1, 1, 1))}, "profiles 1:8:8, 1:1:1, others 1:8:16"),
    ],
)
def test_every_incomparable_engine_is_named(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    odd = ("dense_0", "pruned_2", "sparse_1")
    folder = comparable(tmp_path / "plans", **dict.fromkeys(odd, changed))
    with pytest.raises(InputError, match="not comparable builds") as refused:
        read_three_way(folder)
    found = [line for line in str(refused.value).splitlines() if ".plan: " in line]
    assert len(found) == len(odd)
    for name, line in zip(odd, found, strict=True):
        assert re.search(rf"{name.replace('_', '.')}\.plan: {message}", line)


@pytest.mark.parametrize(("name", "flag"), [("dense_1", "on"), ("pruned_1", "on"), ("sparse_1", "off")])
def test_a_sparse_flag_that_contradicts_the_file_name_is_refused(name: str, flag: str, tmp_path: Path) -> None:
    folder = comparable(tmp_path / "plans", **{name: {"sparse_weights": flag == "on"}})
    with pytest.raises(InputError, match=rf"{name.replace('_', '.')}\.plan: sparse flag {flag}\n") as refused:
        read_three_way(folder)
    assert str(refused.value).count(".plan: ") == 1


def test_pruned_and_sparse_must_share_one_onnx_file(tmp_path: Path) -> None:
    other = {f"sparse_{number}": {"onnx_sha256": "e" * 64} for number in range(3)}
    with pytest.raises(InputError, match=r"sparse\.2\.plan: ONNX file sha256 eeeeeeeeeeee, others sha256 pppp"):
        read_three_way(comparable(tmp_path / "plans", **other))


def test_build_and_time_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, pruned = net(tmp_path / "d.onnx", dense=True), net(tmp_path / "p.onnx", dense=False)
    out, report = tmp_path / "out", tmp_path / "report.json"
    assert main(["build", str(pruned), "--three-way", str(dense), "-o", str(out), "--backend", "onnxruntime"]) == 0
    assert "9 engines" in capsys.readouterr().out
    assert main(["time", "--three-way", str(out), "--batch", "1,2", "--seconds", "0.1", "--report", str(report)]) == 0
    text = capsys.readouterr().out
    assert text.count("builds differ by") == 2
    # ONNX Runtime has no sparse kernels.
    assert text.endswith(f"{NO_SPARSE_KERNELS}\n")
    assert "sparse kernels +" not in text
    assert "sparse kernels -" not in text
    assert "gain:" not in text
    batches = json.loads(report.read_text())
    assert [b["batch"] for b in batches] == [1, 2]
    assert [(b["is_faster"], b["note"]) for b in batches] == [(False, NO_SPARSE_KERNELS)] * 2
    (out / "sparse.1.onnx").unlink()
    assert main(["time", "--three-way", str(out)]) == 3
    assert "sparse: 2" in capsys.readouterr().err
    assert main(["time"]) == 3


def test_with_tensorrt_the_gain_of_sparse_kernels_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tensorrt.install("10.3.0", fake_cuda.install(monkeypatch), monkeypatch)
    dense, pruned, out = net(tmp_path / "d.onnx", dense=True), net(tmp_path / "p.onnx", dense=False), tmp_path / "out"
    assert main(["build", str(pruned), "--three-way", str(dense), "-o", str(out), "--backend", "tensorrt"]) == 0
    capsys.readouterr()
    assert main(["time", "--three-way", str(out), "--batch", "1", "--seconds", "0.1"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"; sparse kernels [+-][\d.]+%, builds differ by [\d.]+%: (no gain|faster)", text)
    assert NO_SPARSE_KERNELS not in text


def test_too_few_builds_and_a_shared_timing_cache_are_refused(tmp_path: Path) -> None:
    model = describe_onnx(net(tmp_path / "d.onnx", dense=True))
    with pytest.raises(InputError, match="builds"):
        build_three_way(model, model, BuildOptions("onnxruntime"), tmp_path, builds=2)
    cached = BuildOptions("tensorrt", trt=TrtOptions(timing_cache=tmp_path / "cache"))
    with pytest.raises(InputError, match="show no spread"):
        build_three_way(model, model, cached, tmp_path)
