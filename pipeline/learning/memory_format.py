"""The order of axes in memory that a network learns in: channels-last where it can run so, which is faster."""

from __future__ import annotations

import torch
from torch import nn

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.models.layers import sample_input


def use_fastest_format(network: nn.Module, preprocessing: Preprocessing) -> torch.memory_format:
    """Put a network's filters in channels-last order, in place, unless it cannot run so; the order for its images.

    `x.view(len(x), -1)` of a feature map, for one, needs the order of PyTorch's default.
    """
    _reorder(network, torch.channels_last)
    images = sample_input(preprocessing, 2).to(next(network.parameters()).device)
    try:
        with torch.no_grad():
            network(images.contiguous(memory_format=torch.channels_last))
    except Exception:  # the network's own code may raise anything
        _reorder(network, torch.contiguous_format)
        return torch.contiguous_format
    return torch.channels_last


def _reorder(network: nn.Module, order: torch.memory_format) -> None:
    # `Module.to(memory_format=...)` refuses modules that also have tensors of five axes.
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=order)
