from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from maskplan.exporters.conformance import CheckOptions, check_2to4
from maskplan.exporters.prune import prune_model, prune_onnx
from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.errors import InputError

PATTERN = Pattern(2, 4)
STRICT = CheckOptions(strict=True)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def model_of(weights: dict[str, np.ndarray], nodes: list[onnx.NodeProto] | None = None) -> onnx.ModelProto:
    chain = nodes or [helper.make_node("Conv", ["x", name], [f"y_{name}"], name) for name in weights]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", chain[-1].output[0])]
    graph = helper.make_graph(chain, "g", ends[:1], ends[1:], tensors)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    )


def values(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def brute_force(weight: np.ndarray, axis: int) -> np.ndarray:
    """Sort each group, keep the two largest."""
    moved = np.moveaxis(weight.copy(), axis, -1)
    for index in np.ndindex(*moved.shape[:-1]):
        for start in range(0, moved.shape[-1], 4):
            group = moved[(*index, slice(start, start + 4))]
            group[np.argsort(-np.abs(group.astype(np.float64)), kind="stable")[2:]] = 0
    return np.moveaxis(moved, -1, axis)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int8])
def test_the_two_largest_of_each_group_stay(dtype: Any) -> None:
    weight = (noise(8, 16, 3, 3) * 20).astype(dtype)
    model = model_of({"w": weight})
    weights, changed, zeroed = prune_model(model, PATTERN)
    expected = brute_force(weight, 1)
    found = values(model)["w"]
    assert found.dtype == weight.dtype
    assert np.array_equal(found.astype(np.float64), expected.astype(np.float64))
    assert (weights, changed, zeroed) == (1, 1, int(((weight != 0) & (expected == 0)).sum()))
    assert check_2to4(model, STRICT).passed


def test_a_product_is_pruned_along_its_inner_axis() -> None:
    model = model_of({"b": noise(8, 12)}, [helper.make_node("MatMul", ["x", "b"], ["y"])])
    prune_model(model, PATTERN)
    assert np.array_equal(values(model)["b"], brute_force(noise(8, 12), 0))


def test_a_quantized_weight_is_pruned_to_its_zero_point() -> None:
    weight = np.random.default_rng(2).integers(0, 255, (4, 8, 1, 1), dtype=np.uint8)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["f"]),
        helper.make_node("Conv", ["x", "f"], ["y"]),
    ]
    model = model_of({"w": weight, "s": np.array(0.1, np.float32), "z": np.array(128, np.uint8)}, nodes)
    prune_model(model, PATTERN)
    pruned = values(model)["w"].astype(int).reshape(4, 2, 4)
    distance = np.abs(weight.astype(int).reshape(4, 2, 4) - 128)
    assert ((pruned == 128).sum(axis=-1) >= 2).all()
    assert (np.sort(np.abs(pruned - 128), axis=-1)[..., 2:] == np.sort(distance, axis=-1)[..., 2:]).all()


def test_a_conforming_file_stays_as_it_is(tmp_path: Path) -> None:
    path, again = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(model_of({"w": brute_force(noise(4, 8, 3, 3), 1)}), path)
    done = prune_onnx(path, again, PATTERN)
    assert (done.weights, done.changed, done.zeroed) == (1, 0, 0)
    assert again.read_bytes() == path.read_bytes()


def test_everything_but_the_weights_stays(tmp_path: Path) -> None:
    model = model_of({"w": noise(4, 8, 1, 1), "stem": noise(4, 3, 1, 1)})
    model.metadata_props.add(key="author", value="somebody")
    model.producer_name = "another tool"
    body = [helper.make_node("Relu", ["a"], ["b"])]
    model.functions.append(helper.make_function("own", "F", ["a"], ["b"], body, [helper.make_opsetid("", 20)]))
    path, out = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(model, path)
    prune_onnx(path, out, PATTERN)
    pruned = onnx.load(out)
    assert not np.array_equal(values(pruned)["w"], values(model)["w"])
    for both in (model, pruned):
        (weight,) = [t for t in both.graph.initializer if t.name == "w"]
        both.graph.initializer.remove(weight)
    assert pruned == model


@pytest.mark.parametrize("name", [None, "out/b.onnx", "new/and/below/b.onnx", "n" * 240 + ".onnx"])
def test_external_data_stays_external(tmp_path: Path, name: str | None) -> None:
    weights = {"a": noise(8, 64, 3, 3), "stem": noise(64, 3, 7, 7), "b": noise(16, 64, 1, 1)}
    path = tmp_path / "a.onnx"
    out = path if name is None else tmp_path / name
    onnx.save(model_of(weights), path, save_as_external_data=True, location="a.data", size_threshold=0)
    done = prune_onnx(path, out, PATTERN)
    assert (done.weights, done.changed) == (2, 2)
    assert out.stat().st_size < 2000
    found = values(onnx.load(out))
    assert np.array_equal(found["stem"], weights["stem"])
    for name in ("a", "b"):
        assert np.array_equal(found[name], brute_force(weights[name], 1))
    assert not [p for p in out.parent.iterdir() if p.name.startswith(".")]


def test_a_weight_used_along_two_axes_is_refused() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Gemm", ["h", "w"], ["y"], transB=1)]
    with pytest.raises(InputError, match="along two axes"):
        prune_model(model_of({"w": noise(8, 8)}, nodes), PATTERN)


def test_nothing_to_prune_is_an_error() -> None:
    with pytest.raises(InputError, match="no weight is eligible"):
        prune_model(model_of({"w": noise(8, 3, 1, 1)}), PATTERN)


def test_the_command_prunes_and_checks(cli: Callable[..., Any], tmp_path: Path) -> None:
    path, out = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(model_of({"w": noise(4, 8, 1, 1), "left": noise(4, 8, 1, 1)}), path)
    assert cli("check", path).code == 1
    ran = cli("prune", path, "-o", out, "--allow-dense", "le*")
    assert ran.code == 0
    assert "1 of 1 weights changed, 16 elements" in ran.out
    assert np.array_equal(values(onnx.load(out))["left"], noise(4, 8, 1, 1))
    assert cli("check", out, "--allow-dense", "left").code == 0
