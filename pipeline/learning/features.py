"""Matching of features: how far what a masked network computes inside is from what the dense network computes there.

Few images say little through the outputs alone: one number for each class of each image. The activations of all layers say
thousands of times more, as in the reconstruction of blocks for rounding (AdaRound, Nagel et al. 2020; BRECQ, Li et al.
2021).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from maskplan.pipeline.models.batchnorm import batchnorm_layers


class Matcher:
    """Compares what the same modules of two networks return.

    Only what runs inside `observing()` is kept. Both networks also run in evaluations, over thousands of images, and so do
    copies of them, which share the hooks.

    Args:
        teacher: The dense network.
        student: A copy of it, which runs under masks.
        names: Of the modules.
        copies: Keep copies of the outputs; otherwise a later change in place shows in both networks alike.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, names: Sequence[str], *, copies: bool) -> None:
        self._teacher: dict[str, list[torch.Tensor]] = {}
        self._student: dict[str, list[torch.Tensor]] = {}
        self._observes, self._copies = False, copies
        for network, found in ((teacher, self._teacher), (student, self._student)):
            modules = dict(network.named_modules())
            for name in names:
                modules[name].register_forward_hook(self._keep(found, name))

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
        """Mean over the modules of the squared difference, relative to the dense outputs' variance; forgets both.

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

    def _keep(self, found: dict[str, list[torch.Tensor]], name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if self._observes:
                tensors = float_tensors(output)
                found.setdefault(name, []).extend([t.clone() for t in tensors] if self._copies else tensors)

        return hook


class FeatureMatcher(Matcher):
    """Compares the BatchNorm layers, or the masked layers where there are none.

    Args:
        teacher: The dense network.
        student: A copy of it, which runs under masks.
        masked: Names of the masked weights.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, masked: list[str]) -> None:
        norms = set(batchnorm_layers(teacher))
        names = [name for name, module in teacher.named_modules() if module in norms]
        super().__init__(
            teacher, student, names or list(dict.fromkeys(n.rpartition(".")[0] for n in masked)), copies=False
        )


def relative_difference(ours: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """The mean squared difference, relative to the dense tensor's variance, a scalar; 0 where that is constant."""
    spread = (dense - dense.mean()).square().mean()
    share = (spread > 0) / spread.clamp_min(torch.finfo(torch.float32).tiny)
    return (ours - dense).square().mean() * share


def float_tensors(output: Any) -> list[torch.Tensor]:
    """The float tensors that a module returned, in lists, tuples and dictionaries too."""
    return [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]
