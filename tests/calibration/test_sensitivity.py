"""Layers left in higher precision: which, how many, and that ranges are there for whatever is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper, parser

from maskplan.calibration.placement import PlaceOptions, place
from maskplan.calibration.qdq import insert_qdq
from maskplan.calibration.sensitivity import BudgetSelection, divergence, placements_of, select_by_budget
from maskplan.pipeline.core.errors import InputError

OUTLIER = 1000.0


def fragile(middle: str = "middle") -> onnx.ModelProto:
    """Two classes by the sign of a signal.

    The layer in the middle reads a channel of 1000 beside it, for which it has no weight: at a scale that reaches 1000 the
    signal, of about 1, rounds to 0.
    """
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["": 20]> g (float[n, 1, 2, 2] x) => (float[n, 2] y) {
        [first] a = Conv(x, w_first, b_first)
        [middle] b = Conv(a, w_middle)
        [second] c = Conv(b, w_second)
        [pool] d = GlobalAveragePool(c)
        [flat] e = Flatten(d)
        [last] y = Gemm(e, w_last) }"""
    )
    model.graph.node[1].name = middle  # which may hold what the parser takes for something else
    stored = {
        "w_first": np.array([1, 0], np.float32).reshape(2, 1, 1, 1),
        "b_first": np.array([0, OUTLIER], np.float32),
        "w_middle": np.array([[1, 0], [-0.5, 0]], np.float32).reshape(2, 2, 1, 1),
        "w_second": np.array([[1, -0.5], [0.25, 1]], np.float32).reshape(2, 2, 1, 1),
        "w_last": np.array([[1, -1], [-0.5, 0.5]], np.float32),
    }
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in stored.items())
    return model


def signals(count: int = 60) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    generator = np.random.default_rng(1)
    labels = np.arange(count) % 2
    sign = np.where(labels == 0, 1.0, -1.0)[:, None, None, None]
    return (sign * generator.uniform(0.5, 1.5, (count, 1, 2, 2))).astype(np.float32), labels


def minmax(run: Callable[..., dict[str, Any]], model: onnx.ModelProto, images: Any) -> dict[str, float]:
    tensors = [name for node in model.graph.node for name in node.output]
    return {name: float(np.abs(v).max()) for name, v in {"x": images, **run(model, images, tensors)}.items()}


def select(
    run: Callable[..., dict[str, Any]], model: onnx.ModelProto, budget: float, **options: Any
) -> BudgetSelection:
    images, labels = signals()
    return select_by_budget(model, PlaceOptions(**options), minmax(run, model, images), budget, images, labels)


@pytest.mark.parametrize("name", ["middle", "m[*]", "*", "a[b]?", "[!x]", "seco*"])
def test_the_most_sensitive_layer_is_excluded_whatever_its_name(run: Callable[..., dict[str, Any]], name: str) -> None:
    model = fragile(name)
    selection = select(run, model, 1.0)
    assert selection.layers == (name,)
    placement = place(model, selection.options)
    assert [w.node for w in placement.weights] == ["first", "second", "last"]
    assert [layer for layer, _ in placement.in_float] == [name]
    assert selection.costs[0].name == name
    assert sorted(cost.name for cost in selection.costs) == sorted(["first", name, "second", "last"])
    assert selection.costs[0].divergence > 10 * selection.costs[1].divergence
    assert selection.images == 60


def test_the_reported_drop_is_that_of_the_reported_placement(run: Callable[..., dict[str, Any]]) -> None:
    model, (images, labels) = fragile(), signals()
    amax = minmax(run, model, images)

    def top1(options: PlaceOptions) -> float:
        found = run(insert_qdq(model, place(model, options), amax), images)["y"]
        return 100 * float((found.argmax(1) == labels).mean())

    assert (run(model, images)["y"].argmax(1) == labels).all()
    selection = select(run, model, 1.0)
    assert selection.drop == pytest.approx(100 - top1(selection.options)) == pytest.approx(0)
    assert 100 - top1(PlaceOptions()) > 40, "quantized as a whole it is no better than chance"


def test_no_layer_is_excluded_if_the_budget_holds_at_once(run: Callable[..., dict[str, Any]]) -> None:
    selection = select(run, fragile(), 60.0)
    assert (selection.layers, selection.costs, selection.options) == ((), (), PlaceOptions())
    assert 40 < selection.drop <= 60


def test_what_the_user_excludes_stays_excluded(run: Callable[..., dict[str, Any]]) -> None:
    selection = select(run, fragile(), 1.0, exclude=("last",))
    assert selection.layers == ("middle",)
    assert selection.options.exclude[0] == "last"
    assert "last" not in [cost.name for cost in selection.costs]
    alone = select(run, fragile(), 1.0, exclude=("middle",))
    assert (alone.layers, alone.options.exclude) == ((), ("middle",))


@pytest.mark.parametrize("exclude", [(), ("first", "second", "last")], ids=["gain", "one layer"])
def test_a_budget_that_cannot_hold_is_an_error(run: Callable[..., dict[str, Any]], exclude: tuple[str, ...]) -> None:
    # A model that is always right can gain nothing; one whose only layer is the fragile one has nothing to leave.
    budget = -1.0 if not exclude else 1.0
    with pytest.raises(InputError, match="does not hold even with one layer quantized") as error:
        select(run, fragile(), budget, exclude=exclude)
    assert f"on 60 images; {budget:g} are allowed" in str(error.value.found)


def test_divergence_is_that_of_pytorch() -> None:
    generator = np.random.default_rng(0)
    own, other = (generator.normal(scale=5, size=(9, 4)).astype(np.float32) for _ in range(2))
    own[0] += 500  # far beyond what exp can take
    p, q = (torch.log_softmax(torch.from_numpy(a).double(), 1) for a in (own, other))
    wanted = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    assert divergence(own, other) == pytest.approx(float(wanted), rel=1e-9)
    assert divergence(own, own) == 0


@pytest.mark.parametrize("outputs", [False, True], ids=["inputs", "outputs too"])
def test_any_selection_of_layers_of_a_resnet_has_ranges(families: Callable[[str], Any], outputs: bool) -> None:
    model = families("resnet18").model
    options = PlaceOptions(quantize_outputs=outputs)
    whole = place(model, options)
    measured = {a.tensor for p in (whole, *placements_of(model, options)) for a in p.activations}
    names = [weight.node for weight in whole.weights]

    @settings(deadline=None, max_examples=40)
    @given(excluded=st.sets(st.sampled_from(names), max_size=len(names) - 1))
    def has_ranges(excluded: set[str]) -> None:
        placement = place(model, PlaceOptions(tuple(sorted(excluded)), outputs))
        assert {a.tensor for a in placement.activations} <= measured

    has_ranges()


def test_either_branch_of_an_addition_and_both_ends_of_a_pooling_have_ranges() -> None:
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["": 20]> g (float[n, 4, 8, 8] x) => (float y) {
        [left] a = Conv(x, w)  [right] b = Conv(x, w)  [add] c = Add(a, b)
        [pool] d = MaxPool<kernel_shape = [2, 2]>(c)  [one] e = Conv(d, w)  [two] f = Conv(d, w)  [sub] y = Sub(e, f) }"""
    )
    model.graph.initializer.append(numpy_helper.from_array(np.ones((4, 4, 1, 1), np.float32), "w"))
    whole = {a.tensor for a in place(model).activations}
    found = {a.tensor for p in placements_of(model, PlaceOptions()) for a in p.activations}
    assert whole == {"x", "a", "c", "d"}
    assert found == {"x", "a", "b", "c", "d"}
