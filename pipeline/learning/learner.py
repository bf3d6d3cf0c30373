"""One phase of learning masks: gates trained by Adam to match the dense network; the best epoch on `select` is kept."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from maskplan.pipeline.core.artifacts import OutputKind, Pattern, Preprocessing
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.interrupts import INTERRUPTS
from maskplan.pipeline.core.progress import track
from maskplan.pipeline.data.dataset import Dataset
from maskplan.pipeline.learning.batch_correction import BatchCorrection
from maskplan.pipeline.learning.blocks import Block, BlockMatcher
from maskplan.pipeline.learning.evaluate import MaskEvaluator, MaskScore, fraction_changed
from maskplan.pipeline.learning.features import FeatureMatcher, Matcher, find_features
from maskplan.pipeline.learning.masked_net import MaskedNet, Masks
from maskplan.pipeline.learning.memory_format import in_format, use_fastest_format
from maskplan.pipeline.learning.metrics import MetricsLog, MetricsRow
from maskplan.pipeline.learning.options import LearnerFiles, LearnOptions
from maskplan.pipeline.learning.output_loss import Outputs
from maskplan.pipeline.learning.processes import Process
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
from maskplan.pipeline.learning.state import LearnerState, Progress, load_state, save_state

log = logging.getLogger(__name__)

_LOG_EVERY = 50
_ESTIMATE_AFTER = 10
_SMOOTHING = 0.95


class NoGradientError(InputError):
    """The masks have no influence on the loss that a gradient shows."""

    def __init__(self) -> None:
        super().__init__(
            "masks cannot be learned: the model computes without gradients",
            fix="remove torch.no_grad() and .detach() from its forward, or choose layer-wise masks",
        )


class Learner:
    """One phase of learning: construct it, then call `run`. Arguments as for `learn_masks`.

    With `blocks`, each of them is matched by itself, and the network's outputs are not matched.
    """

    def __init__(
        self,
        module: nn.Module,
        start: Masks,
        pattern: Pattern,
        preprocessing: Preprocessing,
        data: Dataset,
        options: LearnOptions,
        process: Process,
        files: LearnerFiles,
        kinds: Sequence[OutputKind] = (),
        *,
        favor_start: bool,
        blocks: Sequence[Block] = (),
    ) -> None:
        self.constructed = time.monotonic()
        self.start, self.pattern, self.preprocessing, self.data = start, pattern, preprocessing, data
        self.options, self.process, self.files = options, process, files
        self.teacher = copy.deepcopy(module).eval().requires_grad_(False).to(process.device)
        self.memory_format = use_fastest_format(self.teacher, preprocessing)
        student = copy.deepcopy(self.teacher)
        self.net = MaskedNet(student, list(start), pattern, options.init_std, hard=options.hard).to(process.device)
        if favor_start:
            self.net.start_from(start, options.init_margin)
        self.parallel = DistributedDataParallel(self.net) if process.count > 1 else self.net
        self.adam = torch.optim.Adam(self.net.logits(), lr=options.lr, fused=True)
        self.average = [p.detach().clone() for p in self.net.logits()] if options.ema else []
        # Without `judge_relative`, the final statistics are not corrected, so those of a batch are not either.
        self.correction = BatchCorrection(self.teacher, student) if options.judge_relative else None
        self.evaluate = MaskEvaluator(self.teacher, preprocessing, data, options, kinds)
        self.blocks = bool(blocks)
        self.features: Matcher | None = None
        if blocks:
            self.features = BlockMatcher(self.teacher, student, blocks)
        elif options.match_features and (names := find_features(self.teacher, list(start), preprocessing)):
            self.features = FeatureMatcher(self.teacher, student, names)
        self.has_top1 = not kinds and bool((data.train.labels >= 0).all()) and not blocks
        self.loss = self.top1 = float("nan")
        self.row: MetricsRow | None = None

    def run(self, key: str) -> Progress:
        """Learn from the start, or resume from the checkpoint, which may be that of a finished phase."""
        per_epoch = steps_per_epoch(self.data.train, self.options, self.process.count)
        total = self.options.epochs * per_epoch
        progress = self._load_progress(key) or self._initial_progress()
        started = self.constructed - 60 * progress.minutes
        metrics = MetricsLog(self.files.log_dir) if self.files.log_dir is not None and self.process.is_main else None
        log.info(
            "%s: %d layers, %d groups, %d steps; start masks on select: %s",
            "learning masks, each block by itself" if self.blocks else "learning masks",
            len(self.start),
            self.net.groups(),
            total,
            progress.first,
        )
        batches = training_batches(
            self.data.train, self.preprocessing, self.options, progress.steps, self.process.rank, self.process.count
        )
        if self._is_out_of_time(progress):
            return progress
        first_step, timed_from = progress.steps, time.monotonic()
        try:
            for batch in track(batches, self._status, total, progress.steps):
                (progress.minutes,) = self.process.broadcast((time.monotonic() - started) / 60)
                fraction = fraction_done(progress.steps, total, progress.minutes, self.options)
                self._step(batch, fraction, progress)
                out_of_time = self._is_out_of_time(progress)
                ends = batch.ends_epoch or out_of_time
                if progress.steps == first_step + 1:
                    timed_from = time.monotonic()  # the first step includes compilation
                if progress.steps == first_step + 1 + _ESTIMATE_AFTER:
                    self._log_estimate((time.monotonic() - timed_from) / _ESTIMATE_AFTER, total, progress)
                if ends or progress.steps % _LOG_EVERY == 0:
                    score = self._end_epoch(progress, is_last=out_of_time) if ends else None
                    self.row = self._row(progress, fraction, score)
                    if metrics is not None:
                        metrics.write(self.row)
                interrupted = self.process.any(INTERRUPTS.pending is not None)
                if interrupted or ends or (self.options.save_every and progress.steps % self.options.save_every == 0):
                    self._save(key, progress)
                if interrupted:
                    raise KeyboardInterrupt
                if out_of_time or (self.options.patience and progress.stale >= self.options.patience):
                    reason = "time budget used up" if out_of_time else "no gain on select"
                    log.info("stopped after %d epochs: %s", progress.epochs, reason)
                    break
        finally:
            if metrics is not None:
                metrics.close()
        return progress

    def _log_estimate(self, seconds_per_step: float, total: int, progress: Progress) -> None:
        minutes = seconds_per_step * (total - progress.steps) / 60
        if self.options.budget_minutes is not None:
            minutes = min(minutes, self.options.budget_minutes - progress.minutes)
        of = "of learning by block " if self.blocks else ""
        log.info("about %.1f minutes %sleft", max(minutes, 0.0), of)

    def _initial_progress(self) -> Progress:
        score = self._score(self.start)
        return Progress(score, score, dict(self.start))

    def _load_progress(self, key: str) -> Progress | None:
        if self.files.checkpoint is None or not self.files.resume:
            return None
        state = load_state(self.files.checkpoint, key)
        if state is None:
            return None
        with torch.no_grad():
            for i, parameter in enumerate(self.net.logits()):
                parameter.copy_(state.logits[i])
                if state.adam:
                    moments = {n: t.to(self.process.device) for n, t in state.adam[i].items()}
                    self.adam.state[parameter] = moments
                if state.average:
                    self.average[i].copy_(state.average[i])
        log.info("resuming from step %d, after %.1f minutes of learning", state.progress.steps, state.progress.minutes)
        return state.progress

    def _step(self, batch: Batch, fraction: float, progress: Progress) -> None:
        for group in self.adam.param_groups:
            group["lr"] = learning_rate(fraction, self.options)
        self.adam.zero_grad()
        try:
            loss, top1 = self._forward(batch, fraction, progress)
            if not bool(loss.isfinite()):
                raise InputError(
                    "the loss is not finite",
                    where=f"epoch {progress.epochs + 1}, step {progress.steps + 1}",
                    fix="check the weights and the images' normalization, or lower the learning rate",
                )
            if not loss.requires_grad:
                raise NoGradientError
            loss.backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:  # the model's own code may raise anything
            log.debug("step %d", progress.steps + 1, exc_info=True)
            raise InputError(
                "a step of learning fails in the model's forward or backward pass",
                found=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
                fix="remove activation checkpointing and changes in place from its forward, set a smaller batch in [learn] "
                "if memory is short, or choose layer-wise masks",
            ) from error
        self.adam.step()
        for smoothed, parameter in zip(self.average, self.net.logits(), strict=False):
            smoothed.lerp_(parameter.detach(), 1 - self.options.ema)
        progress.steps += 1
        self.loss = _running_mean(self.loss, float(loss.detach()))
        if top1 is not None:
            self.top1 = _running_mean(self.top1, top1)

    def _forward(self, batch: Batch, fraction: float, progress: Progress) -> tuple[torch.Tensor, float | None]:
        """The loss of one batch, and the masked network's accuracy on it in percent, if it has labels."""
        images = in_format(torch.from_numpy(batch.images).to(self.process.device), self.memory_format)
        labels = torch.from_numpy(batch.labels).to(self.process.device)
        seeds = [
            derive_seed(self.options.seed, self.process.rank, progress.steps, i) for i in range(len(self.net.logits()))
        ]
        observing = self.features.observing() if self.features is not None else nullcontext()
        correcting = self.correction.observing() if self.correction is not None else nullcontext()
        autocast = torch.autocast(self.process.device.type, torch.bfloat16, enabled=self.process.device.type == "cuda")
        with observing, correcting, autocast:
            with torch.no_grad():
                # A copy: a network may change its input in place.
                target = self.evaluate.loss.select(self.teacher(images.clone()))
            tau, noise = temperature(fraction, self.options), noise_scale(fraction, self.options)
            returned, kept = self.parallel(images, tau, noise, seeds)
        outputs = tuple(tensor.float() for tensor in self.evaluate.loss.select(returned))
        loss = self._loss(outputs, tuple(tensor.float() for tensor in target), labels, kept)
        if not self.has_top1:
            return loss, None
        return loss, 100 * float((outputs[0].detach().argmax(1) == labels).float().mean())

    def _loss(self, outputs: Outputs, target: Outputs, labels: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        if self.blocks and self.features is not None:
            # Gates outside of the blocks get no gradient from them, but other processes wait for one.
            return self.features.loss() + (0 * kept if self.process.count > 1 else 0)
        weight = self.options.distill
        loss = weight * self.evaluate.loss(outputs, target, self.options.distill_temperature)
        if weight < 1:
            loss = loss + (1 - weight) * F.cross_entropy(outputs[0], labels)
        if self.features is not None:
            loss = loss + self.options.match_features * self.features.loss()
        return loss - self.options.norm_reward * kept if self.options.norm_reward else loss

    def _is_out_of_time(self, progress: Progress) -> bool:
        budget = self.options.budget_minutes
        return budget is not None and progress.minutes > budget

    def _score(self, masks: Masks) -> MaskScore:
        score = self.evaluate(masks) if self.process.is_main else MaskScore(0.0, 0.0, 0.0)
        top1 = math.nan if score.top1 is None else score.top1
        divergence, top1, loss = self.process.broadcast(score.divergence, top1, score.loss)
        return MaskScore(divergence, None if math.isnan(top1) else top1, loss)

    def _end_epoch(self, progress: Progress, *, is_last: bool) -> MaskScore | None:
        progress.epochs += 1
        masks = self.net.masks(self.average or None)
        is_last = is_last or progress.epochs >= self.options.epochs
        if progress.epochs % self.options.judge_every and not is_last:
            return None
        score = self._score(masks)
        progress.stale += 1
        if score.loss < progress.best.loss:
            progress.best_masks, progress.best, progress.stale = masks, score, 0
        log.info("epoch %d/%d: %s", progress.epochs, self.options.epochs, score)
        return score

    def _row(self, progress: Progress, fraction: float, score: MaskScore | None) -> MetricsRow:
        return MetricsRow(
            step=progress.steps,
            minutes=round(progress.minutes, 3),
            loss=self.loss,
            top1=self.top1 if self.has_top1 else None,
            tau=temperature(fraction, self.options),
            lr=learning_rate(fraction, self.options),
            entropy=self.net.entropy(),
            moved=fraction_changed(self.start, self.net.masks(), self.pattern.m),
            select_divergence=score.divergence if score else None,
            select_top1=score.top1 if score else None,
            select_loss=score.loss if score else None,
        )

    def _status(self) -> str:
        row = self.row
        if row is None:
            return "learn masks"
        top1 = "" if row.top1 is None else f", top-1 {row.top1:.1f}%"
        name = "learn masks by block" if self.blocks else "learn masks"
        return f"{name}: loss {row.loss:.4f}{top1}, entropy {row.entropy:.2f}, moved {row.moved:.0%}"

    def _save(self, key: str, progress: Progress) -> None:
        if self.files.checkpoint is None or not self.process.is_main:
            return
        adam = [dict(self.adam.state[p]) for p in self.net.logits()] if self.adam.state else []
        save_state(LearnerState(key, progress, list(self.net.logits()), adam, self.average), self.files.checkpoint)


def _running_mean(mean: float, value: float) -> float:
    return value if math.isnan(mean) else _SMOOTHING * mean + (1 - _SMOOTHING) * value
