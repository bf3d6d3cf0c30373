"""The compiled draws against torch's operators and autograd, and their noise against its distribution."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import stats

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.learning.fused import gumbel_noise, sample, sample_backward
from maskplan.pipeline.masking.patterns import pattern_table

# Shapes that end within a block, at its edge, or are larger than one filter's worth of it.
SHAPES = [(1, 1, 1), (3, 2, 9), (33, 2, 1), (64, 16, 1), (1024, 1, 1), (5, 3, 49), (2, 1, 2000), (70, 16, 9)]
PATTERNS = [(1, 2), (2, 4), (3, 4), (4, 8)]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def made(shape: tuple[int, int, int], n: int, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, weight and table."""
    k, groups, taps = shape
    table = torch.from_numpy(pattern_table(Pattern(n, m)))
    generator = torch.Generator().manual_seed(k)
    logits = torch.randn(len(table), k, groups, taps, generator=generator)
    return logits, torch.randn(k, groups * m, taps, generator=generator), table


def written_out(
    logits: torch.Tensor, weight: torch.Tensor, table: torch.Tensor, tau: float, hard: bool
) -> torch.Tensor:
    """The formula, of logits with their noise."""
    share = torch.softmax(logits / tau, dim=0)
    if hard:
        share = torch.nn.functional.one_hot(logits.argmax(dim=0), len(table)).movedim(-1, 0).float()
    kept = torch.einsum("pkgt,pj->kgjt", share, table.float())
    return (weight.view(kept.shape) * kept).view(weight.shape)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_samples_and_gradients_match_the_explicit_formula(
    shape: tuple[int, int, int], n: int, m: int, noise: float
) -> None:
    logits, weight, table = made(shape, n, m)
    noisy = (logits + noise * gumbel_noise(tuple(logits.shape), 5)).requires_grad_()
    for hard in (True, False):
        found = sample(logits, weight, table, 0.7, 5, noise, hard=hard)
        expected = written_out(noisy, weight, table, 0.7, hard).detach()
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    (expected,) = torch.autograd.grad((written_out(noisy, weight, table, 0.7, False) * gradient).sum(), noisy)
    found = sample_backward(logits, weight, gradient, table, 0.7, 5, noise)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_extreme_logits_give_hard_samples_without_nan() -> None:
    logits, weight, table = made((4, 2, 9), 2, 4)
    logits[0], logits[1:] = 1e4, -1e4
    for tau in (1e-3, 1.0):
        soft = sample(logits, weight, table, tau, 0, 1.0, hard=False)
        assert torch.allclose(soft, sample(logits, weight, table, tau, 0, 1.0, hard=True), atol=1e-6)
        assert bool(sample_backward(logits, weight, weight, table, tau, 0, 1.0).abs().max() < 1e-6)


def test_ties_take_the_first_pattern() -> None:
    logits, weight, table = made((4, 2, 9), 2, 4)
    kept = sample(logits.zero_(), torch.ones_like(weight), table, 1.0, 0, 0.0, hard=True)
    assert torch.equal(kept.view(4, 2, 4, 9)[:, :, :2], torch.ones(4, 2, 2, 9))


@pytest.mark.usefixtures("threads")
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    logits, weight, table = made((128, 32, 9), 2, 4)
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        drawn = sample(logits, weight, table, 0.7, 5, 1.0, hard=False)
        found.append((drawn, sample_backward(logits, weight, drawn, table, 0.7, 5, 1.0)))
    for drawn, gradient in found[1:]:
        assert torch.equal(drawn, found[0][0])
        assert torch.equal(gradient, found[0][1])


def test_the_noise_has_a_gumbel_distribution() -> None:
    """By Kolmogorov and Smirnov; the bound is 1 in 1,000 by chance, and the seed is fixed."""
    noise = gumbel_noise((6, 50_000), 1).numpy().astype(np.float64)
    for row in noise:
        assert stats.kstest(row, "gumbel_r").pvalue > 1e-3
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.01)
    assert noise.var() == pytest.approx(np.pi**2 / 6, rel=0.01)


def test_the_noise_of_patterns_neighbors_and_seeds_is_uncorrelated() -> None:
    first, second = (gumbel_noise((6, 50_000), seed).numpy() for seed in (0, 1))
    rows = np.concatenate([first, second, np.roll(first, 1, axis=1)])
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlation).max() < 0.02
    values = np.concatenate([first, second]).ravel()
    # 23 bits: some of 600,000 values meet, as chance has it (2.1% of them), and no more.
    assert len(values) - len(np.unique(values)) == pytest.approx(len(values) ** 2 / 2**24, rel=0.1)
