"""Gates: for each group of a weight, one number a pattern. A sample of the gates is a mask; so is their argmax."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pipeline.artifacts import Pattern
from pipeline.masking.patterns import group, patterns, ungroup


class Gates(nn.Module):
    """The choice among the patterns of every group of one weight, in TensorRT's layout.

    `logits` has the shape (K, R, S, C/M, P), or (K, C/M, P) for a linear layer, with P = M choose N patterns. The table of
    patterns is a buffer: it is not learned.

    Args:
        weight: The frozen weight (K, C, ...); its magnitudes are the prior.
        pattern: N:M.
        prior: Standard deviation of the initial logits; 0 starts undecided.
    """

    table: torch.Tensor

    def __init__(self, weight: torch.Tensor, pattern: Pattern, prior: float) -> None:
        super().__init__()
        table = patterns(pattern)
        self.pattern = pattern
        self.shape = tuple(weight.shape)
        self.register_buffer("table", torch.from_numpy(table).to(torch.float32), persistent=False)
        magnitude = np.abs(weight.detach().cpu().float().numpy())
        kept = torch.from_numpy(np.ascontiguousarray(group(magnitude, pattern.m))) @ self.table.T
        centred = kept - kept.mean(dim=-1, keepdim=True)
        spread = centred.std()
        self.logits = nn.Parameter(centred * (prior / spread) if spread > 0 else centred)

    def sample(self, tau: float, generator: torch.Generator) -> torch.Tensor:
        """A hard Gumbel-softmax sample with straight-through gradients (Jang et al. 2017; Maddison et al. 2017).

        Returns:
            A mask of zeros and ones shaped like the weight; its gradient is that of the soft sample at temperature `tau`.
        """
        noise = torch.empty_like(self.logits).exponential_(generator=generator).log_()
        soft = torch.softmax((self.logits - noise) / tau, dim=-1)
        chosen = soft.argmax(dim=-1)
        soft_mask = soft @ self.table
        return self._shaped(self.table[chosen] + soft_mask - soft_mask.detach())

    def mask(self) -> npt.NDArray[np.bool_]:
        """The likeliest pattern of each group, bool, shaped like the weight; ties keep the first pattern."""
        chosen = self.table[self.logits.detach().argmax(dim=-1)]
        mask = ungroup(chosen.cpu().numpy().astype(np.bool_), self.shape)
        return mask.astype(np.bool_, copy=False)

    def _shaped(self, grouped: torch.Tensor) -> torch.Tensor:
        # (K, R, S, C/M, M) -> (K, R, S, C) -> (K, C, R, S)
        return grouped.flatten(-2).movedim(-1, 1)
