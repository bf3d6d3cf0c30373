"""The order of axes in memory that a network learns in: channels-last where it can run so, which is faster."""

from __future__ import annotations

import copy

import torch
from torch import nn

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.models.layers import sample_input


def use_fastest_format(network: nn.Module, preprocessing: Preprocessing) -> torch.memory_format:
    """Put a network's filters in channels-last order, in place, unless it cannot run so; the order for its images.

    `x.view(len(x), -1)` of a feature map, for one, needs the order of PyTorch's default.
    """
    trial = copy.deepcopy(network)
    _use_channels_last(trial)
    images = sample_input(preprocessing, 2).to(next(network.parameters()).device)
    try:
        with torch.no_grad():
            trial(in_format(images, torch.channels_last))
    except Exception:  # the network's own code may raise anything
        return torch.contiguous_format
    _use_channels_last(network)
    return torch.channels_last


def in_format(images: torch.Tensor, order: torch.memory_format) -> torch.Tensor:
    """A copy of images (N, channels, H, W) in this order, whose strides say so for a single channel too."""
    return torch.empty(images.shape, dtype=images.dtype, device=images.device, memory_format=order).copy_(images)


def _use_channels_last(network: nn.Module) -> None:
    # `Module.to(memory_format=...)` refuses modules that also have tensors of five axes. There is no way back: filters of
    # one channel count as contiguous in either order.
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
