"""Learned masks of one layer against the best of all masks, where inputs are correlated and magnitude misleads."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.learning.gates import Gates
from maskplan.pipeline.masking.magnitude import magnitude_mask

PROBLEMS, FILTERS, CHANNELS, IMAGES = 100, 4, 8, 256
STEPS, EPOCH = 3000, 20
TWO_FOUR = Pattern(2, 4)


def loss_of(gram: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the outputs of each problem, (P,), from the inputs' second moments (P, C, C)."""
    error = weight * (mask.double() - 1)
    return torch.einsum("pkc,pcd,pkd->p", error, gram, error)


def best_loss(gram: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The least loss of any mask: filters do not meet in the loss, so each is searched by itself, over 6 * 6 masks."""
    one = [[j in kept for j in range(4)] for kept in itertools.combinations(range(4), 2)]
    masks = torch.tensor([left + right for left, right in itertools.product(one, one)]).double()
    error = weight[:, :, None] * (masks - 1)
    return torch.einsum("pkmc,pcd,pkmd->pkm", error, gram, error).amin(dim=2).sum(dim=1)


def test_learned_masks_are_within_one_percent_of_the_optimum() -> None:
    rng = np.random.default_rng(0)
    correlation = 0.6 ** np.abs(np.subtract.outer(np.arange(CHANNELS), np.arange(CHANNELS)))
    inputs = rng.normal(size=(PROBLEMS, IMAGES, CHANNELS)) @ np.linalg.cholesky(correlation).T
    x = torch.tensor(inputs, dtype=torch.float32)
    # Problems share Adam and the noise's generator but no gate: each is learned as it would be alone.
    flat = torch.tensor(rng.normal(size=(PROBLEMS * FILTERS, CHANNELS)), dtype=torch.float32)
    weight = flat.view(PROBLEMS, FILTERS, CHANNELS)
    gram = torch.einsum("pnc,pnd->pcd", x.double(), x.double()) / IMAGES
    best = best_loss(gram, weight.double())
    start = loss_of(gram, weight.double(), torch.from_numpy(magnitude_mask(flat.numpy(), TWO_FOUR)).view_as(weight))
    assert bool((start >= best * (1 - 1e-9)).all())
    assert float((start <= best * (1 + 1e-9)).double().mean()) < 0.2, "magnitude is not to be right too often"

    gates = Gates(flat, TWO_FOUR, init_std=1.0)
    adam = torch.optim.Adam([gates.logits], lr=0.1)
    batches = torch.Generator().manual_seed(1)
    found = start.clone()
    for step in range(STEPS):
        done = step / STEPS
        adam.param_groups[0]["lr"] = 0.1 * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        some = x[:, torch.randint(0, IMAGES, (64,), generator=batches)]
        masked = gates.sample(flat, 0.3**done, step, noise=1 - done).view_as(weight)
        loss = (some @ (masked - weight).transpose(1, 2)).square().sum(dim=(0, 2)).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        if (step + 1) % EPOCH == 0:
            # As in the learner, the best epoch wins.
            now = loss_of(gram, weight.double(), torch.from_numpy(gates.mask()).view_as(weight))
            found = torch.minimum(found, now)
    near = found <= best * 1.01
    assert int(near.sum()) >= 95
