"""Fuses the training branches of re-parameterizable blocks (RepVGG, MobileOne) into the convolution that inference uses."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.models.layers import sample_input
from maskplan.pipeline.models.module_outputs import named_tensors

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

_METHODS = ("reparameterize", "switch_to_deploy")
"""What timm and the authors of RepVGG call the method that fuses a block in place."""
_TOLERANCE = 1e-3


def fusable_blocks(module: nn.Module) -> list[str]:
    """Paths of the blocks that still have their training branches, the outermost ones."""
    found: list[str] = []
    for path, block in module.named_modules():
        if any(path.startswith(f"{outer}.") for outer in found):
            continue
        if any(callable(getattr(block, method, None)) for method in _METHODS):
            fused = copy.deepcopy(block)
            try:
                _fuse(fused)
            except Exception:
                continue
            if fused.state_dict().keys() != block.state_dict().keys():
                found.append(path)
    return found


def fuse_blocks(module: nn.Module, preprocessing: Preprocessing, name: str) -> int:
    """Fuse all such blocks, in place; the network computes the same.

    Returns:
        The number of blocks.

    Raises:
        InputError: There are none, or the outputs change.
    """
    import torch

    blocks = fusable_blocks(module)
    if not blocks:
        raise InputError("the model has no blocks to fuse", where=name, fix="omit --fuse")
    x = sample_input(preprocessing, 1)
    with torch.no_grad():
        before = named_tensors(module.eval()(x))
        modules = dict(module.named_modules())
        for path in blocks:
            _fuse(modules[path])
        after = named_tensors(module.eval()(x))
    difference = max(
        float((after[name].float() - values.float()).abs().max()) / max(float(values.float().abs().max()), 1e-6)
        for name, values in before.items()
    )
    if not difference <= _TOLERANCE:
        raise InputError(
            "fusing the model's blocks changes its outputs",
            where=name,
            found=f"by {difference:.2g} of their largest value",
            fix="omit --fuse",
        )
    return len(blocks)


def note_fusable(module: nn.Module, name: str) -> None:
    """Warn of masks that a later fusing would break."""
    blocks = fusable_blocks(module)
    if blocks:
        log.warning(
            "%s: %d blocks have training branches (%s); masks of these branches are no longer N:M once they are fused:"
            " give --fuse to fuse them first",
            name,
            len(blocks),
            listed(blocks, 3),
        )


def _fuse(block: nn.Module) -> None:
    for inner in list(block.modules()):
        method = next((m for m in _METHODS if callable(getattr(inner, m, None))), None)
        if method is not None:
            getattr(inner, method)()
