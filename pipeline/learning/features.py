"""Matching of features: how far what a masked network computes inside is from what the dense network computes there.

Few images say little through the outputs alone: one number for each class of each image. The activations of all layers say
thousands of times more, as in the reconstruction of blocks for rounding (AdaRound, Nagel et al. 2020; BRECQ, Li et al.
2021).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from maskplan.pipeline.models.batchnorm import batchnorm_layers


class FeatureMatcher:
    """Observes the same modules of two networks: the BatchNorm layers, or the masked layers where there are none.

    Only what runs inside `observing()` is kept. Both networks also run in evaluations, over thousands of images, and so do
    copies of them, which share the hooks.

    Args:
        teacher: The dense network.
        student: A copy of it, which runs under masks.
        masked: Names of the masked weights.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, masked: list[str]) -> None:
        norms = set(batchnorm_layers(teacher))
        names = [name for name, module in teacher.named_modules() if module in norms]
        names = names or list(dict.fromkeys(name.rpartition(".")[0] for name in masked))
        self._teacher: dict[str, list[torch.Tensor]] = {}
        self._student: dict[str, list[torch.Tensor]] = {}
        self._observes = False
        for network, found in ((teacher, self._teacher), (student, self._student)):
            modules = dict(network.named_modules())
            for name in names:
                modules[name].register_forward_hook(self._hook(found, name))

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Keep what both networks compute inside this context, until `loss` is called."""
        self._forget()
        self._observes = True
        try:
            yield
        finally:
            self._observes = False

    def loss(self) -> torch.Tensor:
        """Mean over the modules of the squared difference, relative to the dense features' variance; forgets both.

        Call it after both networks ran on the same images inside `observing()`.
        """
        losses = []
        for name, dense in self._teacher.items():
            for ours, theirs in zip(self._student[name], dense, strict=True):
                losses.append(relative_difference(ours, theirs))
        self._forget()
        return torch.stack(losses).mean()

    def _forget(self) -> None:
        self._teacher.clear()
        self._student.clear()

    def _hook(self, found: dict[str, list[torch.Tensor]], name: str) -> Any:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            if self._observes and isinstance(output, torch.Tensor) and output.is_floating_point():
                found.setdefault(name, []).append(output)

        return keep


def relative_difference(ours: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """The mean squared difference, relative to the dense tensor's variance, a scalar; 0 where that is constant."""
    spread = (dense - dense.mean()).square().mean()
    share = (spread > 0) / spread.clamp_min(torch.finfo(torch.float32).tiny)
    return (ours - dense).square().mean() * share
