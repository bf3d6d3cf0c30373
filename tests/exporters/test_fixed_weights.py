"""Weights that are tables stay dense, each with its reason; trained and random ones never count as tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from maskplan.exporters.conformance import CheckOptions, check_2to4
from maskplan.exporters.prune import prune_model
from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.errors import InputError

Array = npt.NDArray[Any]
STRICT = CheckOptions(strict=True)


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model_of(table: Array, *between: onnx.NodeProto, weight: str = "table", constant: bool = False) -> onnx.ModelProto:
    """A trained convolution, then one with the table as its weight."""
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"], "/body/Conv"), *between]
    nodes.append(helper.make_node("Conv", ["a", weight], ["y"], "/head/table/Conv"))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    tensors = {"w": noise(64, 16, 3, 3), "table": table}
    if constant:
        nodes.insert(
            0, helper.make_node("Constant", [], ["table"], value=numpy_helper.from_array(tensors.pop("table")))
        )
    initializers = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def stored(model: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


BINS = np.arange(16, dtype=np.float32).reshape(1, 16, 1, 1)
SIDE = np.linspace(-1, 1, 8, dtype=np.float32)
GRID = np.stack([np.tile(SIDE, 8), np.repeat(SIDE, 8)] * 2)[:, :, None, None]
BLUR = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]).astype(np.float32) / 256
SOBEL = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], np.float32)
COSINES = np.cos(np.pi * (2 * np.arange(8)[None] + 1) * np.arange(8)[:, None] / 16).astype(np.float32)
TABLES = {
    "bins of a box head": (BINS, "fewer_than_4_outputs"),
    "bins, four at once": (np.repeat(BINS, 4, 0), "fixed_table"),
    "bins in FP16": (np.repeat(BINS, 4, 0).astype(np.float16), "fixed_table"),
    "bins as a fraction, reversed": (np.repeat(1 - BINS / 15, 5, 0), "fixed_table"),
    "coordinates of a grid": (GRID, "fixed_table"),
    "powers of two": (np.repeat(2.0 ** np.arange(8, dtype=np.float32).reshape(1, 8, 1, 1), 4, 0), "fixed_table"),
    "cosines": (COSINES[:, :, None, None], "fixed_table"),
    "mean of a window over all channels": (
        np.float32(1 / 72) * noise(4, 1, 1, 1) * np.ones((4, 8, 3, 3), np.float32),
        "fixed_table",
    ),
    "binomial blur with a gain for each channel": (noise(8, 8, 1, 1) * BLUR, "fixed_table"),
    "edges in four directions": (
        np.stack([np.broadcast_to(k, (8, 3, 3)) for k in (SOBEL, SOBEL.T, -SOBEL, -SOBEL.T)]),
        "fixed_table",
    ),
    "a trained score": (noise(1, 16, 3, 3), "fewer_than_4_outputs"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_stays_dense_with_its_reason(name: str) -> None:
    table, reason = TABLES[name]
    model = model_of(table)
    assert prune_model(model, Pattern(2, 4))[0] == 1
    assert np.array_equal(stored(model)["table"], table)
    report = check_2to4(model, STRICT)
    assert report.passed
    assert [(w.name, w.verdict, w.reason) for w in report.weights] == [
        ("w", "conforming", None),
        ("table", "dense_by_choice", reason),
    ]


def test_a_table_is_known_behind_nodes_and_in_a_constant_node_and_as_integers() -> None:
    four = np.repeat(BINS, 4, 0)
    cast = helper.make_node("Cast", ["table"], ["t"], to=TensorProto.FLOAT)
    turned = helper.make_node("Transpose", ["table"], ["t"], perm=[3, 2, 0, 1])
    rounded = np.rint(four / 15 * 127).astype(np.int8)
    scaled = helper.make_node("DequantizeLinear", ["table", "s"], ["t"])
    for model in (
        model_of(four.astype(np.float16), cast, weight="t"),
        model_of(np.ascontiguousarray(BINS.transpose(2, 3, 1, 0)), turned, weight="t"),
        model_of(four, constant=True),
        model_of(rounded, scaled, weight="t"),
    ):
        model.graph.initializer.append(numpy_helper.from_array(np.array(15 / 127, np.float32), "s"))
        before = stored(model).get("table")
        assert prune_model(model, Pattern(2, 4))[0] == 1
        assert before is None or np.array_equal(stored(model)["table"], before)
        assert check_2to4(model, STRICT).passed


TRAINED = {
    "random": noise(8, 16, 3, 3),
    "random, few channels": noise(4, 4, 1, 1),
    "FP16": noise(8, 8, 1, 1).astype(np.float16),
    "a ternary network": np.sign(np.rint(noise(8, 16, 3, 3))),
    "a binary network": np.sign(noise(8, 16, 3, 3)),
    "four bits": np.rint(noise(8, 16, 1, 1) * 3).astype(np.float32) * np.float32(0.07),
    "small steps from a mean": 1 + noise(8, 16, 1, 1) * np.float32(1e-3),
    "one spatial shape for each output": noise(8, 16, 1, 1) * noise(8, 1, 3, 3, seed=1),
    "1 x 1 in a frame of 3 x 3": np.pad(noise(8, 16, 1, 1), ((0, 0), (0, 0), (1, 1), (1, 1))),
    "constant at first": np.ones((8, 8, 1, 1), np.float32),
    "a table but for one value": np.repeat(BINS, 4, 0) + np.eye(4, 16, dtype=np.float32)[:, :, None, None],
}


@pytest.mark.parametrize("name", TRAINED)
def test_other_weights_are_pruned(name: str) -> None:
    model = model_of(TRAINED[name])
    assert prune_model(model, Pattern(2, 4))[0] == 2
    assert check_2to4(model, STRICT).conforming == 2


def test_a_listed_table_must_conform() -> None:
    """Whoever masked it asked for it."""
    report = check_2to4(model_of(np.repeat(BINS, 4, 0)), CheckOptions(masked=("table",)))
    assert (report.verdict, report.weights[1].verdict) == ("fail", "violating")


@pytest.mark.parametrize("pattern", ["/head/*", "/head/table/Conv", "table", "[t]able"])
def test_patterns_match_nodes_and_weights(pattern: str) -> None:
    model = model_of(noise(8, 16, 1, 1))
    assert prune_model(model, Pattern(2, 4), (pattern,))[0] == 1
    assert np.array_equal(stored(model)["table"], noise(8, 16, 1, 1))
    assert check_2to4(model, CheckOptions(strict=True, allow_dense=(pattern,))).passed
    assert not check_2to4(model, STRICT).passed


def test_a_pattern_that_matches_nothing_is_an_error_that_names_what_is_similar() -> None:
    model = model_of(noise(8, 16, 1, 1))
    before = model.SerializeToString()
    for call in (
        lambda: prune_model(model, Pattern(2, 4), ("table", "/head/tble/Conv")),
        lambda: check_2to4(model, CheckOptions(allow_dense=("table", "/head/tble/Conv"))),
    ):
        with pytest.raises(InputError, match=r"(?s)found: /head/tble/Conv\n.*did you mean '/head/table/Conv'"):
            call()
    assert model.SerializeToString() == before
