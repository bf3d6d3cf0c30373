"""The check beside Polygraphy's own: the same verdicts where that is right, and the right ones where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from polygraphy.tools.sparse import SparsityPruner

from maskplan.engines.base import quiet_polygraphy
from maskplan.exporters.conformance import CheckOptions, check_2to4
from maskplan.pipeline.core.choices import CONFORMING, FAIL, INELIGIBLE, VIOLATING

Array = npt.NDArray[Any]
GRAPHS = 240


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quiet_polygraphy()


def model_of(nodes: Sequence[onnx.NodeProto], tensors: dict[str, Array]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def sparse_along(generator: np.random.Generator, shape: tuple[int, ...], axis: int) -> Array:
    """Random numbers with exactly two zeros in every group of four along an axis; a rest that is no group is dense."""
    values = generator.choice([-1.0, 1.0], shape) * generator.uniform(0.25, 4, shape)
    rows = np.moveaxis(values, axis, -1)
    whole = rows.shape[-1] // 4 * 4
    ranks = generator.random((*rows.shape[:-1], whole // 4, 4)).argsort(axis=-1)
    rows[..., :whole] *= (ranks < 2).reshape(*rows.shape[:-1], whole)
    return values


class Drawn:
    """One graph at random, of operators and layouts that Polygraphy judges rightly."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, Array] = {}
        for i in range(self.generator.integers(1, 6)):
            getattr(self, self.generator.choice(["conv", "gemm", "matmul", "left_matmul"]))(f"w{i}")
        self.model = model_of(self.nodes, self.tensors)

    def pick(self, *values: int) -> int:
        return int(self.generator.choice(values))

    def store(self, name: str, shape: tuple[int, ...], axis: int) -> str:
        """A weight as the operator sees it; stored behind a Transpose or a Cast now and then."""
        kind = self.generator.choice(["sparse", "one more", "dense", "other axis"])
        value = sparse_along(self.generator, shape, axis)
        if kind == "dense":
            value = np.where(value == 0, 1.0, value)
        elif kind == "one more" and (value == 0).any():
            value[tuple(self.generator.choice(np.argwhere(value == 0)))] = -0.5
        elif kind == "other axis":
            value = sparse_along(self.generator, shape, self.pick(*range(len(shape))))
        value[value == 0] *= self.pick(1, -1)
        tensor = name
        if self.generator.random() < 0.3:
            # A swap of two axes: of longer cycles Polygraphy takes the wrong axis.
            perm = np.arange(len(shape))
            first, second = self.generator.choice(len(shape), 2, replace=False)
            perm[[first, second]] = perm[[second, first]]
            value = value.transpose(perm)
            self.nodes.append(helper.make_node("Transpose", [tensor], [f"{name}_t"], perm=perm.tolist()))
            tensor = f"{name}_t"
        if self.generator.random() < 0.3:
            value = value.astype(np.float16)
            self.nodes.append(helper.make_node("Cast", [tensor], [f"{name}_c"], to=TensorProto.FLOAT))
            tensor = f"{name}_c"
        self.tensors[name] = value if value.dtype == np.float16 else value.astype(np.float32)
        return tensor

    def conv(self, name: str) -> None:
        kernel = [self.pick(1, 2, 3, 5) for _ in range(self.pick(1, 2, 2, 3))]
        # Four outputs or more: the check lets smaller ones stay dense.
        shape = (self.pick(4, 5, 6), self.pick(3, 4, 8, 10, 12), *kernel)
        weight = self.store(name, shape, axis=1)
        self.nodes.append(helper.make_node("Conv", ["x", weight], [f"{name}_y"], f"node_{name}"))

    def gemm(self, name: str) -> None:
        flag = self.pick(0, 1)
        shape = (self.pick(3, 5), self.pick(4, 6, 8, 16))
        weight = self.store(name, shape if flag else shape[::-1], axis=flag)
        more = {"transA": 1} if self.pick(0, 1) else {}
        self.nodes.append(helper.make_node("Gemm", ["x", weight], [f"{name}_y"], f"node_{name}", transB=flag, **more))

    def matmul(self, name: str) -> None:
        weight = self.store(name, (self.pick(4, 7, 12), self.pick(3, 4)), axis=0)
        self.nodes.append(helper.make_node("MatMul", ["x", weight], [f"{name}_y"], f"node_{name}"))

    def left_matmul(self, name: str) -> None:
        weight = self.store(name, (self.pick(3, 4), self.pick(4, 7, 12)), axis=1)
        self.nodes.append(helper.make_node("MatMul", [weight, "x"], [f"{name}_y"], f"node_{name}"))


def theirs(model: onnx.ModelProto) -> dict[str, str]:
    """Polygraphy's verdict on every weight that it judges."""
    judged = [info.name for info in SparsityPruner(model)._walk_nodes()]
    pruner = SparsityPruner(model)
    # Its largest double overflows when it is compared with a half.
    with np.errstate(over="ignore"):
        pruner.check()
    return {name: CONFORMING if name in pruner.sparse_tensors else VIOLATING for name in judged}


def ours(model: onnx.ModelProto) -> dict[str, str]:
    return {w.name: w.verdict for w in check_2to4(model, CheckOptions(strict=True)).weights}


def test_both_judge_every_weight_alike() -> None:
    seen: dict[str, int] = {}
    for seed in range(GRAPHS):
        model = Drawn(seed).model
        mine = ours(model)
        assert {n: v for n, v in mine.items() if v != INELIGIBLE} == theirs(model), f"seed {seed}"
        assert set(mine) == {t.name for t in model.graph.initializer}
        for verdict in mine.values():
            seen[verdict] = seen.get(verdict, 0) + 1
    assert min(seen[CONFORMING], seen[VIOLATING], seen[INELIGIBLE]) > 80


# --- where it is wrong


def conv(weight: str = "w", **attributes: int) -> onnx.NodeProto:
    return helper.make_node("Conv", ["x", weight], ["y"], "conv", **attributes)


def dense(*shape: int) -> Array:
    return np.ones(shape, np.float32)


def halved(*shape: int, axis: int) -> Array:
    return sparse_along(np.random.default_rng(0), shape, axis).astype(np.float32)


def test_a_grouped_convolution_is_no_candidate() -> None:
    """TensorRT has no sparse kernels for groups, however the zeros lie."""
    model = model_of([conv(group=2)], {"w": halved(8, 4, 3, 3, axis=1)})
    assert theirs(model) == {"w": CONFORMING}
    (weight,) = check_2to4(model).weights
    assert (weight.verdict, weight.reason) == (INELIGIBLE, "grouped")


def test_a_transpose_is_followed_the_right_way() -> None:
    """Output axis i of a Transpose is input axis perm[i]; Polygraphy looks for i in perm, which is the inverse."""
    perm = (1, 2, 0, 3)
    nodes = [helper.make_node("Transpose", ["w"], ["t"], perm=perm), conv("t")]
    good, bad = (halved(8, 8, 8, 3, axis=axis) for axis in (1, 2))
    for weight, right, wrong in ((good, CONFORMING, VIOLATING), (bad, VIOLATING, CONFORMING)):
        model = model_of(nodes, {"w": weight.transpose(np.argsort(perm))})
        assert ours(model) == {"w": right}
        assert theirs(model) == {"w": wrong}


def test_a_batch_of_matrices_reduces_along_its_last_axis_but_one() -> None:
    """Polygraphy takes the first axis of the right operand, and the second of the left one, whatever the rank."""
    right = halved(4, 8, 6, axis=1)
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": right})
    assert (theirs(model), ours(model)) == ({"w": VIOLATING}, {"w": CONFORMING})
    wrong = halved(4, 8, 6, axis=0)
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": wrong})
    assert (theirs(model), ours(model)) == ({"w": CONFORMING}, {"w": VIOLATING})
    left = halved(4, 8, 12, axis=2)
    model = model_of([helper.make_node("MatMul", ["w", "x"], ["y"])], {"w": left})
    assert (theirs(model), ours(model)) == ({"w": VIOLATING}, {"w": CONFORMING})


def test_a_weight_in_a_constant_node_is_seen() -> None:
    node = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(dense(4, 8, 3, 3)))
    model = model_of([node, conv()], {})
    assert theirs(model) == {}
    assert ours(model) == {"w": VIOLATING}


@pytest.mark.parametrize(("dtype", "zero"), [(np.int8, 0), (np.uint8, 128)])
def test_a_quantized_weight_is_judged_by_its_zero_point(dtype: type, zero: int) -> None:
    """Polygraphy skips it and passes."""
    scale = {"s": np.array(0.1, np.float32), "z": np.array(zero, dtype)}
    nodes = [helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"]), conv("d")]
    values = (halved(8, 8, 3, 3, axis=1) * 10 + zero).astype(dtype)
    good, bad = (model_of(nodes, {"w": v, **scale}) for v in (values, np.full_like(values, zero + 1)))
    assert theirs(good) == theirs(bad) == {}
    assert (ours(good), ours(bad)) == ({"w": CONFORMING}, {"w": VIOLATING})


def test_bfloat16_is_judged_at_every_position() -> None:
    """Polygraphy's loop over bytes looks at the same positions again and again."""
    values = dense(4, 8, 3, 3)
    values[:, :, 0, 0] = halved(4, 8, axis=1)
    model = model_of([conv()], {"w": values.astype(ml_dtypes.bfloat16)})
    assert ours(model) == {"w": VIOLATING}
    good = model_of([conv()], {"w": halved(4, 8, 3, 3, axis=1).astype(ml_dtypes.bfloat16)})
    assert ours(good) == {"w": CONFORMING}
    assert theirs(good) == {"w": VIOLATING}


def test_nan_is_a_non_zero_like_any_other() -> None:
    """Two non-zeros in a group, one of them NaN: Polygraphy's minimum of a list that begins with NaN is NaN."""
    values = dense(4, 4, 1, 1)
    values[:, :, 0, 0] = (np.nan, 0, 0, 1)
    assert theirs(model_of([conv()], {"w": values})) == {"w": VIOLATING}
    assert ours(model_of([conv()], {"w": values})) == {"w": CONFORMING}
    values[0, 1] = 1
    assert ours(model_of([conv()], {"w": values})) == {"w": VIOLATING}


def test_a_weight_used_along_two_axes_is_judged_along_both() -> None:
    """Polygraphy remembers the last use."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "first"),
        helper.make_node("Gemm", ["a", "w"], ["y"], "second", transB=1),
    ]
    model = model_of(nodes, {"w": halved(8, 8, axis=1)})
    assert theirs(model) == {"w": CONFORMING}
    verdicts = {w.node: w.verdict for w in check_2to4(model).weights}
    assert verdicts == {"first": VIOLATING, "second": CONFORMING}
    assert check_2to4(model).verdict == FAIL


def test_a_reshaped_weight_is_followed() -> None:
    nodes = [helper.make_node("Reshape", ["w", "shape"], ["r"]), conv("r")]
    model = model_of(nodes, {"w": dense(4, 8), "shape": np.array([4, 8, 1, 1])})
    assert theirs(model) == {}
    assert ours(model) == {"w": VIOLATING}


def test_a_transposed_convolution_is_reported() -> None:
    model = model_of([helper.make_node("ConvTranspose", ["x", "w"], ["y"])], {"w": dense(8, 4, 3, 3)})
    assert theirs(model) == {}
    assert set(ours(model)) == {"w"}


def test_a_mask_that_was_not_baked_is_reported() -> None:
    nodes = [helper.make_node("Mul", ["w", "mask"], ["masked"]), conv("masked")]
    model = model_of(nodes, {"w": dense(4, 8, 3, 3), "mask": (halved(4, 8, 3, 3, axis=1) != 0).astype(np.float32)})
    assert theirs(model) == {}
    report = check_2to4(model)
    assert report.verdict == FAIL
    assert any("mask" in f"{w.reason} {w.hint}" for w in report.weights)


def test_nothing_to_judge_is_no_pass() -> None:
    model = model_of([conv()], {"w": dense(4, 3, 3, 3)})
    assert theirs(model) == {}
    assert check_2to4(model).verdict == FAIL
