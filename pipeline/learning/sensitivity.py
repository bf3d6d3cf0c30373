"""Which layers lose most by being masked, measured on the `select` part."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from torch import nn

from maskplan.pipeline.core.artifacts import Layer, OutputKind, Preprocessing
from maskplan.pipeline.core.progress import track
from maskplan.pipeline.data.dataset import Dataset
from maskplan.pipeline.learning.evaluate import MaskEvaluator
from maskplan.pipeline.learning.options import LearnOptions

log = logging.getLogger(__name__)


def costliest_layers(
    module: nn.Module,
    masks: Mapping[str, npt.NDArray[np.bool_]],
    layers: Sequence[Layer],
    preprocessing: Preprocessing,
    data: Dataset,
    budget: float,
    options: LearnOptions,
    kinds: Sequence[OutputKind] = (),
) -> frozenset[str]:
    """The weights to leave dense: those whose mask alone costs most, costliest first, as long as their MACs fit the budget.

    Args:
        module: The dense model; it is not changed.
        masks: Bool masks by weight name.
        layers: The masked layers.
        preprocessing: Preprocessing of the images.
        data: `train` for BatchNorm statistics, `select` for the evaluation.
        budget: Percent of the layers' MACs that may stay dense.
        options: How masks are evaluated.
        kinds: What the network returns; empty for a classifier.

    Returns:
        Weight names.
    """
    evaluate = MaskEvaluator(module.eval(), preprocessing, data, options, kinds)
    unmasked = evaluate({}).loss
    costs = {
        layer.name: evaluate({layer.name: np.asarray(masks[layer.name])}).loss - unmasked
        for layer in track(layers, "cost of each mask", len(layers))
    }
    remaining = budget / 100 * sum(layer.macs for layer in layers)
    dense = set()
    for layer in sorted(layers, key=lambda layer: -costs[layer.name]):
        if layer.macs <= remaining:
            dense.add(layer.name)
            remaining -= layer.macs
            log.info("%s stays dense: its mask alone costs %.4f on select", layer.name, costs[layer.name])
    return frozenset(dense)
