"""Evaluation of masks on the `select` part, and the distillation loss that it shares with training."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.choices import CHANNEL, FLAT, Layout
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.dataset import Dataset, batches, require_select
from maskplan.pipeline.learning.masked_net import Masks
from maskplan.pipeline.learning.options import LearnOptions
from maskplan.pipeline.masking.patterns import group
from maskplan.pipeline.models.batchnorm import RecalibrateOptions, update_statistics


@dataclass(frozen=True)
class MaskScore:
    """Score of masks on the `select` part: divergence from the dense network, and top-1 accuracy in percent."""

    divergence: float
    top1: float

    def __str__(self) -> str:
        return f"divergence {self.divergence:.4f}, top-1 {self.top1:.2f}%"


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, distill_temperature: float) -> torch.Tensor:
    """KL divergence from the teacher's softened probabilities, mean over the images (Hinton et al. 2015).

    Args:
        student: Logits (N, classes).
        teacher: Logits (N, classes).
        distill_temperature: Temperature T; the result is scaled by T^2 to keep gradients at the scale of T = 1.

    Returns:
        A scalar.
    """
    log_p, log_q = (
        F.log_softmax(student / distill_temperature, dim=1),
        F.log_softmax(teacher / distill_temperature, dim=1),
    )
    return distill_temperature**2 * F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


class MaskEvaluator:
    """Scores masks in a copy of the dense network with recalibrated BatchNorm, like the final network's.

    Masks are chosen by divergence: on a small `select` part, different masks often have the same top-1 accuracy.

    Args:
        dense: The dense network, in evaluation mode.
        preprocessing: Preprocessing of the images.
        data: `train` for BatchNorm statistics, `select` for the score.
        options: Uses `distill_temperature` for the divergence, `batch` as batch size, `seed` to draw the images for the
            statistics and `judge_augment` to augment these.
    """

    def __init__(self, dense: nn.Module, preprocessing: Preprocessing, data: Dataset, options: LearnOptions) -> None:
        require_select(data.select)
        self._dense, self._preprocessing, self._data = dense, preprocessing, data
        self._temperature, self._batch = options.distill_temperature, options.batch
        self._recalibrate = RecalibrateOptions(seed=options.seed, augment=options.judge_augment)
        self._teacher: list[torch.Tensor] = []

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
        update_statistics(candidate, self._data.train, self._preprocessing, self._recalibrate)
        divergence, correct, first = 0.0, 0, not self._teacher
        with torch.no_grad():
            for i, (x, labels) in enumerate(batches(self._data.select, self._preprocessing, self._batch)):
                images = torch.from_numpy(x).to(device)
                if first:
                    self._teacher.append(self._dense(images))
                logits = candidate(images)
                divergence += float(distillation_loss(logits, self._teacher[i], self._temperature)) * len(x)
                correct += int((logits.argmax(dim=1).cpu().numpy() == labels).sum())
        if not math.isfinite(divergence):
            fix = "check the weights and the images' normalization"
            raise InputError("the divergence is not finite", where="the select part", fix=fix)
        count = len(self._data.select)
        return MaskScore(divergence / count, 100 * correct / count)


def fraction_changed(old: Masks, new: Masks, m: int, layout: Layout = CHANNEL) -> float:
    """Fraction of groups of `m` whose pattern differs, 0 to 1."""
    changed = total = 0
    for name, mask in new.items():
        differs = group(old[name] != mask, m, layout, pad=layout == FLAT).any(axis=-1)
        changed, total = changed + int(np.count_nonzero(differs)), total + differs.size
    return changed / max(total, 1)
