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

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.models.dense_statistics import named_batchnorms
from maskplan.pipeline.models.layers import outputs_of

# Variance, relative to the mean square, below which a tensor is constant up to rounding in float32.
_CONSTANT = 1e-12


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
        return torch.stack(losses).mean() if losses else torch.zeros(())

    def _forget(self) -> None:
        self._teacher.clear()
        self._student.clear()

    def _keep(self, found: dict[str, list[torch.Tensor]], name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if self._observes:
                tensors = float_tensors(output)
                found.setdefault(name, []).extend([t.clone() for t in tensors] if self._copies else tensors)

        return hook


def find_features(network: nn.Module, masked: Sequence[str], preprocessing: Preprocessing) -> tuple[str, ...]:
    """The modules whose outputs are compared: the BatchNorm layers, or the masked layers where there are none.

    Modules that only hold parameters, which the network uses by itself, return nothing.

    Args:
        network: In evaluation mode, on any device.
        masked: Names of the masked weights.
        preprocessing: Gives the size of an image, which shows what is called and returns float tensors.
    """
    modules = dict(network.named_modules())
    layers = dict.fromkeys(name.rpartition(".")[0] for name in masked)
    called = outputs_of(network, {name: modules[name] for name in (*named_batchnorms(network), *layers)}, preprocessing)
    usable = {name for name, output in called.items() if float_tensors(output)}
    norms = tuple(name for name in named_batchnorms(network) if name in usable)
    return norms or tuple(name for name in layers if name in usable)


class FeatureMatcher(Matcher):
    """Compares the outputs of these modules, on the inputs that they have in each of the networks."""

    def __init__(self, teacher: nn.Module, student: nn.Module, names: Sequence[str]) -> None:
        super().__init__(teacher, student, names, copies=False)


def relative_difference(ours: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """The mean squared difference, relative to the dense tensor's variance, a scalar.

    0 where the dense tensor is constant or empty, and where the shapes differ: other images reached that part.
    """
    if ours.shape != dense.shape or not dense.numel():
        return dense.new_zeros(())
    spread = (dense - dense.mean()).square().mean()
    # The mean of equal numbers is off by a few roundings.
    share = (spread > _CONSTANT * dense.square().mean()) / spread.clamp_min(torch.finfo(torch.float32).tiny)
    return (ours - dense).square().mean() * share


def float_tensors(output: Any) -> list[torch.Tensor]:
    """The float tensors that a module returned, in lists, tuples and dictionaries too."""
    return [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]
