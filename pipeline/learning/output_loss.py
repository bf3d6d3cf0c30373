"""How far a masked network's outputs are from the dense one's: what masks are learned against, and scored by.

Logits count by the divergence of their softmax along the axis of the classes, as a mean over images and places (pixels).
Values count by their squared error, relative to the mean square of the dense network's values. Several outputs have equal
weight. Outputs that are no floats do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from maskplan.pipeline.core.artifacts import OutputKind, Preprocessing
from maskplan.pipeline.core.choices import LOGITS
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.dataset import Split, batches
from maskplan.pipeline.models.module_outputs import named_tensors

Outputs = tuple[torch.Tensor, ...]
"""A network's outputs that count, in the order of `OutputLoss.kinds`."""

_SCALE_IMAGES = 64


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


@dataclass(frozen=True)
class OutputLoss:
    """The distance between two networks' outputs.

    Attributes:
        kinds: The outputs that count.
        scales: For each of them, the mean square of the dense network's values; 1 for logits.
        is_classifier: One output of logits (N, classes).
    """

    kinds: tuple[OutputKind, ...]
    scales: tuple[float, ...]
    is_classifier: bool

    def select(self, returned: object) -> Outputs:
        """The outputs that count, of what a module returned."""
        named = named_tensors(returned)
        if self.is_classifier:
            return tuple(named.values())
        return tuple(named[kind.name] for kind in self.kinds)

    def __call__(
        self, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], temperature: float
    ) -> torch.Tensor:
        """A scalar; `temperature` softens logits.

        Raises:
            InputError: The sizes of an output differ: they depend on its values.
        """
        losses = []
        for kind, scale, own, dense in zip(self.kinds, self.scales, student, teacher, strict=True):
            if own.shape != dense.shape:
                raise InputError(
                    f"the size of the output {kind.name!r} depends on the values of the network",
                    found=f"{tuple(dense.shape)} of the dense network, {tuple(own.shape)} of the masked one",
                    fix="let the model return what comes before such a selection of boxes or points",
                )
            if kind.kind == LOGITS:
                axis = kind.axis
                own, dense = (t.movedim(axis, 1) for t in (own, dense)) if axis != 1 else (own, dense)
                places = own[0, 0].numel()
                loss = distillation_loss(own, dense, temperature)
                losses.append(loss / places if places != 1 else loss)
            else:
                losses.append((own - dense).square().mean() / scale)
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def output_loss(
    dense: nn.Module,
    kinds: Sequence[OutputKind],
    split: Split,
    preprocessing: Preprocessing,
    batch: int,
) -> OutputLoss:
    """The loss for a network's outputs; the scales of values are measured on the first images of a split.

    Args:
        dense: The dense network, in evaluation mode.
        kinds: What it returns; empty for a classifier.
        split: Images, such as `select`.
        preprocessing: Of the images.
        batch: Images per batch.

    Raises:
        InputError: No output counts.
    """
    if not kinds:
        return OutputLoss((OutputKind("logits", LOGITS),), (1.0,), is_classifier=True)
    squares: dict[str, float] = {}
    elements: Counter[str] = Counter()
    device = next(dense.parameters()).device
    first = split.sample(_SCALE_IMAGES, 0)
    with torch.no_grad():
        for x, _ in batches(first, preprocessing, batch):
            for name, tensor in named_tensors(dense(torch.from_numpy(x).to(device))).items():
                if tensor.is_floating_point() and tensor.numel():
                    squares[name] = squares.get(name, 0.0) + float(tensor.double().square().sum())
                    elements[name] += tensor.numel()
    counted = tuple(kind for kind in kinds if kind.name in squares)
    if not counted:
        raise InputError(
            "the model has no outputs that masks could be judged by",
            found=", ".join(map(str, kinds)),
            fix="return values before they are rounded or chosen, as floats",
        )
    # Outputs that are zero throughout are compared as they are.
    scales = (1.0 if k.kind == LOGITS else squares[k.name] / elements[k.name] or 1.0 for k in counted)
    return OutputLoss(counted, tuple(scales), is_classifier=False)
