"""Q/DQ on graphs of two layers: arithmetic to the last integer, weights stored in unusual ways, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from qdq_graphs import Array, Read, accumulate, two_layers

from maskplan.calibration.placement import Placement, PlaceOptions, place
from maskplan.calibration.qdq import insert_qdq
from maskplan.pipeline.core.errors import InputError

Run = Callable[..., dict[str, Array]]


def check_integers(
    model: onnx.ModelProto, x: Array, amax: dict[str, float], sums: Callable[[Array, Array], Array], run: Run
) -> Array:
    """The integers that the second layer reads, by ONNX Runtime with and without its fusions, and by NumPy."""
    result = insert_qdq(model, place(model), amax)
    stored = Read(result).stored
    w, scales = stored["w"], stored["w_scale"].astype(np.float64)
    x_scale, a_scale = np.float64(stored["x_scale"]), np.float64(stored["a_scale"])
    integers = np.clip(np.rint(x / np.float32(x_scale)), -128, 127).astype(np.int8)
    total = sums(integers, w)
    to_floats = x_scale * scales.reshape((-1, 1, 1) if w.ndim == 4 else -1)
    bias = stored["b"].reshape((-1, 1, 1)) if "b" in stored else np.float64(0)
    lowest = 0 if any(node.op_type == "Relu" for node in model.graph.node) else -math.inf
    for optimize in (False, True):
        # With its fusions ONNX Runtime adds the bias as an integer, in units of the sum; without, as it is.
        exact = (total + np.rint(bias / to_floats)) * to_floats if optimize else total * to_floats + bias
        expected = np.clip(np.rint(np.maximum(exact, lowest) / a_scale), -128, 127).astype(np.int8)
        found = run(result, x, ["x_quantized", "a_quantized"], optimize=optimize)
        np.testing.assert_array_equal(found["x_quantized"], integers)
        np.testing.assert_array_equal(found["a_quantized"], expected)
    # Not all at the ends, where any arithmetic would agree.
    assert len(np.unique(expected)) > 20
    return expected


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("shape", "geometry"),
    [
        ((8, 8, 3, 3), {"stride": 1, "pad": 1, "group": 1}),
        ((6, 8, 1, 1), {"stride": 2, "pad": 0, "group": 1}),
        ((8, 2, 3, 3), {"stride": 2, "pad": 1, "group": 4}),
        ((8, 1, 5, 5), {"stride": 1, "pad": 2, "group": 8}),
    ],
)
def test_a_convolution_agrees_with_integer_arithmetic(
    shape: tuple[int, ...], geometry: dict[str, int], biased: bool, relu: bool, run: Run
) -> None:
    generator = np.random.default_rng(7)
    w = generator.normal(0, 0.2, shape)
    w[:, ::2] = 0 if shape[1] > 2 else w[:, ::2]
    x = generator.normal(size=(2, 8, 9, 9)).astype(np.float32)
    stride, pad, group = geometry.values()
    bias = generator.normal(size=shape[0]) if biased else None
    model = two_layers(w, x.shape, bias, relu, strides=[stride] * 2, pads=[pad] * 4, group=group)
    amax = {"x": 2.5, "a": 3.1}
    check_integers(model, x, amax, lambda q, w: accumulate(q, w, **geometry), run)


def test_a_matrix_product_agrees_with_integer_arithmetic(run: Run) -> None:
    generator = np.random.default_rng(8)
    x = generator.normal(size=(5, 16)).astype(np.float32)
    model = two_layers(generator.normal(0, 0.2, (16, 12)), x.shape)
    product = check_integers(model, x, {"x": 2.5, "a": 2.0}, lambda q, w: q.astype(np.int64) @ w, run)
    assert product.shape == (5, 12)


def test_ties_round_to_even_as_onnx_runtime_rounds_them(run: Run) -> None:
    # Scales are powers of two, so sums are exact and every odd one is a tie.
    w = np.full((4, 4, 1, 1), 1.0)
    w[:, 0] = 127
    generator = np.random.default_rng(9)
    x = generator.integers(-1, 2, (1, 4, 16, 16)).astype(np.float32)
    x[:, 1:] = generator.integers(-20, 21, (1, 3, 16, 16))
    found = check_integers(two_layers(w, x.shape), x, {"x": 127.0, "a": 254.0}, accumulate, run)
    sums = accumulate(x, w)
    assert ((sums % 2 == 1) & (np.abs(sums) < 254)).sum() > 100
    assert (found[(sums % 2 == 1) & (np.abs(sums) < 254)] % 2 == 0).all()


def test_zero_and_tiny_channels_give_sound_outputs(run: Run) -> None:
    w = np.random.default_rng(3).normal(0, 0.2, (6, 4, 3, 3))
    w[1], w[2] = 0, w[2] * 1e-7
    model = two_layers(w, (1, 4, 8, 8))
    result = insert_qdq(model, place(model), {"x": 1e-9, "a": 0.0})
    stored = Read(result).stored
    for name in ("w_scale", "x_scale", "a_scale"):
        assert (stored[name].astype(np.float16) >= np.finfo(np.float16).smallest_normal).all()
        assert np.isfinite(stored[name].astype(np.float16)).all()
    assert not stored["w"][1:3].any()
    assert np.isfinite(run(result, np.ones((1, 4, 8, 8), np.float32))["y"]).all()


def test_a_weight_with_other_readers_keeps_a_float_copy(run: Run) -> None:
    model = two_layers(np.random.default_rng(4).normal(0, 0.2, (8, 8, 3, 3)), (1, 8, 9, 9))
    model.graph.node[1].input[1] = "w"
    x = np.random.default_rng(5).normal(size=(1, 8, 9, 9)).astype(np.float32)
    expected = run(model, x, ["a"])
    amax = {"x": 4.0, "a": float(np.abs(expected["a"]).max())}
    shared = Read(insert_qdq(model, place(model), amax))
    assert len([n for n in shared.ops("DequantizeLinear") if n.input[0] == "w"]) == 2
    assert "w_float" not in shared.stored
    result = insert_qdq(model, place(model, PlaceOptions(("second",))), amax)
    graph = Read(result)
    assert graph.ops("Conv")[1].input[:] == ["a", "w_float"]
    np.testing.assert_array_equal(graph.stored["w_float"], Read(model).stored["w"])
    assert np.linalg.norm(run(result, x)["y"] - expected["y"]) < 0.05 * np.linalg.norm(expected["y"])


def test_a_weight_in_a_constant_node_or_among_the_inputs_becomes_int8(run: Run) -> None:
    model = two_layers(np.random.default_rng(4).normal(0, 0.2, (8, 8, 3, 3)), (1, 8, 9, 9))
    x = np.random.default_rng(5).normal(size=(1, 8, 9, 9)).astype(np.float32)
    expected = run(insert_qdq(model, place(model), {"x": 3.0, "a": 3.0}), x)["y"]
    first = model.graph.initializer[0]
    constant = helper.make_node("Constant", [], ["w"], value=first)
    nodes = [constant, *model.graph.node]
    del model.graph.node[:], model.graph.initializer[0]
    model.graph.node.extend(nodes)
    model.graph.input.append(helper.make_tensor_value_info("v", TensorProto.FLOAT, (4, 8, 1, 1)))
    # Names that ours must not collide with.
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0), "x_scale"))
    result = insert_qdq(model, place(model), {"x": 3.0, "a": 3.0})
    onnx.checker.check_model(result, full_check=True)
    assert [value.name for value in result.graph.input] == ["x"]
    assert not Read(result).ops("Constant")
    assert Read(result).stored["w"].dtype == Read(result).stored["v"].dtype == np.int8
    assert Read(result).stored["x_scale"] == 0
    np.testing.assert_array_equal(run(result, x)["y"], expected)


def test_an_older_opset_that_has_per_channel_scales_works(run: Run) -> None:
    model = two_layers(np.random.default_rng(4).normal(0, 0.2, (8, 8, 3, 3)), (1, 8, 9, 9), opset=13)
    result = insert_qdq(model, place(model), {"x": 3.0, "a": 3.0})
    onnx.checker.check_model(result, full_check=True)
    assert result.opset_import[0].version == 13
    assert run(result, np.ones((1, 8, 9, 9), np.float32))["y"].shape == (1, 4, 7, 7)


def test_what_cannot_be_quantized_is_refused_with_all_offenders() -> None:
    w = np.random.default_rng(4).normal(0, 0.2, (8, 8, 3, 3))
    model = two_layers(w, (1, 8, 9, 9))
    placement = place(model)
    with pytest.raises(InputError, match="no range") as error:
        insert_qdq(model, placement, {"z": 1.0})
    assert error.value.found == "x, a"
    with pytest.raises(InputError, match=r"x: nan(?s:.)*a: inf"):
        insert_qdq(model, placement, {"x": float("nan"), "a": float("inf")})
    w[0, 0, 0, 0] = np.nan
    broken = two_layers(w, (1, 8, 9, 9))
    with pytest.raises(InputError, match="w: nan"):
        insert_qdq(broken, placement, {"x": 1.0, "a": 1.0})
    result = insert_qdq(model, placement, {"x": 1.0, "a": 1.0})
    for again in (lambda: place(result), lambda: insert_qdq(result, placement, {"x": 1.0, "a": 1.0})):
        with pytest.raises(InputError, match="already quantized"):
            again()
    with pytest.raises(InputError, match="opset 12"):
        insert_qdq(two_layers(w, (1, 8, 9, 9), opset=12), Placement((), (), ()), {})
