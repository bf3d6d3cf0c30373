"""Selection of the layers that stay in higher precision, so that quantizing the others keeps an accuracy budget."""

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
    """The mean KL divergence, in nats, of the outputs with only this layer quantized from those of the FP32 model."""

    name: str
    divergence: float


@dataclass(frozen=True)
class BudgetSelection:
    """The layers that a budget leaves in higher precision.

    Attributes:
        options: The given options, with these layers excluded.
        layers: Names of the layers, the most sensitive first; empty if all can be quantized.
        costs: Of every layer, the most sensitive first; empty if all can be quantized.
        drop: Points of top-1 that quantization costs on the images.
        images: Number of images.
    """

    options: PlaceOptions
    layers: tuple[str, ...]
    costs: tuple[LayerCost, ...]
    drop: float
    images: int


def select_by_budget(
    model: onnx.ModelProto,
    options: PlaceOptions,
    amax: Mapping[str, float],
    budget: float,
    images: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
) -> BudgetSelection:
    """Select layers to leave in higher precision, the most sensitive ones first, until a budget holds.

    A layer's cost is the divergence of the outputs when it alone is quantized. A binary search finds the number of
    layers. As the drop need not fall with every layer, a smaller number might do as well; the budget holds for the
    number returned.

    Args:
        model: FP32.
        options: What may be quantized.
        amax: Range of each tensor, including those that only other placements quantize (`placements_of`).
        budget: Allowed drop of top-1, in points.
        images: Preprocessed images (N, channels, H, W) of the `select` split; not of `val`, because they select.
        labels: Of the images, (N,).

    Raises:
        InputError: The budget does not hold even with a single layer quantized.
    """
    float_logits = logits_of(model, images)

    def drop(left: tuple[str, ...]) -> float:
        quantized = insert_qdq(model, place(model, _without(options, left)), amax)
        logits = logits_of(quantized, images)
        return 100 * float((float_logits.argmax(1) == labels).mean() - (logits.argmax(1) == labels).mean())

    first = drop(())
    if first <= budget:
        return BudgetSelection(options, (), (), first, len(images))
    names = [weight.node for weight in place(model, options).weights]
    costs = []
    for name in track(names, "sensitivity", len(names)):
        alone = tuple(other for other in names if other != name)
        quantized = insert_qdq(model, place(model, _without(options, alone)), amax)
        costs.append(LayerCost(name, divergence(float_logits, logits_of(quantized, images))))
    costs.sort(key=lambda cost: -cost.divergence)
    worst = [cost.name for cost in costs]
    drops = {0: first}
    low, high = 0, len(names) - 1
    drops[high] = drop(tuple(worst[:high]))
    if drops[high] > budget:
        raise InputError(
            "the budget does not hold even with one layer quantized",
            found=f"{drops[high]:.2f} points of top-1 on {len(images)} images; {budget:g} are allowed",
            fix="allow a larger drop, or use fp16",
        )
    while high - low > 1:
        middle = (low + high) // 2
        drops[middle] = drop(tuple(worst[:middle]))
        low, high = (low, middle) if drops[middle] <= budget else (middle, high)
    log.info("int8: %d of %d layers stay in higher precision: %s", high, len(names), ", ".join(worst[:high]))
    left = tuple(worst[:high])
    return BudgetSelection(_without(options, left), left, tuple(costs), drops[high], len(images))


def placements_of(model: onnx.ModelProto, options: PlaceOptions) -> Iterator[Placement]:
    """Placements whose tensors together include every tensor that any selection of layers quantizes.

    Which branch of an addition is quantized, and where a path of moved values begins, depends only on the adjacent layers.
    So excluding each layer, and quantizing each layer alone, covers every case.
    """
    names = [weight.node for weight in place(model, options).weights]
    for name in names if len(names) > 1 else ():
        yield place(model, _without(options, (name,)))
        yield place(model, _without(options, tuple(other for other in names if other != name)))


def divergence(reference: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """Mean KL divergence D(reference || other) of the class probabilities, in nats, from logits (N, classes)."""
    p, q = _log_softmax(reference), _log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    found: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


def _without(options: PlaceOptions, names: tuple[str, ...]) -> PlaceOptions:
    """The same options with these layers excluded too; special characters in their names are escaped."""
    return replace(options, exclude=(*options.exclude, *map(glob.escape, names)))
