"""Gates, against a search over the patterns of every group and against finite differences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.learning import gates as gates_module
from maskplan.pipeline.learning.fused import gumbel_noise
from maskplan.pipeline.learning.gates import Gates

PATTERNS = [(1, 2), (1, 4), (2, 4), (3, 4), (2, 6), (4, 8)]
KERNELS: list[tuple[int, ...]] = [(), (1, 1), (3, 2)]


def distinct(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Whole numbers of both signs, no two of one size: their sums are exact."""
    rng = np.random.default_rng(seed)
    sizes = 1 + rng.permutation(math.prod(shape))
    return torch.from_numpy((sizes * rng.choice([-1, 1], sizes.shape)).reshape(shape).astype(np.float32))


def groups_of(shape: tuple[int, ...], m: int) -> list[tuple[int | slice, ...]]:
    """Where in a weight each group lies, in the order (k, r, s, group)."""
    starts = range(0, shape[1], m)
    ranges = [range(shape[0]), *map(range, shape[2:]), starts]
    return [(k, slice(start, start + m), *tap) for k, *tap, start in itertools.product(*ranges)]


def kept_sums(weight: torch.Tensor, n: int, m: int) -> npt.NDArray[np.float64]:
    """(groups, patterns): the magnitude that each pattern keeps of each group, patterns in lexicographic order."""
    sizes = weight.abs().double().numpy()
    chosen = [list(c) for c in itertools.combinations(range(m), n)]
    return np.array([[sizes[at][c].sum() for c in chosen] for at in groups_of(tuple(weight.shape), m)])


def mask_of(choices: npt.NDArray[np.int64], shape: tuple[int, ...], n: int, m: int) -> npt.NDArray[np.bool_]:
    """The mask in which the group number g has the pattern number `choices[g]`."""
    kept = list(itertools.combinations(range(m), n))
    mask = np.zeros(shape, np.bool_)
    for at, choice in zip(groups_of(shape, m), choices, strict=True):
        mask[at] = np.isin(np.arange(m), kept[choice])
    return mask


def rows(logits: torch.Tensor) -> npt.NDArray[np.float64]:
    """(groups, patterns), in the order of `groups_of`: the gates hold (patterns, k, group, r * s)."""
    return logits.detach().permute(1, 3, 2, 0).reshape(-1, len(logits)).double().numpy()


def set_rows(gates: Gates, values: npt.NDArray[np.floating]) -> None:
    """The inverse of `rows`, in place."""
    p, k, g, t = gates.logits.shape
    shaped = torch.from_numpy(values.astype(np.float32)).reshape(k, t, g, p).permute(3, 0, 2, 1)
    with torch.no_grad():
        gates.logits.copy_(shaped)


def drawn(gates: Gates, tau: float, seed: int = 0) -> torch.Tensor:
    """A sample as a mask: of a weight of ones."""
    return gates.sample(torch.ones(gates.shape), tau, seed)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_gates_start_at_the_magnitude_mask(n: int, m: int, kernel: tuple[int, ...]) -> None:
    weight = distinct((3, 2 * m, *kernel), seed=n * m)
    mask = Gates(weight, Pattern(n, m), 3.0).mask()
    assert mask.dtype == np.bool_
    assert np.array_equal(mask, mask_of(kept_sums(weight, n, m).argmax(axis=1), tuple(weight.shape), n, m))


@pytest.mark.parametrize("init_std", [0.5, 3.0])
@pytest.mark.parametrize("kernel", KERNELS)
def test_initial_logits_are_kept_magnitudes_scaled_to_init_std(init_std: float, kernel: tuple[int, ...]) -> None:
    weight = distinct((3, 8, *kernel))
    logits = Gates(weight, Pattern(2, 4), init_std).logits
    assert logits.shape == (6, 3, 2, math.prod(kernel))
    centered = (sums := kept_sums(weight, 2, 4)) - sums.mean(axis=1, keepdims=True)
    assert rows(logits) == pytest.approx(init_std * centered / centered.std(ddof=1), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("size", [0.0, 0.3, 1.7])
@pytest.mark.parametrize(("n", "m"), [*PATTERNS, (5, 8)])
def test_weights_of_equal_magnitude_leave_the_gates_undecided(size: float, n: int, m: int) -> None:
    gates = Gates(torch.full((2, 24), -size), Pattern(n, m), 3.0)
    assert gates.logits.detach().numpy() == pytest.approx(0, abs=1e-4)
    kept = gates.mask().reshape(-1, m)
    assert kept[:, :n].all()
    assert not kept[:, n:].any()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_ties_keep_the_lower_index_as_in_the_magnitude_mask(n: int) -> None:
    weight = np.random.default_rng(0).choice([0.1, -0.3, 0.3, 0.7, -0.9], (64, 64)).astype(np.float32)
    order = np.argsort(-np.abs(weight.reshape(-1, 4)), axis=1, kind="stable")[:, :n]
    expected = np.zeros((1024, 4), np.bool_)
    np.put_along_axis(expected, order, True, axis=1)
    found = Gates(torch.from_numpy(weight), Pattern(n, 4), 3.0).mask().reshape(-1, 4)
    assert np.flatnonzero((found != expected).any(axis=1)).tolist() == []


def test_an_init_std_of_zero_is_undecided() -> None:
    gates = Gates(distinct((2, 8, 3, 3)), Pattern(2, 4), 0.0)
    assert torch.count_nonzero(gates.logits) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_of_the_weights_does_not_matter(dtype: torch.dtype) -> None:
    weight = distinct((4, 8))
    gates = Gates(weight.to(dtype), Pattern(2, 4), 3.0)
    assert gates.logits.dtype == torch.float32
    assert torch.equal(gates.logits, Gates(weight, Pattern(2, 4), 3.0).logits)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_mask_is_the_likeliest_pattern_of_each_group(n: int, m: int, kernel: tuple[int, ...]) -> None:
    weight = distinct((3, 2 * m, *kernel))
    gates = Gates(weight, Pattern(n, m), 3.0)
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((gates.logits[0].numel(), len(gates.logits)))
    set_rows(gates, logits)
    choices = logits.argmax(axis=1)
    assert np.array_equal(gates.mask(), mask_of(choices, tuple(weight.shape), n, m))


@pytest.mark.parametrize("tau", [0.01, 0.5, 5.0])
@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_sample_keeps_n_of_each_group_at_any_temperature(tau: float, n: int, m: int, kernel: tuple[int, ...]) -> None:
    weight = distinct((5, 2 * m, *kernel))
    sample = drawn(Gates(weight, Pattern(n, m), 1.0), tau).detach()
    assert sample.shape == weight.shape
    kept = sample.numpy() > 0.5
    assert all(kept[at].sum() == n for at in groups_of(tuple(weight.shape), m))


@pytest.mark.parametrize("tau", [0.1, 1.0, 5.0])
def test_a_sample_is_made_of_exact_zeros_and_ones(tau: float) -> None:
    """Otherwise the trained network would differ from the baked one."""
    sample = drawn(Gates(distinct((16, 16, 3, 3)), Pattern(2, 4), 1.0), tau).detach()
    assert set(sample.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2)])
@pytest.mark.parametrize("tau", [0.2, 2.0])
def test_patterns_are_sampled_with_the_softmax_probabilities(tau: float, n: int, m: int) -> None:
    """The temperature softens the gradient, not the draw. 20,000 draws; the bound is 1 in 10 million by chance."""
    draws = 20_000
    gates = Gates(distinct((1, m)).expand(draws, m), Pattern(n, m), 1.0)
    one = rows(gates.logits)[0]
    expected = draws * np.exp(one) / np.exp(one).sum()
    kept = drawn(gates, tau, 1).detach().numpy() > 0.5
    table = [np.isin(np.arange(m), c) for c in itertools.combinations(range(m), n)]
    found = np.array([(kept == row).all(axis=1).sum() for row in table])
    assert found.sum() == draws
    assert expected.min() > 100
    assert ((found - expected) ** 2 / expected).sum() < 42  # chi-square, at most 5 degrees of freedom
    assert ((found - draws / len(table)) ** 2).sum() > 10 * ((found - expected) ** 2).sum()


def soft_sum(
    logits: npt.NDArray[np.float64], gumbel: npt.NDArray[np.float64], tau: float, by_pattern: npt.NDArray[np.float64]
) -> float:
    """Sum of coefficients times the soft sample; `by_pattern` is what each pattern of each group would add."""
    z = (logits + gumbel) / tau
    p = np.exp(z - z.max(axis=1, keepdims=True))
    return float((p / p.sum(axis=1, keepdims=True) * by_pattern).sum())


@pytest.mark.parametrize("tau", [0.3, 1.0, 3.0])
@pytest.mark.parametrize(("shape", "n"), [((2, 8), 2), ((2, 4, 2, 1), 2), ((3, 4), 1), ((2, 4, 1, 2), 3)])
def test_the_gradient_is_that_of_the_soft_sample_by_finite_differences(
    tau: float, shape: tuple[int, ...], n: int
) -> None:
    gates = Gates(distinct(shape), Pattern(n, 4), 1.0)
    coefficient = np.random.default_rng(0).standard_normal(shape)
    weight = distinct(shape)
    sample = gates.sample(weight, tau, 3)
    (sample * torch.from_numpy(coefficient)).sum().backward()
    assert gates.logits.grad is not None
    found = rows(gates.logits.grad)

    gumbel, logits = rows(gumbel_noise(tuple(gates.logits.shape), 3)), rows(gates.logits)
    coefficient *= weight.numpy()
    chosen = [list(c) for c in itertools.combinations(range(4), n)]
    by_pattern = np.array([[coefficient[at][c].sum() for c in chosen] for at in groups_of(shape, 4)])
    expected = np.zeros(logits.shape)
    for at in np.ndindex(*logits.shape):
        step = np.zeros(logits.shape)
        step[at] = 1e-5
        up, down = (soft_sum(logits + s, gumbel, tau, by_pattern) for s in (step, -step))
        expected[at] = (up - down) / 2e-5
    assert np.abs(expected).max() > 1e-2
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert np.array_equal(sample.detach().numpy() != 0, mask_of((logits + gumbel).argmax(axis=1), shape, n, 4))


def test_samples_depend_on_the_seed_alone() -> None:
    gates = Gates(distinct((8, 8)), Pattern(2, 4), 0.0)
    first = drawn(gates, 1.0, 0)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(drawn(gates, 1.0, 0), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(drawn(gates, 1.0, 1), first)


def test_only_the_logits_receive_gradients() -> None:
    weight = distinct((4, 8)).requires_grad_()
    before = weight.detach().clone()
    gates = Gates(weight, Pattern(2, 4), 1.0)
    assert [name for name, p in gates.named_parameters() if p.requires_grad] == ["logits"]
    gates.sample(weight, 1.0, 0).sum().backward()
    assert weight.grad is None
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("hard", [True, False])
def test_other_dtypes_use_torchs_operators(dtype: torch.dtype, hard: bool) -> None:
    """As on a GPU: compared with the explicit formula and autograd, with the same noise."""
    weight = distinct((7, 8, 3, 3)) / 64
    gates = Gates(weight, Pattern(2, 4), 1.0)
    fused = dtype == torch.float32
    noise = 0.5 * gumbel_noise(tuple(gates.logits.shape), 5)
    if not fused:
        noise = gates_module._noisy(gates.logits.detach(), 5, 0.5) - gates.logits.detach()
    logits = gates.logits.detach().clone().requires_grad_()
    soft = torch.softmax((logits + noise) / 0.7, dim=0)
    shares = torch.stack([soft[gates.table[:, j]].sum(0) for j in range(4)], dim=2).reshape(weight.shape)
    coefficient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    (shares * weight * coefficient).sum().backward()
    sample = gates.sample(weight.to(dtype), 0.7, 5, noise=0.5, hard=hard)
    assert sample.dtype == dtype
    (sample.float() * coefficient).sum().backward()
    drawn = rows(logits + noise).argmax(axis=1)
    expected = torch.from_numpy(mask_of(drawn, tuple(weight.shape), 2, 4)) * weight
    close = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    assert torch.allclose(sample.detach().float(), expected if hard else (shares * weight).detach(), **close)
    assert gates.logits.grad is not None
    assert logits.grad is not None
    assert torch.allclose(gates.logits.grad, logits.grad, **close)


def test_without_noise_the_likeliest_pattern_is_taken() -> None:
    weight = distinct((4, 8, 3, 3))
    gates = Gates(weight, Pattern(2, 4), 3.0)
    sample = gates.sample(weight, 1.0, 0, noise=0.0).detach()
    assert np.array_equal(sample.numpy() != 0, gates.mask())


@pytest.mark.parametrize("choices", [6, 4])
def test_entropy_is_one_for_an_even_choice_and_zero_for_a_certain_one(choices: int) -> None:
    gates = Gates(distinct((2, 8)), Pattern(2 if choices == 6 else 1, 4), 0.0)
    assert gates.entropy() == pytest.approx(1)
    with torch.no_grad():
        gates.logits[0] = 100
    assert gates.entropy() == pytest.approx(0, abs=1e-6)


def test_given_masks_become_the_likeliest() -> None:
    weight = distinct((4, 8, 3, 3))
    gates = Gates(weight, Pattern(2, 4), 1.0)
    given = mask_of(np.random.default_rng(0).integers(0, 6, 4 * 2 * 9), tuple(weight.shape), 2, 4)
    gates.start_from(given, 50.0)
    assert np.array_equal(gates.mask(), given)
