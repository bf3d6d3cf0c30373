"""Matching the layers of two graphs: without names, with misleading names, with folded BatchNormalization."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from residual_net import (
    LAYERS,
    Array,
    assert_all_the_same,
    by_node,
    edited,
    residual_net,
    run,
    spoilt,
    weights,
)

from maskplan.pipeline.core.errors import InputError


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return residual_net(tmp_path / "dense.onnx", weights())


def renamed(model: onnx.ModelProto, *, keep_weights: bool = False) -> None:
    """No node names, and other names for all tensors."""
    stored = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        node.name = ""
        for names in (node.input, node.output):
            names[:] = [n if keep_weights and n in stored else f"t.{n}" for n in names]
    for value in (*model.graph.input, *model.graph.output, *([] if keep_weights else model.graph.initializer)):
        value.name = f"t.{value.name}"


@pytest.mark.parametrize("keep_weights", [True, False])
def test_without_node_names_layers_match_by_weights_and_inputs(keep_weights: bool, dense: Path, tmp_path: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        renamed(model, keep_weights=keep_weights)
        # One more activation than the dense graph has: counting would not do.
        model.graph.node[-1].input[0] = "extra"
        model.graph.node.insert(len(model.graph.node) - 1, helper.make_node("Relu", ["t.flatten.out"], ["extra"]))

    report = run(dense, edited(dense, tmp_path / "other.onnx", edit))
    assert report.unmatched == ("extra",)
    assert_all_the_same(replace(report, unmatched=()), most=0)


def test_layers_with_other_inputs_match_by_order(dense: Path, tmp_path: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        renamed(model)
        # Everything now reads a doubled image.
        model.graph.node[0].input[0] = "doubled"
        model.graph.node.insert(0, helper.make_node("Add", ["t.input", "t.input"], ["doubled"]))

    report = run(dense, edited(dense, tmp_path / "other.onnx", edit), tolerance=0.5)
    assert report.first == "stem"
    assert [layer.node for layer in report.layers] == [node.name for node in onnx.load(dense).graph.node]
    assert [layer.relative for layer in report.layers] == pytest.approx([1] * len(LAYERS), abs=1e-5)
    assert report.unmatched == ("doubled",)


def test_a_weight_name_takes_precedence_over_a_node_name(dense: Path, tmp_path: Path) -> None:
    """Exporters that number their nodes call other layers by the same names in other graphs."""

    def edit(model: onnx.ModelProto) -> None:
        nodes = {node.name: node for node in model.graph.node}
        nodes["one.a"].name, nodes["one.b"].name = "one.b", "one.a"

    assert_all_the_same(run(dense, edited(dense, tmp_path / "other.onnx", edit)), most=0)


def insert(model: onnx.ModelProto, before: str, *nodes: onnx.NodeProto) -> None:
    """Put nodes where the graph has one of this name."""
    at = next(n for n, node in enumerate(model.graph.node) if node.name == before)
    for node in reversed(nodes):
        model.graph.node.insert(at, node)


def test_a_layer_with_a_new_input_matches_by_name(dense: Path, tmp_path: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        model.graph.node[1].input[0] = "n.out"
        model.graph.node[-1].input[0] = "e.out"
        insert(model, "head", helper.make_node("Relu", ["flatten.out"], ["e.out"], "e"))
        negations = ("Neg", ["stem.out"], ["m.out"], "m"), ("Neg", ["m.out"], ["n.out"], "n")
        insert(model, "stem.relu", *(helper.make_node(*negation) for negation in negations))

    report = run(dense, edited(dense, tmp_path / "other.onnx", edit))
    assert report.unmatched == ("m", "n", "e")
    assert_all_the_same(replace(report, unmatched=()), most=0)


def test_layers_of_different_ops_do_not_match(dense: Path, tmp_path: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        assert model.graph.node[1].name == "stem.relu"
        model.graph.node[1].op_type = "Abs"

    report = run(dense, edited(dense, tmp_path / "other.onnx", edit), tolerance=0.1)
    assert report.unmatched == ("stem.relu", "stem.relu")
    assert report.first == "one.a"


def test_layers_with_equal_inputs_match_by_name(dense: Path, tmp_path: Path) -> None:
    def edit(model: onnx.ModelProto, order: int) -> None:
        pools = [
            helper.make_node(
                "AveragePool", ["stem.relu.out"], [f"{name}.out"], name, kernel_shape=[k, k], pads=[k // 2] * 4
            )
            for name, k in (("p3", 3), ("p5", 5))
        ]
        insert(model, "head", *pools[::order])

    one, two = (edited(dense, tmp_path / f"{n}.onnx", lambda model, n=n: edit(model, n)) for n in (1, -1))  # type: ignore[misc]
    assert_all_the_same(run(one, two), [*LAYERS, "p3", "p5"], most=0)


def test_order_is_ignored_if_the_numbers_of_layers_differ(dense: Path, tmp_path: Path) -> None:
    def other(model: onnx.ModelProto) -> None:
        renamed(model)
        model.graph.node[0].input[0] = "doubled"
        model.graph.node.insert(0, helper.make_node("Add", ["t.input", "t.input"], ["doubled"]))

    more = edited(
        dense,
        tmp_path / "more.onnx",
        lambda model: insert(model, "stem", helper.make_node("Relu", ["input"], ["more.out"], "more")),
    )
    report = run(more, edited(dense, tmp_path / "other.onnx", other))
    # The convolutions are as many, and what reads them is known by them.
    assert [layer.node for layer in report.layers] == [node.name for node in onnx.load(dense).graph.node]
    assert report.unmatched == ("more", "doubled")


def batchnorm_folded() -> dict[str, Array]:
    """The weights of the net without BatchNormalization that computes the same."""
    tensors = weights()
    for name, value in tensors.items():
        if name != "head":
            tensors[name] = value * np.linspace(0.5, 1.5, len(value)).astype(np.float32)[:, None, None, None]
    return tensors


def test_a_folded_batchnorm_is_compared_by_its_normalized_output(tmp_path: Path) -> None:
    unfolded = residual_net(tmp_path / "unfolded.onnx", weights(), norm=True)
    folded = residual_net(tmp_path / "folded.onnx", batchnorm_folded())
    for pair in ((unfolded, folded), (folded, unfolded)):
        assert_all_the_same(run(*pair))
    # Where both have it, it is a layer like any other.
    report = run(unfolded, unfolded)
    assert "one.a.bn" in by_node(report)
    assert len(report.layers) == len(LAYERS) + 6
    bad = residual_net(tmp_path / "bad.onnx", spoilt(batchnorm_folded(), "two.b", 0, 1000.0))
    assert run(unfolded, bad).first == "two.b"


def test_renumbered_node_names_do_not_mislead(tmp_path: Path) -> None:
    """With BatchNormalization in one graph only, the numbers of all other nodes move on."""

    def number(model: onnx.ModelProto) -> None:
        for n, node in enumerate(model.graph.node):
            node.name = f"{node.op_type}_{n // 2}" if node.op_type == "Relu" else f"node_{n}"

    unfolded = residual_net(tmp_path / "unfolded.onnx", weights(), norm=True)
    folded = residual_net(tmp_path / "folded.onnx", batchnorm_folded())
    pair = [edited(path, path.with_suffix(".numbered.onnx"), number) for path in (unfolded, folded)]
    names = [{node.name for node in onnx.load(path).graph.node} for path in pair]
    assert len([name for name in names[0] & names[1] if name.startswith("Relu")]) >= 2
    report = run(*pair)
    assert len(report.layers) == len(LAYERS)
    assert max(layer.relative for layer in report.layers) < 1e-5
    assert report.unmatched == ()


def test_models_without_a_common_layer_are_refused(dense: Path, tmp_path: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        del model.graph.node[:], model.graph.initializer[:]
        model.graph.node.append(helper.make_node("Flatten", ["input"], ["f"], "f"))
        model.graph.node.append(helper.make_node("MatMul", ["f", "w"], ["logits"], "m"))
        model.graph.initializer.append(numpy_helper.from_array(np.ones((192, 5), np.float32), "w"))

    with pytest.raises(InputError, match="no layer in common"):
        run(dense, edited(dense, tmp_path / "other.onnx", edit))
