"""Graphs that a plain conversion to FP16 breaks: valid files, and outputs as in FP32 on random and constant images."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import pytest
from fp16_graphs import FLOAT, Array, constant, model_of, node, noise, run, tensors_of
from fp16_hostile_graphs import (
    GRAPHS,
    batchnorm,
    clip_to_the_largest_float,
    f32,
    masked_softmax,
    windows_counted_in_floats,
)

from maskplan.exporters.precision import convert_to_fp16, to_fp16
from maskplan.pipeline.core.errors import InputError


def images(model: onnx.ModelProto) -> list[Array]:
    batch = 1 if model.graph.input[0].type.tensor_type.shape.dim[0].dim_value else 3
    shape = (batch, 8, 4, 4)
    pixel = np.zeros(shape, np.float32)
    pixel[..., 2, 2] = 1
    noises = [np.random.default_rng(seed).normal(size=shape).astype(np.float32) for seed in range(8)]
    return [np.zeros(shape, np.float32), np.ones(shape, np.float32), pixel, *noises]


@pytest.mark.parametrize("name", GRAPHS)
def test_outputs_are_those_of_fp32(name: str) -> None:
    model = GRAPHS[name]()
    half = convert_to_fp16(model).model
    if len(half.opset_import) == 1:
        onnx.shape_inference.infer_shapes(half, check_type=True, strict_mode=True, data_prop=True)
    for x in images(model):
        for optimized in (True, False):
            for expected, found in zip(run(model, x), run(half, x, optimized=optimized), strict=True):
                assert found.dtype == expected.dtype
                assert found.shape == expected.shape
                largest = max(float(np.abs(expected).max(initial=0)), 1e-3)
                assert np.allclose(found, expected, rtol=0, atol=1e-2 * largest)


def test_constants_are_clamped_where_that_is_exact_and_nothing_stays_fp32() -> None:
    half = convert_to_fp16(clip_to_the_largest_float())
    assert not half.in_fp32
    assert len(half.changed) == 3
    values = tensors_of(half.model)
    assert sorted(values[name].item() for name in values if "clamped" in name) == [-65504, 65504, 65504]
    half = convert_to_fp16(masked_softmax())
    assert not half.in_fp32
    assert float(min(value.min() for value in tensors_of(half.model).values())) == -16384


def test_a_mask_that_another_node_reads_is_not_clamped() -> None:
    nodes = [node("Add", ["x", "mask"], "a"), node("Softmax", ["a"], "s"), node("Add", ["s", "a"])]
    half = convert_to_fp16(model_of(nodes, {"mask": f32(0, 0, 0, -1e9)}))
    assert not half.changed
    assert "reads mask: exceeds FP16 with 1e+09" in half.in_fp32["a"]


@pytest.mark.parametrize(
    ("op", "inputs", "value"),
    [("Max", ["x", "k"], 1e9), ("Min", ["x", "k"], -1e9), ("Add", ["x", "k"], -1e9), ("Clip", ["x", "", "k"], -1e9)],
)
def test_a_bound_that_has_an_effect_is_not_clamped(op: str, inputs: list[str], value: float) -> None:
    half = convert_to_fp16(model_of([node(op, inputs)], {"k": np.float32(value)}))
    assert not half.changed
    assert list(half.in_fp32) == ["y"]


def test_a_batchnorm_is_folded_only_where_its_constants_do_not_fit() -> None:
    half = convert_to_fp16(batchnorm(1e6))
    assert [n.op_type for n in half.model.graph.node] == ["Cast", "Conv", "Relu", "Conv", "Cast"]
    assert half.changed == ("n is folded into the convolution before it",)
    assert not half.in_fp32
    assert {value.dtype for value in tensors_of(half.model).values()} == {np.dtype(np.float16)}
    assert "BatchNormalization" in {n.op_type for n in convert_to_fp16(batchnorm(1.0)).model.graph.node}


def test_a_batchnorm_that_cannot_be_folded_stays_fp32() -> None:
    model = batchnorm(1e6)
    model.graph.output.append(onnx.helper.make_tensor_value_info("c", FLOAT, None))
    half = convert_to_fp16(model)
    assert half.in_fp32["n"] == "BatchNormalization, reads var: exceeds FP16 with 1e+06"
    for x in images(model):
        for expected, found in zip(run(model, x), run(half.model, x), strict=True):
            assert np.allclose(found, expected, rtol=1e-2, atol=1e-2 * np.abs(expected).max())


def test_every_batch_size_gives_the_right_shape_where_windows_are_counted_in_floats() -> None:
    model = windows_counted_in_floats()
    half = convert_to_fp16(model)
    assert {"sf", "m", "q", "fl"} <= set(half.in_fp32)
    for batch in (1, 7, 45, 83, 255):
        x = np.ones((batch, 8, 4, 4), np.float32)
        assert run(half.model, x)[0].shape == run(model, x)[0].shape == (batch, 4, 4, 8)


def test_weights_with_small_elements_beside_large_ones_are_half() -> None:
    weight = noise(8, 8, 1, 1)
    weight[0] = 1e-9
    half = convert_to_fp16(model_of([node("Conv", ["x", "w", "b"])], {"w": weight, "b": np.full(8, 1e-9, np.float32)}))
    assert not half.in_fp32


def test_the_layers_around_an_island_are_half() -> None:
    half = convert_to_fp16(GRAPHS["normalized_by_max"]())
    assert set(half.in_fp32) == {"f", "norm", "m", "d"}
    values = tensors_of(half.model)
    assert values["w"].dtype == values["h"].dtype == np.float16
    assert values["eps"].dtype == np.float32


def layers() -> onnx.ModelProto:
    nodes = [
        onnx.helper.make_node("Conv", ["x", "stem.weight"], ["a"], "/stem/Conv"),
        onnx.helper.make_node("Sigmoid", ["a"], ["b"], "/stem/Sigmoid"),
        onnx.helper.make_node("Conv", ["b", "head.weight"], ["y"], "/head/Conv"),
    ]
    return model_of(nodes, {"stem.weight": noise(8, 8, 1, 1), "head.weight": noise(8, 8, 1, 1)})


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("/head/*", {"/head/Conv"}),
        ("head.weight", {"/head/Conv"}),
        ("/stem/Conv", {"/stem/Conv"}),
        ("b", {"/stem/Sigmoid", "/head/Conv"}),
        ("*/Conv", {"/stem/Conv", "/head/Conv"}),
    ],
)
def test_patterns_keep_nodes_and_tensors_in_fp32(pattern: str, kept: set[str]) -> None:
    half = convert_to_fp16(layers(), keep_patterns=[pattern])
    assert set(half.in_fp32) == kept
    values = tensors_of(half.model)
    for name, weight in (("/stem/Conv", "stem.weight"), ("/head/Conv", "head.weight")):
        assert values[weight].dtype == (np.float32 if name in kept else np.float16)
    x = noise(2, 8, 4, 4)
    assert np.allclose(run(half.model, x)[0], run(layers(), x)[0], atol=1e-2)


def test_patterns_that_match_nothing_are_refused_and_named() -> None:
    with pytest.raises(InputError, match="match no node and no tensor") as caught:
        to_fp16(layers(), keep_patterns=["/head/*", "layer9*", "/Head/*"])
    assert "'layer9*', '/Head/*'" in str(caught.value)


def test_what_stays_fp32_and_what_was_changed_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "maskplan"):
        to_fp16(batchnorm(1e6))
        to_fp16(model_of([constant("k", f32(1e-12)), node("Max", ["x", "k"])]))
    assert "changed for FP16: n is folded into the convolution before it" in caplog.text
    assert "nodes that stay FP32: y (Max, reads k: 1e-12 is 0 in FP16)" in caplog.text
