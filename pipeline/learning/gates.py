"""Gates: for each group of a weight, one logit per pattern. A sample of the gates is a mask; so is their argmax."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.learning import fused
from maskplan.pipeline.masking.patterns import pattern_table


class Gates(nn.Module):
    """The choice among the patterns of every group of one weight, in TensorRT's layout.

    `logits` has the shape (P, K, C/M, R*S): the P = M choose N patterns first, then the weight's own memory order, so that
    every step of a sample runs over contiguous slabs. The table of patterns is a buffer: it is not learned.

    Args:
        weight: The frozen weight (K, C, ...); the initial logits follow the magnitude that each pattern keeps.
        pattern: N:M.
        init_std: Standard deviation of the initial logits; 0 starts undecided.
    """

    table: torch.Tensor

    def __init__(self, weight: torch.Tensor, pattern: Pattern, init_std: float) -> None:
        super().__init__()
        self.pattern = pattern
        self.shape = tuple(weight.shape)
        table = torch.from_numpy(pattern_table(pattern)).to(weight.device)
        self.register_buffer("table", table, persistent=False)
        # In float64, so that patterns that keep the same magnitude tie exactly; the first then wins, as in magnitude masks.
        centered = _by_pattern(_slabs(weight.detach().double().abs().contiguous(), pattern.m), table)
        centered -= centered.mean(dim=0, keepdim=True)
        spread = float(centered.std())
        if spread > 0:
            centered *= init_std / spread
        self.logits = nn.Parameter(centered.float())

    def start_from(self, mask: npt.NDArray[np.bool_], init_margin: float) -> None:
        """Raise the logits of a mask's patterns by `init_margin`, in place.

        In a group that keeps fewer than N, all patterns that contain the kept weights are raised.
        """
        kept = torch.from_numpy(np.ascontiguousarray(mask)).to(self.logits.device)
        members = _by_pattern(_slabs(kept.float(), self.pattern.m), self.table)
        with torch.no_grad():
            self.logits.add_(members == members.amax(dim=0, keepdim=True), alpha=init_margin)

    def sample(
        self, weight: torch.Tensor, tau: float, seed: int, *, noise: float = 1.0, hard: bool = True
    ) -> torch.Tensor:
        """The weight masked by a Gumbel-softmax sample (Jang et al. 2017; Maddison et al. 2017).

        Args:
            weight: The frozen weight (K, C, ...), contiguous.
            tau: Temperature of the soft sample, whose gradient the gates receive.
            seed: Of the noise; the same seed gives the same sample on the same type of device.
            noise: Scale of the Gumbel noise: 1 samples from the softmax of the logits, 0 takes the likeliest pattern.
            hard: Use a mask of zeros and ones in the forward pass (straight-through); otherwise the soft sample itself.

        Returns:
            Mask times weight, shaped like the weight.
        """
        masked: torch.Tensor = _Sample.apply(self.logits, weight, self.table, tau, seed, noise, hard)  # type: ignore[no-untyped-call]
        return masked

    def mask(self) -> npt.NDArray[np.bool_]:
        """The mask of the likeliest pattern of each group: bool, shaped like the weight; ties keep the first pattern."""
        return mask_of(self.logits.detach(), self.table, self.shape)

    def entropy(self) -> float:
        """Mean entropy of the groups' pattern distributions, divided by the maximum: 1 undecided, 0 decided."""
        log_p = torch.log_softmax(self.logits.detach(), dim=0)
        total = -(log_p.exp() * log_p).sum(dim=0).mean()
        return float(total / np.log(len(self.table))) if len(self.table) > 1 else 0.0


def mask_of(logits: torch.Tensor, table: torch.Tensor, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """The mask of each group's largest logit: logits (P, K, C/M, R*S) to bool of the weight's `shape`."""
    # NumPy's argmax returns the first of equals, as the magnitude mask does; torch's may return any.
    chosen = torch.from_numpy(logits.cpu().numpy().argmax(axis=0))
    members = [table.cpu()[:, j][chosen] for j in range(table.shape[1])]
    return torch.stack(members, dim=2).reshape(shape).numpy()


class _Sample(torch.autograd.Function):
    """Samples in the forward pass, and regenerates the same noise in the backward pass instead of storing it."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        weight: torch.Tensor,
        table: torch.Tensor,
        tau: float,
        seed: int,
        noise: float,
        hard: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(logits, weight, table)
        ctx.tau, ctx.seed, ctx.noise = tau, seed, noise
        if _is_fused(logits, weight):
            return fused.sample(logits, weight, table, tau, seed, noise, hard=hard)
        noisy = _noisy(logits, seed, noise)
        masked = torch.empty_like(weight)
        source, target = _slabs(weight, table.shape[1]), _slabs(masked, table.shape[1])
        if hard:
            chosen, nothing = noisy.argmax(dim=0), weight.new_zeros(())
            for j in range(table.shape[1]):
                torch.where(table[:, j][chosen], source[:, :, j], nothing, out=target[:, :, j])
        else:
            soft = torch.softmax(noisy.div_(tau), dim=0)
            for j in range(table.shape[1]):
                torch.mul(source[:, :, j], soft[table[:, j]].sum(dim=0), out=target[:, :, j])
        return masked

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, weight, table = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        nothing = (None,) * 6
        if _is_fused(logits, weight):
            return fused.sample_backward(logits, weight, gradient, table, ctx.tau, ctx.seed, ctx.noise), *nothing
        soft = torch.softmax(_noisy(logits, ctx.seed, ctx.noise).div_(ctx.tau), dim=0)
        # How the loss changes if an element is kept, summed to how it changes if a pattern is chosen.
        gains = _by_pattern(_slabs(gradient.float() * weight.float(), table.shape[1]), table)
        gains -= (soft * gains).sum(dim=0, keepdim=True)
        return gains.mul_(soft.div_(ctx.tau)), *nothing


def _is_fused(logits: torch.Tensor, weight: torch.Tensor) -> bool:
    return logits.device.type == "cpu" and weight.dtype == torch.float32


def _noisy(logits: torch.Tensor, seed: int, scale: float) -> torch.Tensor:
    """A copy of the logits with Gumbel noise."""
    if scale == 0:
        return logits.clone()
    generator = torch.Generator(logits.device).manual_seed(seed)
    noise = torch.empty_like(logits).uniform_(generator=generator)
    # -log(-log(u)); u = 0 gives minus infinity, which is never chosen.
    return noise.log_().neg_().log_().mul_(-scale).add_(logits)


def _slabs(weight: torch.Tensor, m: int) -> torch.Tensor:
    """A contiguous weight (K, C, ...) as (K, C/M, M, R*S), a view."""
    return weight.view(weight.shape[0], weight.shape[1] // m, m, -1)


def _by_pattern(elements: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Sum over the elements that each pattern keeps: (K, C/M, M, R*S) to (P, K, C/M, R*S)."""
    out = elements.new_zeros((len(table), *elements.shape[:2], elements.shape[3]))
    for p, row in enumerate(table.tolist()):
        for j, keeps in enumerate(row):
            if keeps:
                out[p] += elements[:, :, j]
    return out
