"""Learn masks: frozen weights, gates by Adam, distilled from the dense network; the best epoch on `select` wins."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from pipeline.artifacts import Learning, Pattern, Preprocessing
from pipeline.data import Dataset, batches
from pipeline.errors import InputError
from pipeline.learning.gates import Gates
from pipeline.learning.recipes import LearnOptions
from pipeline.masking.patterns import group
from pipeline.progress import track
from pipeline.recalibrate import RecalibrateOptions, norms, update_statistics

log = logging.getLogger(__name__)

Masks = dict[str, npt.NDArray[np.bool_]]


def learn_masks(
    module: nn.Module,
    magnitude: Mapping[str, npt.NDArray[np.bool_]],
    pattern: Pattern,
    how: Preprocessing,
    data: Dataset,
    options: LearnOptions,
) -> tuple[Masks, Learning]:
    """Choose masks by gradient descent over the patterns of each group.

    The magnitude masks are the prior and the candidate to beat: they are kept if no epoch comes closer to the dense network
    on `select`. In learning, BatchNorm uses batch statistics; for every judgement it is recalibrated, as the final network
    will be.

    Args:
        module: The dense model; neither its parameters nor its buffers change.
        magnitude: The starting masks by weight name.
        pattern: N:M.
        how: Preprocessing of the images.
        data: `train` for the gradient, `select` for the choice of the epoch.
        options: Schedule and seed.

    Returns:
        Masks by weight name, and what it took.

    Raises:
        InputError: The loss is not a number, or there are fewer images than two.
    """
    if len(data.train) < 2:
        raise InputError("too few images to learn from", found=f"{len(data.train)} in train", fix="give more images")
    started = time.monotonic()
    teacher = module.eval()
    student = copy.deepcopy(module).requires_grad_(False)
    # A weight under two names is one weight: it has one gate, and its mask every name.
    parameters = dict(student.named_parameters(remove_duplicate=False))
    owners = {name: next(n for n in magnitude if parameters[n] is parameters[name]) for name in magnitude}
    weights = {name: parameters[name].contiguous() for name in dict.fromkeys(owners.values())}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    gates = {name: Gates(weight, pattern, options.prior) for name, weight in weights.items()}
    optimiser = torch.optim.Adam([g.logits for g in gates.values()], lr=options.rate)

    best_masks: Masks = dict(magnitude)
    first = best = _judge(module, best_masks, how, data, options)
    log.info(
        "learning masks for %d layers, %d groups; on select, magnitude masks have %s", len(gates), _size(gates), first
    )
    steps = epochs = 0
    total = options.epochs * _steps_per_epoch(data, options)
    _prepare(student)
    for x, ends_epoch in track(_steps(data, how, options), "learn masks", total):
        tau = _temperature(_fraction(steps, total, started, options), options)
        images = torch.from_numpy(x)
        with torch.no_grad():
            target = teacher(images)
        drawn = {
            name: gate.sample(weights[name], tau, _seed(options.seed, steps, i))
            for i, (name, gate) in enumerate(gates.items())
        }
        masked = {name: drawn[owner] for name, owner in owners.items()}
        loss = _distillation(functional_call(student, masked, (images,)), target, options.softness)
        if not bool(loss.isfinite()):
            raise InputError(
                "the loss is not a number",
                where=f"epoch {epochs + 1}, step {steps + 1}",
                fix="check the weights and the images' normalisation, or lower the learning rate",
            )
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        steps += 1
        spent = options.budget_minutes is not None and _minutes(started) > options.budget_minutes
        if ends_epoch or spent:
            epochs += 1
            masks = {name: gates[owner].mask() for name, owner in owners.items()}
            found = _judge(module, masks, how, data, options)
            log.info("epoch %d/%d: %s", epochs, options.epochs, found)
            if found.divergence < best.divergence:
                best_masks, best = masks, found
        if spent:
            log.info("the budget of %g minutes is spent", options.budget_minutes)
            break
    if any(not torch.equal(before[name], weight) for name, weight in weights.items()):
        raise AssertionError("learning masks changed a weight")
    return best_masks, Learning(
        recipe="maskplan",
        epochs=epochs,
        steps=steps,
        images=len(data.train),
        seconds=round(time.monotonic() - started, 3),
        groups_changed=_groups_changed(magnitude, best_masks, pattern),
        select_divergence_start=first.divergence,
        select_divergence_end=best.divergence,
        select_top1_start=first.top1,
        select_top1_end=best.top1,
    )


@dataclass(frozen=True)
class Judgement:
    """Masks on the `select` part: divergence from the dense network, and top-1 in percent."""

    divergence: float
    top1: float

    def __str__(self) -> str:
        return f"divergence {self.divergence:.4f}, top-1 {self.top1:.2f}%"


def _judge(module: nn.Module, masks: Masks, how: Preprocessing, data: Dataset, options: LearnOptions) -> Judgement:
    """Judge masks in a copy of the model whose statistics are recalibrated.

    Divergence chooses, for it tells masks apart where a small `select` part gives all of them the same top-1.
    """
    candidate = copy.deepcopy(module)
    parameters = dict(candidate.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].masked_fill_(~torch.from_numpy(mask), 0.0)
    update_statistics(candidate, data.train, how, RecalibrateOptions(seed=options.seed))
    divergence, right = 0.0, 0
    with torch.no_grad():
        for x, labels in batches(data.select, how, options.batch):
            images = torch.from_numpy(x)
            logits = candidate(images)
            divergence += float(_distillation(logits, module(images), options.softness)) * len(x)
            right += int((logits.argmax(dim=1).numpy() == labels).sum())
    if not math.isfinite(divergence):
        raise InputError(
            "the loss is not a number",
            where="the select part",
            fix="check the weights and the images' normalisation",
        )
    return Judgement(divergence / len(data.select), 100 * right / len(data.select))


def _seed(*parts: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _prepare(student: nn.Module) -> None:
    student.eval()
    for norm in norms(student):
        norm.train()


def _steps_per_epoch(data: Dataset, options: LearnOptions) -> int:
    return max(len(data.train) // options.batch, 1)


def _steps(data: Dataset, how: Preprocessing, options: LearnOptions) -> Iterator[tuple[npt.NDArray[np.float32], bool]]:
    """The images of every step, and whether it is its epoch's last.

    Epochs are full batches in a fresh seeded order; a set smaller than a batch is one batch.
    """
    count = _steps_per_epoch(data, options)
    for epoch in range(options.epochs):
        order = np.random.default_rng((options.seed, epoch)).permutation(len(data.train))[: count * options.batch]
        for step, (x, _) in enumerate(batches(data.train, how, options.batch, order), start=1):
            yield x, step == count


def _fraction(step: int, total: int, started: float, options: LearnOptions) -> float:
    """How much of the learning is done, 0 to 1, by steps or by the budget of time, whichever is further."""
    fraction = step / max(total - 1, 1)
    if options.budget_minutes is not None:
        fraction = max(fraction, _minutes(started) / options.budget_minutes if options.budget_minutes else 1.0)
    return min(fraction, 1.0)


def _minutes(started: float) -> float:
    return (time.monotonic() - started) / 60


def _temperature(fraction: float, options: LearnOptions) -> float:
    return float(options.tau_start * (options.tau_end / options.tau_start) ** fraction)


def _distillation(student: torch.Tensor, teacher: torch.Tensor, softness: float) -> torch.Tensor:
    """KL divergence from the dense network's softened probabilities (Hinton et al. 2015)."""
    log_p, log_q = F.log_softmax(student / softness, dim=1), F.log_softmax(teacher / softness, dim=1)
    return softness**2 * F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def _size(gates: Mapping[str, Gates]) -> int:
    return sum(gate.logits[..., 0].numel() for gate in gates.values())


def _groups_changed(old: Mapping[str, npt.NDArray[np.bool_]], new: Masks, pattern: Pattern) -> float:
    """Share of groups whose pattern differs, 0 to 1."""
    changed = [(group(old[name], pattern.m) != group(new[name], pattern.m)).any(axis=-1) for name in new]
    return float(sum(int(c.sum()) for c in changed) / max(sum(c.size for c in changed), 1))
