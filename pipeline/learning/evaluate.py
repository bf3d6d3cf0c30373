"""How good masks are, by the `select` part."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.choices import CHANNEL, FLAT
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.dataset import Dataset, batches
from maskplan.pipeline.learning.masked_net import Masks
from maskplan.pipeline.learning.options import LearnOptions
from maskplan.pipeline.masking.patterns import group
from maskplan.pipeline.models.batchnorm import RecalibrateOptions, update_statistics


@dataclass(frozen=True)
class MaskScore:
    """Masks on the `select` part: divergence from the dense network, and top-1 in percent."""

    divergence: float
    top1: float

    def __str__(self) -> str:
        return f"divergence {self.divergence:.4f}, top-1 {self.top1:.2f}%"


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, distill_temperature: float) -> torch.Tensor:
    """KL divergence from the dense network's softened probabilities, mean over the images (Hinton et al. 2015)."""
    log_p, log_q = (
        F.log_softmax(student / distill_temperature, dim=1),
        F.log_softmax(teacher / distill_temperature, dim=1),
    )
    return distill_temperature**2 * F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


class MaskEvaluator:
    """Judges masks in a copy of the dense network whose statistics are recalibrated, as the final network's will be.

    Divergence chooses, for it tells masks apart where a small `select` part gives all of them the same top-1.

    Args:
        dense: The dense network, in evaluation mode.
        how: Preprocessing of the images.
        data: `train` for the statistics, `select` for the verdict.
        options: `distill_temperature` is the temperature of the divergence, `batch` the images a step, `seed` tells which images the
            statistics are of, and `judge_augment` what is done to these.
    """

    def __init__(self, dense: nn.Module, preprocessing: Preprocessing, data: Dataset, options: LearnOptions) -> None:
        self._dense, self._preprocessing, self._data = dense, preprocessing, data
        self._softness, self._batch = options.distill_temperature, options.batch
        self._recalibrate = RecalibrateOptions(seed=options.seed, augment=options.judge_augment)
        self._teacher: list[torch.Tensor] = []

    def __call__(self, masks: Masks) -> MaskScore:
        """MaskEvaluator masks by weight name.

        Raises:
            InputError: The outputs are not numbers.
        """
        candidate = copy.deepcopy(self._dense)
        parameters = dict(candidate.named_parameters(remove_duplicate=False))
        device = next(candidate.parameters()).device
        with torch.no_grad():
            for name, mask in masks.items():
                parameters[name].masked_fill_(~torch.from_numpy(mask).to(device), 0.0)
        update_statistics(candidate, self._data.train, self._preprocessing, self._recalibrate)
        divergence, right, first = 0.0, 0, not self._teacher
        with torch.no_grad():
            for i, (x, labels) in enumerate(batches(self._data.select, self._preprocessing, self._batch)):
                images = torch.from_numpy(x).to(device)
                if first:
                    self._teacher.append(self._dense(images))
                logits = candidate(images)
                divergence += float(distillation_loss(logits, self._teacher[i], self._softness)) * len(x)
                right += int((logits.argmax(dim=1).cpu().numpy() == labels).sum())
        if not math.isfinite(divergence):
            fix = "check the weights and the images' normalization"
            raise InputError("the loss is not a number", where="the select part", fix=fix)
        count = len(self._data.select)
        return MaskScore(divergence / count, 100 * right / count)


def fraction_changed(old: Masks, new: Masks, m: int, layout: str = CHANNEL) -> float:
    """Share of groups of `m` whose choice differs, 0 to 1."""
    moved = total = 0
    for name, mask in new.items():
        differs = group(old[name] != mask, m, layout, pad=layout == FLAT).any(axis=-1)
        moved, total = moved + int(np.count_nonzero(differs)), total + differs.size
    return moved / max(total, 1)
