"""Which layers to leave in higher precision, so that quantizing the rest costs no more than a budget."""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx

from maskplan.calibration.placement import Placement, PlaceOptions, place
from maskplan.calibration.qdq import insert_qdq
from maskplan.calibration.session import logits_of
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.progress import track

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerCost:
    """How far the outputs depart from the model's own when one layer alone is quantized: mean KL divergence, in nats."""

    name: str
    divergence: float


@dataclass(frozen=True)
class Kept:
    """What the budget came to.

    Attributes:
        options: What to place by: those given, with the layers to leave excluded.
        layers: Names of those left in higher precision, the worst first; empty where none need be.
        costs: Of every layer, the worst first; empty where quantizing all of them holds the budget.
        drop: Points of top-1 on the images judged by, against the model before.
        images: How many these are.
    """

    options: PlaceOptions
    layers: tuple[str, ...]
    costs: tuple[LayerCost, ...]
    drop: float
    images: int


def hold_budget(
    model: onnx.ModelProto,
    options: PlaceOptions,
    amax: Mapping[str, float],
    budget: float,
    images: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
) -> Kept:
    """Leave the fewest layers in higher precision, the most sensitive ones first, that hold a budget.

    A layer's cost is what quantizing it alone does to the outputs. How many of the costliest to leave is found by halving:
    the drop need not fall with every layer that is left, so fewer might do, but those that are named do.

    Args:
        model: FP32.
        options: What may be quantized.
        amax: Range of each tensor, also of those that only other placements quantize.
        budget: Points of top-1 that may be lost.
        images: Prepared images (N, channels, H, W) of the `select` part: they choose, so they must not be `val`.
        labels: Theirs (N,).

    Raises:
        InputError: With a single layer quantized the budget does not hold.
    """
    own = logits_of(model, images)

    def drop(left: tuple[str, ...]) -> float:
        quantized = insert_qdq(model, place(model, _without(options, left)), amax)
        found = logits_of(quantized, images)
        return 100 * float((own.argmax(1) == labels).mean() - (found.argmax(1) == labels).mean())

    first = drop(())
    if first <= budget:
        return Kept(options, (), (), first, len(images))
    names = [weight.node for weight in place(model, options).weights]
    costs = []
    for name in track(names, "sensitivity", len(names)):
        alone = tuple(other for other in names if other != name)
        quantized = insert_qdq(model, place(model, _without(options, alone)), amax)
        costs.append(LayerCost(name, divergence(own, logits_of(quantized, images))))
    costs.sort(key=lambda cost: -cost.divergence)
    worst = [cost.name for cost in costs]
    drops = {0: first}
    low, high = 0, len(names) - 1
    drops[high] = drop(tuple(worst[:high]))
    if drops[high] > budget:
        raise InputError(
            "the budget does not hold even with one layer quantized",
            found=f"{drops[high]:.2f} points of top-1 on {len(images)} images; {budget:g} are allowed",
            fix="allow more, or stay with fp16",
        )
    while high - low > 1:
        middle = (low + high) // 2
        drops[middle] = drop(tuple(worst[:middle]))
        low, high = (low, middle) if drops[middle] <= budget else (middle, high)
    log.info("int8: %d of %d layers stay in higher precision: %s", high, len(names), ", ".join(worst[:high]))
    left = tuple(worst[:high])
    return Kept(_without(options, left), left, tuple(costs), drops[high], len(images))


def placements_of(model: onnx.ModelProto, options: PlaceOptions) -> Iterator[Placement]:
    """Placements whose tensors, together, are all that any choice of layers quantizes.

    Which of two branches an addition quantizes, and where a path of moved values begins, follows from the layers next to
    it: each layer left out, and each one alone, show every case.
    """
    names = [weight.node for weight in place(model, options).weights]
    for name in names if len(names) > 1 else ():
        yield place(model, _without(options, (name,)))
        yield place(model, _without(options, tuple(other for other in names if other != name)))


def divergence(own: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """Mean KL divergence of the classes' probabilities, own against other, in nats; logits (N, classes) of both."""
    p, q = _log_softmax(own), _log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    found: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


def _without(options: PlaceOptions, names: tuple[str, ...]) -> PlaceOptions:
    """The same options, these layers left out as well, whatever characters their names hold."""
    return replace(options, exclude=(*options.exclude, *map(glob.escape, names)))
