"""The network in learning: weights frozen, masks drawn anew for every batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.func import functional_call

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.learning.gates import Gates, mask_of
from maskplan.pipeline.models.batchnorm import norms

Masks = dict[str, npt.NDArray[np.bool_]]


class MaskedNet(nn.Module):
    """A frozen network under sampled masks; the gates are its only parameters.

    BatchNorm normalizes by the batch (of each process, where there are several); everything else is in evaluation mode. What
    the statistics will be is settled by recalibration, when the masks are.

    Args:
        student: A copy of the dense network that may be changed; its parameters stop requiring gradients.
        names: Of the weights to mask.
        pattern: N:M.
        init_std: See `Gates`.
        hard: See `Gates.sample`.
    """

    def __init__(self, student: nn.Module, names: list[str], pattern: Pattern, init_std: float, *, hard: bool) -> None:
        super().__init__()
        # Kept out of the registry: its weights are no parameters of this module, nor its buffers for others to synchronize.
        self._student = [student.requires_grad_(False).eval()]
        for norm in norms(student):
            norm.train()
        parameters = dict(student.named_parameters(remove_duplicate=False))
        # A weight under two names is one weight: it has one gate, and its mask every name.
        self._owners = {name: next(n for n in names if parameters[n] is parameters[name]) for name in names}
        self._weights = {name: parameters[name].contiguous() for name in dict.fromkeys(self._owners.values())}
        self._hard = hard
        self.gates = nn.ModuleList(Gates(weight, pattern, init_std) for weight in self._weights.values())

    def forward(
        self, images: torch.Tensor, tau: float, noise: float, seeds: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the images under one draw of all masks, and the share of squared magnitude that the draw keeps."""
        drawn = {
            name: gates.sample(weight, tau, seed, noise=noise, hard=self._hard)
            for (name, weight), gates, seed in zip(self._weights.items(), self._each(), seeds, strict=True)
        }
        logits = functional_call(
            self._student[0], {name: drawn[owner] for name, owner in self._owners.items()}, (images,)
        )
        return logits, self._kept(drawn)

    def _kept(self, drawn: Mapping[str, torch.Tensor]) -> torch.Tensor:
        shares = [drawn[name].square().sum() / weight.square().sum() for name, weight in self._weights.items()]
        return torch.stack(shares).mean()

    def start_from(self, masks: Mapping[str, npt.NDArray[np.bool_]], init_margin: float) -> None:
        """Let the gates start out for given masks, in place."""
        for owner, gates in zip(self._weights, self._each(), strict=True):
            gates.start_from(masks[owner], init_margin)

    def masks(self, logits: list[torch.Tensor] | None = None) -> Masks:
        """The likeliest masks by weight name, of the gates or of other logits in their order."""
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
        """How many choices there are."""
        return sum(gates.logits[0].numel() for gates in self._each())

    def logits(self) -> list[nn.Parameter]:
        """The parameters, in a fixed order."""
        return [gates.logits for gates in self._each()]

    def _each(self) -> list[Gates]:
        return cast(list[Gates], list(self.gates))
