"""Layer-wise masks of a network, as the result or as what learning starts from."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Layer, Pattern, Preprocessing
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.progress import track
from maskplan.pipeline.data.dataset import Split
from maskplan.pipeline.masking.layerwise import layerwise_mask
from maskplan.pipeline.models.layers import layer_modules, outputs_of
from maskplan.pipeline.pruning.second_moments import MomentOptions, UnusableInputsError, second_moments

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)


Masks = dict[str, npt.NDArray[np.bool_]]
"""By the name of the weight."""


def layerwise_masks(
    module: nn.Module,
    layers: Sequence[Layer],
    preprocessing: Preprocessing,
    train: Split,
    pattern: Pattern,
    options: MomentOptions,
    device: str,
) -> Masks:
    """Layer-wise masks, one layer at a time because second moments are large."""
    from maskplan.pipeline.models.device import choose_device

    state = module.state_dict()
    network = copy.deepcopy(module).to(choose_device(device))
    moments = second_moments(network, layers, preprocessing, train, options)
    return {
        layer.name: layerwise_mask(
            state[layer.name].detach().cpu().float().numpy(), moment.effective, pattern, name=layer.name
        )
        for layer, moment in track(moments, "layer-wise masks", len(layers))
    }


def layerwise_start(
    module: nn.Module,
    layers: Sequence[Layer],
    preprocessing: Preprocessing,
    choose: Callable[[Sequence[Layer]], Masks],
) -> Masks:
    """Masks of those layers whose inputs can be observed; a network may use the weights of others without calling them.

    Args:
        module: The dense network.
        layers: All layers to mask.
        preprocessing: Preprocessing of the images.
        choose: Gives the layer-wise masks of some layers; those that it cannot use are left out.
    """
    called = outputs_of(module, layer_modules(module), preprocessing)
    usable, masks = [layer for layer in layers if layer.name in called], Masks()
    while usable:
        try:
            masks = choose(usable)
            break
        except UnusableInputsError as error:
            usable = [layer for layer in usable if layer.name not in error.names]
        except InputError as error:
            log.warning("learning starts from magnitude masks: %s: %s", error.what, error.found)
            break
    others = [layer.name for layer in layers if layer.name not in masks]
    if others:
        log.info("%d layers start from magnitude masks: %s", len(others), listed(others))
    return masks
