"""Which layers' masks cost most accuracy, measured on the `select` part."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from torch import nn

from maskplan.pipeline.core.artifacts import Layer, Preprocessing
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
) -> frozenset[str]:
    """The layers to leave dense: in the order of what masking each alone costs, while their MACs fit the budget.

    Args:
        module: The dense model; it stays as it is.
        masks: By weight name.
        layers: Those of the masks.
        preprocessing: Preprocessing of the images.
        data: `train` for the statistics, `select` for the verdict.
        budget: Percent of the layers' MACs that may stay dense.
        options: How masks are judged.
    """
    judge = MaskEvaluator(module.eval(), preprocessing, data, options)
    none = judge({}).divergence
    costs = {
        layer.name: judge({layer.name: np.asarray(masks[layer.name])}).divergence - none
        for layer in track(layers, "cost of each mask", len(layers))
    }
    left = budget / 100 * sum(layer.macs for layer in layers)
    dense = set()
    for layer in sorted(layers, key=lambda layer: -costs[layer.name]):
        if layer.macs <= left:
            dense.add(layer.name)
            left -= layer.macs
            log.info("%s stays dense: its mask alone costs a divergence of %.4f", layer.name, costs[layer.name])
    return frozenset(dense)
