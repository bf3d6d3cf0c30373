"""The network during learning: frozen weights under masks that are sampled for every batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.func import functional_call

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.learning.gates import Gates, mask_of
from maskplan.pipeline.models.batchnorm import batchnorm_layers

Masks = dict[str, npt.NDArray[np.bool_]]


class MaskedNet(nn.Module):
    """A frozen network under sampled masks; the gates are its only parameters.

    BatchNorm normalizes by batch statistics (per process, if there are several); everything else is in evaluation mode. The
    running statistics are recalibrated once the masks are final.

    Args:
        student: A copy of the dense network; it is modified, and its parameters no longer require gradients.
        names: Names of the weights to mask.
        pattern: N:M.
        init_std: See `Gates`.
        hard: See `Gates.sample`.
    """

    def __init__(self, student: nn.Module, names: list[str], pattern: Pattern, init_std: float, *, hard: bool) -> None:
        super().__init__()
        # In a list, so that it is not registered: its weights are not parameters of this module, and DistributedDataParallel
        # does not synchronize its buffers.
        self._student = [student.requires_grad_(False).eval()]
        for norm in batchnorm_layers(student):
            norm.train()
        parameters = dict(student.named_parameters(remove_duplicate=False))
        # A weight that is shared under several names has one gate; its mask applies to every name.
        self._owners = {name: next(n for n in names if parameters[n] is parameters[name]) for name in names}
        self._weights = {name: parameters[name].contiguous() for name in dict.fromkeys(self._owners.values())}
        self._hard = hard
        self.gates = nn.ModuleList(Gates(weight, pattern, init_std) for weight in self._weights.values())

    def forward(self, images: torch.Tensor, tau: float, noise: float, seeds: list[int]) -> tuple[Any, torch.Tensor]:
        """Run the network under one sample of all masks.

        Args:
            images: (N, channels, H, W).
            tau: Temperature.
            noise: Scale of the Gumbel noise.
            seeds: One per gate, in the order of `logits`.

        Returns:
            What the network returns, and the mean fraction of squared magnitude that the masks keep, a scalar.
        """
        sampled = {
            name: gates.sample(weight, tau, seed, noise=noise, hard=self._hard)
            for (name, weight), gates, seed in zip(self._weights.items(), self._each(), seeds, strict=True)
        }
        # One name of a shared weight stands for all: naming some of them, but not all, is an error in PyTorch.
        returned = functional_call(self._student[0], sampled, (images,))
        return returned, self._kept(sampled)

    def _kept(self, sampled: Mapping[str, torch.Tensor]) -> torch.Tensor:
        # A weight of zeros keeps nothing; without a lower bound on the divisor that would be 0/0.
        tiny = torch.finfo(torch.float32).tiny
        shares = [
            sampled[name].square().sum() / weight.square().sum().clamp_min(tiny)
            for name, weight in self._weights.items()
        ]
        return torch.stack(shares).mean()

    def start_from(self, masks: Mapping[str, npt.NDArray[np.bool_]], init_margin: float) -> None:
        """Raise the gates of given masks by `init_margin`, in place."""
        for owner, gates in zip(self._weights, self._each(), strict=True):
            gates.start_from(masks[owner], init_margin)

    def masks(self, logits: list[torch.Tensor] | None = None) -> Masks:
        """The likeliest masks by weight name, of the gates or of other logits in the same order."""
        values = logits or [gates.logits.detach() for gates in self._each()]
        by_owner = {
            name: mask_of(value, gates.table, gates.shape)
            for name, value, gates in zip(self._weights, values, self._each(), strict=True)
        }
        return {name: by_owner[owner] for name, owner in self._owners.items()}

    def entropy(self) -> float:
        """Mean over the weights of `Gates.entropy`."""
        return float(np.mean([gates.entropy() for gates in self._each()]))

    def groups(self) -> int:
        """Number of groups of all masked weights."""
        return sum(gates.logits[0].numel() for gates in self._each())

    def logits(self) -> list[nn.Parameter]:
        """The parameters, in a fixed order."""
        return [gates.logits for gates in self._each()]

    def _each(self) -> list[Gates]:
        return cast(list[Gates], list(self.gates))
