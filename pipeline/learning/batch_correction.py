"""Makes a masked network that normalizes by its batches compute what it will once it is recalibrated.

The statistics of a batch are noisy, and most of their noise is in the images: the dense network, which sees the same batch,
has it too. The difference between the dense network's statistics of the batch and its stored ones is removed from the masked
network's, so that a network whose masks remove nothing returns what the dense network returns, whatever the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from maskplan.pipeline.models.dense_statistics import (
    ChannelStatistics,
    batch_statistics,
    named_batchnorms,
    stored_statistics,
)


class BatchCorrection:
    """Corrects a student's BatchNorm layers by the teacher's statistics of the same batch, inside `observing()`.

    The correction is an affine function of each channel, which goes into the layer's weight and bias.

    Args:
        teacher: The dense network, in evaluation mode; it has to run first in each step.
        student: A copy of it. Its BatchNorm layers in training mode normalize by the batch, and are corrected: their weights
            and biases are replaced, unless parametrizations compute them. The others compute what the teacher's do anyway.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        self._seen: dict[str, list[ChannelStatistics | None]] = {}
        self._calls: Counter[str] = Counter()
        self._observes = False
        dense, ours = named_batchnorms(teacher), named_batchnorms(student)
        for name, stored in stored_statistics(teacher).items():
            if ours[name].training and not is_parametrized(ours[name]):
                dense[name].register_forward_pre_hook(self._observe(name), with_kwargs=True)
                ours[name].register_forward_pre_hook(self._correct(name, dense[name], stored))

    @contextmanager
    def observing(self) -> Iterator[None]:
        """One step: the teacher runs, then the student, on the same images."""
        self._seen.clear()
        self._calls.clear()
        self._observes = True
        try:
            yield
        finally:
            self._observes = False

    def _observe(self, name: str) -> Any:
        def observe(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._observes:
                self._seen.setdefault(name, []).append(batch_statistics(args, kwargs, biased=True))

        return observe

    def _correct(self, name: str, dense: Any, stored: ChannelStatistics) -> Any:
        std = (stored.variance + dense.eps).sqrt()
        weight = torch.ones_like(std) if dense.weight is None else dense.weight.detach()
        bias = torch.zeros_like(std) if dense.bias is None else dense.bias.detach()

        def correct(layer: Any, _: Any) -> None:
            if not self._observes:
                # Activation checkpointing computes a layer again, for which the correction of its last call is there.
                if self._calls[name] > 1:
                    raise RuntimeError(f"{name}, which is called several times, is computed again in the backward pass")
                return
            # Each call has its own correction; one that the teacher does not make has none.
            calls, seen = self._seen.get(name, []), None
            if self._calls[name] < len(calls):
                seen = calls[self._calls[name]]
            self._calls[name] += 1
            seen = seen or stored
            factor, offset = (seen.variance + dense.eps).sqrt() / std, (seen.mean - stored.mean) / std
            # New tensors: those of a call before may be kept for the backward pass.
            layer.weight = nn.Parameter((weight * factor).to(weight.dtype), requires_grad=False)
            layer.bias = nn.Parameter((bias + weight * offset).to(bias.dtype), requires_grad=False)

        return correct
