"""The bake stage: applies masks to weights and writes a pruned checkpoint. The weights may be newer than the masks."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from maskplan.pipeline.core.artifacts import Checkpoint, MaskSet, Provenance, merge_image_sets
from maskplan.pipeline.core.choices import CHANNEL
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.masking.maskset import load_masks
from maskplan.pipeline.models.checkpoint import save_checkpoint
from maskplan.pipeline.models.state_dict import tensors_sha256

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)


def bake(module: nn.Module, provenance: Provenance, masks: MaskSet, out: Path) -> Checkpoint:
    """Set the weights that the masks drop to +0.0 and write the pruned checkpoint; `module` is not changed.

    Args:
        module: The model with the weights to prune: those that the masks were made for, or newer ones.
        provenance: Of these weights.
        masks: Masks that were checked against the model (from `read_masks` or `write_masks`).
        out: The checkpoint to write.

    Raises:
        InputError: The masks have a layout that cannot be deployed.
    """
    if masks.layout != CHANNEL:
        raise InputError(
            f"masks in the layout {masks.layout!r} cannot be deployed",
            where=masks.path,
            found="groups along the flattened C*R*S axis",
            fix="TensorRT takes groups along C: make the masks with layout 'channel'",
        )
    if masks.weights_sha256 and masks.weights_sha256 != tensors_sha256(module.state_dict()):
        log.warning("the masks were made for other weights of %s; applying them to these", masks.model)
        if masks.permutation not in (None, provenance.permutation):
            log.warning(
                "the masks are for permuted channels: unless these weights were trained from permuted ones, first permute"
                " them with `maskplan permute --permutation FILE`"
            )
        elif masks.permutation != provenance.permutation:
            log.warning("the weights are permuted, but the masks are not for that order: recreate the masks")
    return save_checkpoint(
        baked_state(module, masks),
        replace(
            provenance,
            masked=tuple(layer.name for layer in masks.masked),
            pattern=str(masks.pattern),
            layout=masks.layout,
            method=masks.method,
            image_sets=merge_image_sets(provenance.image_sets, masks.image_sets),
        ),
        out,
    )


def baked_state(module: nn.Module, masks: MaskSet) -> dict[str, torch.Tensor]:
    """The module's state dict with the masks applied."""
    import torch

    state = dict(module.state_dict())
    names: dict[tuple[int, torch.Size], list[str]] = {}
    for name, tensor in state.items():
        names.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
    # Looked up before weights are replaced: a tied weight has several names, of which the last one loaded would count.
    tied = {name: group for group in names.values() for name in group}
    for name, mask in load_masks(masks.path).items():
        weight = state[name]
        # Not a product: that would keep NaN, and turn negative weights into -0.0.
        masked = torch.where(torch.from_numpy(mask).to(weight.device), weight, torch.zeros((), dtype=weight.dtype))
        state |= dict.fromkeys(tied[name], masked)
    return state
