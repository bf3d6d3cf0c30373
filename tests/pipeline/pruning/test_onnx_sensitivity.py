"""What each mask of an ONNX file costs alone, against pruning every layer for itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from any_network import save_net, weights
from onnx import helper

from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.core.artifacts import OutputKind
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.samples import TensorSamples
from maskplan.pipeline.pruning.onnx_sensitivity import LayerCost, layer_costs, within_budget
from maskplan.pipeline.pruning.prune_layerwise import LayerwiseOptions, LayerwisePruned, prune_layerwise

NAMES = ("w1", "w2", "w3")


def two_headed(path: Path) -> Path:
    """Logits of pixels, and values; the layers differ in their multiplications, and only one has a bias."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "stem", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Conv", ["b", "w2", "b2"], ["classes"], "classes", pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["b"], ["c"], "pool"),
        helper.make_node("Flatten", ["c"], ["d"], "flatten"),
        helper.make_node("Gemm", ["d", "w3"], ["values"], "values", transB=1),
    ]
    tensors = {
        "w1": weights(16, 4, 3, 3),
        "w2": 3 * weights(5, 16, 3, 3, seed=1),
        "b2": weights(5),
        "w3": weights(8, 16),
    }
    return save_net(path, nodes, tensors, {"x": ["N", 4, 8, 8]}, {"classes": ["N", 5, 8, 8], "values": ["N", 8]})


def samples(count: int = 12) -> TensorSamples:
    images = np.random.default_rng(3).standard_normal((count, 4, 8, 8)).astype(np.float32)
    return TensorSamples("train", {"x": images}, {})


def prune(path: Path, out: Path, kinds: tuple[OutputKind, ...] = (), **options: Any) -> LayerwisePruned:
    return prune_layerwise(path, out, describe_onnx(path).inputs, samples(), LayerwiseOptions(**options), kinds)


def outputs(path: Path) -> list[Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [o.astype(np.float64) for o in session.run(None, {"x": samples().arrays["x"]})]


def expected_cost(dense: list[Any], other: list[Any]) -> float:
    """As documented: KL divergence for a pixel, relative squared error, and their mean."""
    p, q = (np.exp(v) / np.exp(v).sum(axis=1, keepdims=True) for v in (dense[0], other[0]))
    divergence = (p * np.log(p / q)).sum(axis=1).mean()
    return float((divergence + ((dense[1] - other[1]) ** 2).sum() / (dense[1] ** 2).sum()) / 2)


@pytest.mark.parametrize("update", [False, True])
def test_the_cost_of_a_mask_is_that_of_the_file_with_only_this_mask(update: bool, tmp_path: Path) -> None:
    path = two_headed(tmp_path / "m.onnx")
    done = prune(path, tmp_path / "all.onnx", update=update, sensitivity=True)
    assert [layer.name for layer in done.costs] == list(NAMES)
    dense = outputs(path)
    for layer in done.costs:
        others = tuple(name for name in NAMES if name != layer.name)
        prune(path, tmp_path / "one.onnx", update=update, allow_dense=others)
        assert layer.cost == pytest.approx(expected_cost(dense, outputs(tmp_path / "one.onnx")), rel=1e-4)
    macs = np.array([16 * 4 * 9 * 64, 5 * 16 * 9 * 64, 8 * 16])
    np.testing.assert_allclose([layer.macs_percent for layer in done.costs], 100 * macs / macs.sum(), rtol=0.01)
    # Measuring leaves no trace in the result.
    prune(path, tmp_path / "plain.onnx", update=update)
    assert (tmp_path / "all.onnx").read_bytes() == (tmp_path / "plain.onnx").read_bytes()


def test_the_kinds_of_outputs_decide_what_costs(tmp_path: Path) -> None:
    path = two_headed(tmp_path / "m.onnx")
    kinds = (OutputKind("classes", "values"), OutputKind("values", "values"))
    done = prune(path, tmp_path / "all.onnx", kinds, sensitivity=True)
    dense = outputs(path)
    prune(path, tmp_path / "one.onnx", allow_dense=("w1", "w3"))
    other = outputs(tmp_path / "one.onnx")
    errors = [((a - b) ** 2).sum() / (a**2).sum() for a, b in zip(dense, other, strict=True)]
    assert done.costs[1].cost == pytest.approx(np.mean(errors), rel=1e-4)


def test_the_costliest_layers_that_fit_the_budget_stay_dense(tmp_path: Path) -> None:
    path = two_headed(tmp_path / "m.onnx")
    costs = prune(path, tmp_path / "all.onnx", sensitivity=True).costs
    costliest = max(costs, key=lambda layer: layer.cost)
    done = prune(path, tmp_path / "some.onnx", keep_dense_budget=costliest.macs_percent + 0.01)
    assert done.kept_dense[0] == costliest.name
    assert {layer.name for layer in done.layers} == set(NAMES) - set(done.kept_dense)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    kept = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "some.onnx").graph.initializer}
    for name in NAMES:
        assert np.array_equal(stored[name], kept[name]) == (name in done.kept_dense)


def test_a_budget_is_filled_from_the_costliest_down() -> None:
    costs = (LayerCost("a", 0.1, 40.0), LayerCost("b", 0.9, 30.0), LayerCost("c", 0.5, 25.0), LayerCost("d", 0.2, 5.0))
    assert within_budget(costs, 36) == ("b", "d")
    assert within_budget(costs, 56) == ("b", "c")
    assert within_budget(costs, 100) == ("b", "c", "d", "a")
    assert within_budget(costs, 0) == ()


def test_outputs_whose_size_depends_on_values_cannot_be_judged(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["a"], "first", transB=1),
        helper.make_node("Greater", ["a", "limit"], ["b"], "above"),
        helper.make_node("NonZero", ["b"], ["c"], "places"),
        helper.make_node("Cast", ["c"], ["y"], "to_float", to=1),
    ]
    tensors = {"w": weights(8, 4), "limit": np.float32(0.7)}
    path = save_net(tmp_path / "m.onnx", nodes, tensors, {"x": ["N", 4]}, {"y": [2, None]})
    drawn = TensorSamples("train", {"x": np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)}, {})
    options = LayerwiseOptions(sensitivity=True)
    with pytest.raises(InputError, match="the size of the output 'y' depends on its values"):
        prune_layerwise(path, tmp_path / "out.onnx", describe_onnx(path).inputs, drawn, options)


def test_a_sample_that_cannot_be_read_is_named_as_it_is(tmp_path: Path) -> None:
    class Damaged(TensorSamples):
        def batches(self, size: int) -> Iterator[dict[str, Any]]:
            raise InputError("cannot read an image", where="7.png")

    path = two_headed(tmp_path / "m.onnx")
    kinds = (OutputKind("classes", "logits"), OutputKind("values", "values"))
    with pytest.raises(InputError, match="cannot read an image"):
        layer_costs(onnx.load(path), tmp_path, [], Damaged("train", samples().arrays, {}), kinds, path)


def test_the_command_lists_costs_and_how_to_check_the_file(cli: Callable[..., Any], tmp_path: Path) -> None:
    path = two_headed(tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", **samples().arrays)
    out = tmp_path / "sparse.onnx"
    ran = cli("prune", path, "--data", tmp_path / "data.npz", "--keep-dense-budget", "50", "-o", out)
    assert ran.code == 0, ran.err
    assert "costliest masks, each alone:" in ran.out
    assert ": stays dense" in ran.out
    hint = ran.out.partition("check the file with ")[2].partition("\n")[0].split()
    assert cli("check", out, "--strict", *hint).code == 0
    assert cli("check", out, "--strict").code == 1
    ran = cli("prune", path, "--keep-dense-budget", "50", "-o", out)
    assert ran.code == 3
    assert "--keep-dense-budget" in ran.err
