"""What masks are learned against and scored by: each kind of output against the formula in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gray_images import PREPROCESSING, dataset, random_images
from torch import nn

from maskplan.pipeline.core.artifacts import OutputKind, Pattern
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.learning.evaluate import MaskEvaluator
from maskplan.pipeline.learning.options import LearnOptions
from maskplan.pipeline.learning.output_loss import output_loss
from maskplan.pipeline.learning.trainer import learn_masks
from maskplan.pipeline.masking.magnitude import magnitude_mask

TWO_FOUR = Pattern(2, 4)
PIXELS, BOXES, INDEX = OutputKind("pixels", "logits"), OutputKind("boxes", "values"), OutputKind("index", "values")


class Net(nn.Module):
    """Logits for each pixel, values, and an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.head = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> Any:
        y = torch.relu(self.wide(torch.relu(self.stem(x))))
        z = 3 * self.head(y)
        return {"pixels": z, "boxes": y.mean((2, 3)) * 1000, "index": z.argmax(1)}


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def softened(z: npt.NDArray[np.float64], axis: int, temperature: float) -> npt.NDArray[np.float64]:
    z = z / temperature
    return np.asarray(z - np.log(np.exp(z).sum(axis=axis, keepdims=True)))


def divergence(student: npt.NDArray[Any], teacher: npt.NDArray[Any], axis: int, temperature: float) -> float:
    p, q = (softened(z.astype(np.float64), axis, temperature) for z in (student, teacher))
    return float(temperature**2 * (np.exp(q) * (q - p)).sum(axis=axis).mean())


def loss_of(net: nn.Module, *kinds: OutputKind) -> Any:
    return output_loss(net, kinds, dataset(random_images(36), 24).select, PREPROCESSING, 8)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_logits_diverge_along_their_axis_as_a_mean_over_images_and_places(net: Net, axis: int) -> None:
    loss = loss_of(net, OutputKind("pixels", "logits", axis))
    student, teacher = torch.randn(3, 4, 2, 5), torch.randn(3, 4, 2, 5)
    found = float(loss((student,), (teacher,), 2.0))
    assert found == pytest.approx(divergence(student.numpy(), teacher.numpy(), axis, 2.0), rel=1e-5)


def test_values_count_relative_to_the_dense_networks_mean_square(net: Net) -> None:
    loss = loss_of(net, BOXES)
    images = torch.from_numpy(random_images(36).pixels[24:]).float().reshape(-1, 1, 2, 4)
    with torch.no_grad():
        dense = net((images / 255 - 0.5) / 0.25)["boxes"]
    assert loss.scales == (pytest.approx(float(dense.double().square().mean()), rel=1e-6),)
    assert float(loss((dense * 1.1,), (dense,), 2.0)) == pytest.approx(0.01, rel=1e-4)


def test_outputs_have_equal_weight_and_integers_none(net: Net) -> None:
    loss = loss_of(net, PIXELS, BOXES, INDEX)
    assert loss.kinds == (PIXELS, BOXES)
    student, teacher = ((torch.randn(3, 4, 2, 2), torch.randn(3, 8)) for _ in range(2))
    separate = [
        float(loss_of(net, kind)((own,), (dense,), 1.0))
        for kind, own, dense in zip((PIXELS, BOXES), student, teacher, strict=True)
    ]
    assert float(loss(student, teacher, 1.0)) == pytest.approx(np.mean(separate), rel=1e-5)
    with pytest.raises(InputError, match="no outputs that masks could be judged by"):
        loss_of(net, INDEX)


def test_outputs_whose_size_depends_on_the_masks_are_refused(net: Net) -> None:
    with pytest.raises(InputError, match="size of the output 'boxes' depends"):
        loss_of(net, BOXES)((torch.zeros(3, 8),), (torch.zeros(4, 8),), 1.0)


def test_masks_are_scored_and_learned_by_all_outputs_without_labels(net: Net) -> None:
    data = dataset(random_images(36), 24)
    kinds, options = (PIXELS, BOXES, INDEX), LearnOptions(epochs=6, batch=8, lr=0.3, init_std=0.5)
    names = ("wide.weight", "head.weight")
    start = {name: magnitude_mask(net.state_dict()[name].numpy(), TWO_FOUR) for name in names}
    learned, learning = learn_masks(net, start, TWO_FOUR, PREPROCESSING, data, options, kinds=kinds)
    score = MaskEvaluator(net, PREPROCESSING, data, options, kinds)
    for masks, found in ((start, learning.select_divergence_start), (learned, learning.select_divergence_end)):
        assert score(masks).divergence == pytest.approx(found, rel=1e-5)
        assert score(masks).top1 is None
    assert (learning.select_top1_start, learning.select_top1_end) == (None, None)
    assert learning.select_divergence_end < 0.8 * learning.select_divergence_start
    with torch.no_grad():
        x = (torch.from_numpy(random_images(36).pixels[24:]).float().reshape(-1, 1, 2, 4) / 255 - 0.5) / 0.25
        dense = {name: tensor.numpy() for name, tensor in net(x).items()}
        for name, mask in learned.items():
            dict(net.named_parameters())[name].mul_(torch.from_numpy(mask))
        masked = {name: tensor.numpy() for name, tensor in net(x).items()}
    error = np.square(masked["boxes"] - dense["boxes"]).mean() / np.square(dense["boxes"]).mean()
    by_hand = (divergence(masked["pixels"], dense["pixels"], 1, 2.0) + error) / 2
    assert learning.select_divergence_end == pytest.approx(by_hand, rel=1e-3)


def test_labels_are_asked_for_only_where_there_are_some(net: Net) -> None:
    data = dataset(random_images(36), 24)
    start = {"wide.weight": magnitude_mask(net.wide.weight.detach().numpy(), TWO_FOUR)}
    with pytest.raises(InputError, match="only be learned against the dense network"):
        learn_masks(net, start, TWO_FOUR, PREPROCESSING, data, LearnOptions(epochs=1, distill=0.5), kinds=(PIXELS,))
