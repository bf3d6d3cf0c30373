"""Learn masks: frozen weights, gates by Adam, distilled from the dense network; the best epoch on `select` wins."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from maskplan.pipeline.core.artifacts import Learning, Pattern, Preprocessing
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.interrupts import INTERRUPTS
from maskplan.pipeline.core.progress import track
from maskplan.pipeline.data.dataset import Dataset
from maskplan.pipeline.learning.evaluate import MaskEvaluator, MaskScore, distillation_loss, fraction_changed
from maskplan.pipeline.learning.masked_net import MaskedNet, Masks
from maskplan.pipeline.learning.metrics import MetricsLog, Row
from maskplan.pipeline.learning.options import LearnerFiles, LearnOptions
from maskplan.pipeline.learning.processes import Process, process
from maskplan.pipeline.learning.schedule import (
    Batch,
    derive_seed,
    fraction_done,
    learning_rate,
    noise_scale,
    steps_per_epoch,
    temperature,
    training_batches,
)
from maskplan.pipeline.learning.state import LearnerState, Progress, load_state, save_state, state_key
from maskplan.pipeline.models.state_dict import tensors_sha256

log = logging.getLogger(__name__)

_LOG_EVERY = 50
_ESTIMATE_AFTER = 10
_SMOOTHING = 0.95


def learn_masks(
    module: nn.Module,
    start: Mapping[str, npt.NDArray[np.bool_]],
    pattern: Pattern,
    preprocessing: Preprocessing,
    data: Dataset,
    options: LearnOptions,
    *,
    given: bool = False,
    images: tuple[str, ...] = (),
    files: LearnerFiles | None = None,
    device: str = "auto",
) -> tuple[Masks, Learning]:
    """Choose masks by gradient descent over the patterns of each group.

    The masks to start from are the candidate to beat: they are kept if no epoch comes closer to the dense network on
    `select`. In learning, BatchNorm uses batch statistics; for every judgment it is recalibrated, as the final network's
    will be.

    Args:
        module: The dense model; neither its parameters nor its buffers change.
        start: Masks by weight name: those by magnitude, which the gates' prior follows, or given ones.
        pattern: N:M.
        preprocessing: Preprocessing of the images.
        data: `train` for the gradient, `select` for the choice of the epoch.
        options: Schedule and seed.
        given: `start` is not by magnitude: raise its patterns by `options.init_margin`.
        images: Digests of the image sets, for the key of the learner's checkpoint.
        files: Where to keep checkpoint and metrics.
        device: `auto`, `cpu` or `cuda`.

    Returns:
        Masks by weight name, and what it took.

    Raises:
        InputError: The loss is not a number, or there are fewer images than two.
        HostError: The disk is full; the last whole checkpoint is still there.
        KeyboardInterrupt: After SIGINT or SIGTERM; the state is saved.
    """
    if len(data.train) < 2:
        raise InputError("too few images to learn from", found=f"{len(data.train)} in train", fix="give more images")
    files = files or LearnerFiles()
    masks = {name: np.asarray(mask) for name, mask in start.items()}
    before = tensors_sha256(module.state_dict())
    with process(device) as here, INTERRUPTS.deferred():
        learner = Learner(module, masks, pattern, preprocessing, data, options, here, files, given=given)
        progress = learner.run(state_key(options, before, masks, images))
    if tensors_sha256(module.state_dict()) != before:
        raise AssertionError("learning masks changed a parameter or a buffer")
    return progress.best_masks, Learning(
        recipe="maskplan",
        epochs=progress.epochs,
        steps=progress.steps,
        images=len(data.train),
        seconds=round(60 * progress.minutes, 3),
        groups_changed=fraction_changed(masks, progress.best_masks, pattern.m),
        select_divergence_start=progress.first.divergence,
        select_divergence_end=progress.best.divergence,
        select_top1_start=progress.first.top1,
        select_top1_end=progress.best.top1,
    )


class Learner:
    """One run of learning; `run` does it all. Arguments as of `learn_masks`."""

    def __init__(
        self,
        module: nn.Module,
        start: Masks,
        pattern: Pattern,
        preprocessing: Preprocessing,
        data: Dataset,
        options: LearnOptions,
        here: Process,
        files: LearnerFiles,
        *,
        given: bool,
    ) -> None:
        self.start, self.pattern, self.preprocessing, self.data = start, pattern, preprocessing, data
        self.options, self.here, self.files = options, here, files
        teacher = copy.deepcopy(module).eval().requires_grad_(False).to(here.device)
        self.teacher = teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        student = copy.deepcopy(self.teacher)
        self.net = MaskedNet(student, list(start), pattern, options.init_std, hard=options.hard).to(here.device)
        if given:
            self.net.start_from(start, options.init_margin)
        self.parallel = DistributedDataParallel(self.net) if here.count > 1 else self.net
        self.adam = torch.optim.Adam(self.net.logits(), lr=options.lr, fused=True)
        self.average = [p.detach().clone() for p in self.net.logits()] if options.ema else []
        self.judge = MaskEvaluator(self.teacher, preprocessing, data, options)
        self.loss = self.top1 = float("nan")
        self.row: Row | None = None

    def run(self, key: str) -> Progress:
        """Learn from the start or from where a checkpoint stands."""
        per_epoch = steps_per_epoch(self.data.train, self.options, self.here.count)
        total = self.options.epochs * per_epoch
        progress = self._resumed(key) or self._fresh()
        started = time.monotonic() - 60 * progress.minutes
        metrics = MetricsLog(self.files.log) if self.files.log is not None and self.here.is_first else None
        log.info(
            "learning masks: %d layers, %d groups, %d steps; on select, the starting masks have %s",
            len(self.start),
            self.net.groups(),
            total,
            progress.first,
        )
        batches = training_batches(
            self.data.train, self.preprocessing, self.options, progress.steps, self.here.rank, self.here.count
        )
        first_step, begun = progress.steps, time.monotonic()
        try:
            for batch in track(batches, self._told, total, progress.steps):
                (progress.minutes,) = self.here.agreed((time.monotonic() - started) / 60)
                fraction = fraction_done(progress.steps, total, progress.minutes, self.options)
                self._step(batch, fraction, progress)
                spent = self._is_spent(progress)
                ends = batch.ends_epoch or spent
                if progress.steps == first_step + 1:
                    begun = time.monotonic()  # the first step compiles
                if progress.steps == first_step + 1 + _ESTIMATE_AFTER:
                    minutes = (time.monotonic() - begun) / _ESTIMATE_AFTER * (total - progress.steps) / 60
                    log.info("about %.1f minutes to go", minutes)
                if ends or progress.steps % _LOG_EVERY == 0:
                    found = self._end_epoch(progress) if ends else None
                    self.row = self._row(progress, fraction, found)
                    if metrics is not None:
                        metrics.write(self.row)
                asked = self.here.any(INTERRUPTS.pending is not None)
                if asked or ends or (self.options.save_every and progress.steps % self.options.save_every == 0):
                    self._save(key, progress)
                if asked:
                    raise KeyboardInterrupt
                if spent or (self.options.patience and progress.stale >= self.options.patience):
                    log.info("stopped after %d epochs: %s", progress.epochs, "budget" if spent else "no gain on select")
                    break
        finally:
            if metrics is not None:
                metrics.close()
        return progress

    def _fresh(self) -> Progress:
        first = self._judged(self.start)
        return Progress(first, first, dict(self.start))

    def _resumed(self, key: str) -> Progress | None:
        if self.files.state is None or not self.files.resume:
            return None
        state = load_state(self.files.state, key)
        if state is None:
            return None
        with torch.no_grad():
            for i, parameter in enumerate(self.net.logits()):
                parameter.copy_(state.logits[i])
                if state.adam:
                    moments = {n: t.to(self.here.device) for n, t in state.adam[i].items()}
                    self.adam.state[parameter] = moments
                if state.average:
                    self.average[i].copy_(state.average[i])
        log.info("going on from step %d, after %.1f minutes of learning", state.progress.steps, state.progress.minutes)
        return state.progress

    def _step(self, batch: Batch, fraction: float, progress: Progress) -> None:
        images = torch.from_numpy(batch.images).to(self.here.device).contiguous(memory_format=torch.channels_last)
        labels = torch.from_numpy(batch.labels).to(self.here.device)
        seeds = [derive_seed(self.options.seed, self.here.rank, progress.steps, i) for i in range(len(self.net.logits()))]
        for group in self.adam.param_groups:
            group["lr"] = learning_rate(fraction, self.options)
        with torch.autocast(self.here.device.type, torch.bfloat16, enabled=self.here.device.type == "cuda"):
            with torch.no_grad():
                target = self.teacher(images)
            tau, noise = temperature(fraction, self.options), noise_scale(fraction, self.options)
            logits, kept = self.parallel(images, tau, noise, seeds)
        loss = self._loss(logits.float(), target.float(), labels, kept)
        if not bool(loss.isfinite()):
            raise InputError(
                "the loss is not a number",
                where=f"epoch {progress.epochs + 1}, step {progress.steps + 1}",
                fix="check the weights and the images' normalization, or lower the learning rate",
            )
        self.adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.adam.step()
        for average, parameter in zip(self.average, self.net.logits(), strict=False):
            average.lerp_(parameter.detach(), 1 - self.options.ema)
        progress.steps += 1
        self.loss = _running(self.loss, float(loss.detach()))
        self.top1 = _running(self.top1, 100 * float((logits.detach().argmax(1) == labels).float().mean()))

    def _loss(
        self, logits: torch.Tensor, target: torch.Tensor, labels: torch.Tensor, kept: torch.Tensor
    ) -> torch.Tensor:
        share = self.options.distill
        loss = share * distillation_loss(logits, target, self.options.distill_temperature)
        if share < 1:
            loss = loss + (1 - share) * F.cross_entropy(logits, labels)
        return loss - self.options.norm_reward * kept if self.options.norm_reward else loss

    def _is_spent(self, progress: Progress) -> bool:
        budget = self.options.budget_minutes
        return budget is not None and progress.minutes > budget

    def _judged(self, masks: Masks) -> MaskScore:
        found = self.judge(masks) if self.here.is_first else MaskScore(0.0, 0.0)
        return MaskScore(*self.here.agreed(found.divergence, found.top1))

    def _end_epoch(self, progress: Progress) -> MaskScore:
        progress.epochs += 1
        masks = self.net.masks(self.average or None)
        found = self._judged(masks)
        progress.stale += 1
        if found.divergence < progress.best.divergence:
            progress.best_masks, progress.best, progress.stale = masks, found, 0
        log.info("epoch %d/%d: %s", progress.epochs, self.options.epochs, found)
        return found

    def _row(self, progress: Progress, fraction: float, found: MaskScore | None) -> Row:
        return Row(
            step=progress.steps,
            minutes=round(progress.minutes, 3),
            loss=self.loss,
            top1=self.top1,
            tau=temperature(fraction, self.options),
            lr=learning_rate(fraction, self.options),
            entropy=self.net.entropy(),
            moved=fraction_changed(self.start, self.net.masks(), self.pattern.m),
            select_divergence=found.divergence if found else None,
            select_top1=found.top1 if found else None,
        )

    def _told(self) -> str:
        row = self.row
        if row is None:
            return "learn masks"
        return (
            f"learn masks: loss {row.loss:.4f}, top-1 {row.top1:.1f}%, entropy {row.entropy:.2f}, moved {row.moved:.0%}"
        )

    def _save(self, key: str, progress: Progress) -> None:
        if self.files.state is None or not self.here.is_first:
            return
        adam = [dict(self.adam.state[p]) for p in self.net.logits()] if self.adam.state else []
        save_state(LearnerState(key, progress, list(self.net.logits()), adam, self.average), self.files.state)


def _running(mean: float, value: float) -> float:
    return value if mean != mean else _SMOOTHING * mean + (1 - _SMOOTHING) * value
