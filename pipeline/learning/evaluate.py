"""Evaluation of masks on the `select` part."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from maskplan.pipeline.core.artifacts import OutputKind, Preprocessing
from maskplan.pipeline.core.choices import CHANNEL, FLAT, Layout
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.dataset import Dataset, batches, require_select
from maskplan.pipeline.learning.masked_net import Masks
from maskplan.pipeline.learning.options import LearnOptions
from maskplan.pipeline.learning.output_loss import Outputs, output_loss
from maskplan.pipeline.masking.patterns import group
from maskplan.pipeline.models.batchnorm import RecalibrateOptions, dense_statistics, update_statistics

# Outputs of the dense network that are kept between evaluations; those of more images are computed again.
_MAX_KEPT_BYTES = 512 * 2**20


@dataclass(frozen=True)
class MaskScore:
    """Score of masks on the `select` part.

    Attributes:
        divergence: From the dense network, as `OutputLoss` measures it.
        top1: Accuracy in percent; None without labels or classes.
        loss: What masks are chosen by, as they are learned: the divergence, and the cross-entropy with the labels in the
            share that `distill` leaves to it.
    """

    divergence: float
    top1: float | None
    loss: float

    def __str__(self) -> str:
        top1 = "" if self.top1 is None else f", top-1 {self.top1:.2f}%"
        loss = "" if self.loss == self.divergence else f"loss {self.loss:.4f}, "
        return f"{loss}divergence {self.divergence:.4f}{top1}"


class MaskEvaluator:
    """Scores masks in a copy of the dense network with recalibrated BatchNorm, like the final network's.

    Masks are chosen by the loss: on a small `select` part, different masks often have the same top-1 accuracy.

    Args:
        dense: The dense network, in evaluation mode.
        preprocessing: Preprocessing of the images.
        data: `train` for BatchNorm statistics, `select` for the score.
        options: Uses `distill` and `distill_temperature` for the loss, `batch` as batch size, `seed` to draw the images for
            the statistics, `judge_augment` and `judge_relative` for these.
        kinds: What the network returns; empty for a classifier.

    Attributes:
        loss: The divergence; training uses it too.
    """

    def __init__(
        self,
        dense: nn.Module,
        preprocessing: Preprocessing,
        data: Dataset,
        options: LearnOptions,
        kinds: Sequence[OutputKind] = (),
    ) -> None:
        require_select(data.select)
        self.loss = output_loss(dense, kinds, data.select, preprocessing, options.batch)
        self._dense, self._preprocessing, self._data = dense, preprocessing, data
        self._temperature, self._batch = options.distill_temperature, options.batch
        self._recalibrate = RecalibrateOptions(
            seed=options.seed, augment=options.judge_augment, relative=options.judge_relative
        )
        self._reference = dense_statistics(dense, data.train, preprocessing, self._recalibrate)
        self._has_top1 = self.loss.is_classifier and bool((data.select.labels >= 0).all())
        self._distill = options.distill if self._has_top1 else 1.0
        self._teacher: list[Outputs] = []
        self._kept_bytes = 0

    def __call__(self, masks: Masks) -> MaskScore:
        """Score masks, given by weight name.

        Raises:
            InputError: The outputs are not finite.
        """
        candidate = copy.deepcopy(self._dense)
        parameters = dict(candidate.named_parameters(remove_duplicate=False))
        device = next(candidate.parameters()).device
        with torch.no_grad():
            for name, mask in masks.items():
                parameters[name].masked_fill_(~torch.from_numpy(mask).to(device), 0.0)
        update_statistics(candidate, self._data.train, self._preprocessing, self._recalibrate, self._reference)
        divergence, cross_entropy, correct = 0.0, 0.0, 0
        with torch.no_grad():
            for i, (x, labels) in enumerate(batches(self._data.select, self._preprocessing, self._batch)):
                images = torch.from_numpy(x).to(device)
                teacher = self._dense_outputs(i, images)
                outputs = self.loss.select(candidate(images))
                divergence += float(self.loss(outputs, teacher, self._temperature)) * len(x)
                if self._has_top1:
                    correct += int((outputs[0].argmax(dim=1).cpu().numpy() == labels).sum())
                if self._distill < 1:
                    targets = torch.from_numpy(labels).to(device)
                    cross_entropy += float(F.cross_entropy(outputs[0].float(), targets, reduction="sum"))
        if not math.isfinite(divergence):
            fix = "check the weights and the images' normalization"
            raise InputError("the divergence is not finite", where="the select part", fix=fix)
        count = len(self._data.select)
        divergence, cross_entropy = divergence / count, cross_entropy / count
        loss = self._distill * divergence + (1 - self._distill) * cross_entropy
        return MaskScore(divergence, 100 * correct / count if self._has_top1 else None, loss)

    def _dense_outputs(self, batch: int, images: torch.Tensor) -> Outputs:
        """The dense network's outputs for a batch of `select`, kept from the first evaluation as far as memory allows."""
        if batch < len(self._teacher):
            return self._teacher[batch]
        # A copy: a network may change its input in place.
        outputs = self.loss.select(self._dense(images.clone()))
        if not all(bool(tensor.isfinite().all()) for tensor in outputs):
            raise InputError(
                "the dense model's outputs are not finite",
                where="the select part",
                fix="check the weights and the images' normalization; return outputs before infinite values are put in",
            )
        self._kept_bytes += sum(tensor.nbytes for tensor in outputs)
        if batch == len(self._teacher) and self._kept_bytes <= _MAX_KEPT_BYTES:
            self._teacher.append(outputs)
        return outputs


def fraction_changed(old: Masks, new: Masks, m: int, layout: Layout = CHANNEL) -> float:
    """Fraction of groups of `m` whose pattern differs, 0 to 1."""
    changed = total = 0
    for name, mask in new.items():
        differs = group(old[name] != mask, m, layout, pad=layout == FLAT).any(axis=-1)
        changed, total = changed + int(np.count_nonzero(differs)), total + differs.size
    return changed / max(total, 1)
