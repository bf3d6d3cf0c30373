"""Layer-wise masks of a network, as the result or as what learning starts from."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Layer, Pattern, Preprocessing, Provenance
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.progress import track
from maskplan.pipeline.data.dataset import Dataset
from maskplan.pipeline.masking.layerwise import layerwise_mask
from maskplan.pipeline.models.layers import layer_modules, sample_input
from maskplan.pipeline.pruning.second_moments import MomentOptions, second_moments

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)


def layerwise_masks(
    module: nn.Module,
    provenance: Provenance,
    layers: Sequence[Layer],
    weights: Mapping[str, npt.NDArray[np.floating]],
    pattern: Pattern,
    images: int,
    seed: int,
    data: Dataset,
    device: str,
) -> dict[str, npt.NDArray[np.bool_]]:
    """Layer-wise masks, one layer at a time because second moments are large."""
    from maskplan.pipeline.models.device import choose_device

    moment_options = MomentOptions(images=images, seed=seed)
    network = copy.deepcopy(module).to(choose_device(device))
    moments = second_moments(network, layers, provenance.preprocessing, data.train, moment_options)
    return {
        layer.name: layerwise_mask(weights[layer.name], moment.effective, pattern, name=layer.name)
        for layer, moment in track(moments, "layer-wise masks", len(layers))
    }


def layerwise_start(
    module: nn.Module,
    provenance: Provenance,
    layers: Sequence[Layer],
    weights: Mapping[str, npt.NDArray[np.floating]],
    pattern: Pattern,
    images: int,
    seed: int,
    data: Dataset,
    device: str,
) -> dict[str, npt.NDArray[np.bool_]]:
    """Layer-wise masks of those layers that have any: of those whose inputs can be observed."""
    called = _called(module, provenance.preprocessing)
    observable = [layer for layer in layers if layer.name in called]
    try:
        masks = layerwise_masks(module, provenance, observable, weights, pattern, images, seed, data, device)
    except InputError as error:
        log.warning("learning starts from magnitude masks: %s: %s", error.what, error.found)
        return {}
    if len(observable) < len(layers):
        others = [layer.name for layer in layers if layer.name not in called]
        log.info("%d layers start from magnitude masks: %s", len(others), listed(others))
    return masks


def _called(module: nn.Module, preprocessing: Preprocessing) -> frozenset[str]:
    """Names of the weights whose layers the network calls; it may also use the weights of others."""
    import torch

    called: set[str] = set()
    layers = layer_modules(module)
    hooks = [layer.register_forward_hook(lambda *_, name=name: called.add(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            module.eval()(sample_input(preprocessing, 1).to(next(module.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return frozenset(called)
