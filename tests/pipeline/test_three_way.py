"""Three kinds of engine, several builds of each: what is built, and when a gain counts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.base import Arrays, Classifier
from engines.build import BuildOptions
from engines.trt.options import TrtOptions
from exporters.metadata import describe_onnx
from pipeline.artifacts import TensorSpec
from pipeline.cli.app import main
from pipeline.errors import InputError
from pipeline.in_turn import TimeOptions
from pipeline.three_way import KINDS, build_three_way, read_three_way, time_three_way


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
    """Seconds, which pass only while an engine runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow:
    """An engine that takes as long as told, in turn."""

    inputs = (TensorSpec("x", "float32", (None, 3, 8, 8)),)
    outputs = (TensorSpec("y", "float32", (None, 5)),)
    spent = None

    def __init__(self, clock: Clock, seconds: Iterator[float], log: list[str], name: str) -> None:
        self._clock, self._seconds, self._log, self._name = clock, seconds, log, name

    def infer(self, feeds: Arrays) -> dict[str, npt.NDArray[np.float32]]:
        self._clock.now += next(self._seconds)
        self._log.append(self._name)
        return {"y": np.zeros((len(feeds["x"]), 5), np.float32)}

    def close(self) -> None: ...


def timed(builds: dict[str, list[float]]) -> tuple[object, list[str]]:
    """The verdict on engines that take so many seconds, and the order they ran in."""
    clock, log = Clock(), list[str]()
    engines = {
        kind: [Classifier(Slow(clock, itertools.repeat(s), log, f"{kind}{i}"), kind) for i, s in enumerate(seconds)]
        for kind, seconds in builds.items()
    }
    (found,) = time_three_way(engines, TimeOptions((2,), seconds=0.0, least=6), clock)
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
def test_a_gain_counts_when_it_exceeds_what_builds_of_one_graph_differ_by(
    pruned: list[float], sparse: list[float], gain: float, spread: float, is_faster: bool
) -> None:
    found, _ = timed({"dense": [1.3] * 3, "pruned": pruned, "sparse": sparse})
    assert found.gain == pytest.approx(gain)
    assert found.spread == pytest.approx(spread)
    assert found.is_faster == is_faster
    assert found.p50_ms["pruned"] == pytest.approx([1000 * s for s in pruned])


def test_engines_run_in_turn_and_none_always_after_the_same_other() -> None:
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


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, pruned = net(tmp_path / "d.onnx", dense=True), net(tmp_path / "p.onnx", dense=False)
    out, report = tmp_path / "out", tmp_path / "report.json"
    assert main(["build", str(pruned), "--three-way", str(dense), "-o", str(out), "--backend", "onnxruntime"]) == 0
    assert "9 engines" in capsys.readouterr().out
    assert main(["time", "--three-way", str(out), "--batch", "1,2", "--seconds", "0.1", "--report", str(report)]) == 0
    assert capsys.readouterr().out.count("builds differ by") == 2
    assert [b["batch"] for b in json.loads(report.read_text())] == [1, 2]
    (out / "sparse.1.onnx").unlink()
    assert main(["time", "--three-way", str(out)]) == 3
    assert "sparse: 2" in capsys.readouterr().err
    assert main(["time"]) == 3


def test_too_few_builds_and_shared_measurements_are_refused(tmp_path: Path) -> None:
    model = describe_onnx(net(tmp_path / "d.onnx", dense=True))
    with pytest.raises(InputError, match="builds"):
        build_three_way(model, model, BuildOptions("onnxruntime"), tmp_path, builds=2)
    cached = BuildOptions("tensorrt", trt=TrtOptions(timing_cache=tmp_path / "cache"))
    with pytest.raises(InputError, match="show no spread"):
        build_three_way(model, model, cached, tmp_path)
