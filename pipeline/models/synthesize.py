"""Images from the network itself: pixels under which the inputs of its BatchNorm layers have the stored statistics.

The statistics are all that a checkpoint still knows of its training images (Cai et al. 2020, ZeroQ; Yin et al. 2020,
DeepInversion).
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Preprocessing, Provenance
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.progress import track
from maskplan.pipeline.core.validation import above, at_least
from maskplan.pipeline.data.dataset import Dataset
from maskplan.pipeline.data.synthetic import synthetic_dataset
from maskplan.pipeline.models.dense_statistics import named_batchnorms
from maskplan.pipeline.models.device import choose_device

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm

# The first images are this many times coarser than the pixels, plus noise: neighbors are alike, as in photographs.
_COARSENESS, _FINE_NOISE = 4, 0.5


@dataclass(frozen=True)
class SynthesizeOptions:
    """How images are made.

    Attributes:
        images: How many.
        steps: Of gradient descent, for each batch.
        batch: Images that share the statistics.
        lr: Adam's peak learning rate, in units of the preprocessed images; it decays along a cosine to zero.
        smoothness: Weight of the mean absolute difference of neighboring pixels.
        seed: Of the first images.
    """

    images: int = 256
    steps: int = 120
    batch: int = 128
    lr: float = 0.05
    smoothness: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(16, images=self.images)
        at_least(1, steps=self.steps)
        at_least(2, batch=self.batch)
        at_least(0, smoothness=self.smoothness, seed=self.seed)
        above(0, lr=self.lr)


def synthesize_images(
    module: nn.Module, provenance: Provenance, options: SynthesizeOptions, device: str = "auto"
) -> npt.NDArray[np.uint8]:
    """Make images by gradient descent on their pixels; the module does not change.

    Args:
        module: A trained network with BatchNorm.
        provenance: Of its weights; the preprocessing has the size and the normalization of the images.
        options: How many, and how.
        device: Where the network runs: `auto`, `cpu` or `cuda`.

    Returns:
        (N, H, W, channels).

    Raises:
        InputError: The network has random weights or no BatchNorm, or its statistics are not finite.
    """
    import torch

    if not provenance.trained:
        raise InputError("images cannot be synthesized from random weights", fix="give --weights FILE")
    if not named_batchnorms(module):
        raise InputError(
            "images can only be synthesized for a network with BatchNorm",
            found="no layer that keeps running statistics",
            fix="give images with --data",
        )
    preprocessing, place = provenance.preprocessing, choose_device(device)
    if preprocessing.channels not in (1, 3):
        raise InputError(
            "images can only be synthesized with one or three channels",
            found=f"{preprocessing.channels} channels",
            fix="give samples with --data",
        )
    network = copy.deepcopy(module).eval().requires_grad_(False).to(place)
    differences: list[torch.Tensor] = []
    for layer in named_batchnorms(network).values():
        layer.register_forward_pre_hook(_observer(differences))
    mean, std = (torch.tensor(v, device=place).view(1, -1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    black, white = (0 - mean) / std, (1 - mean) / std
    generator = torch.Generator().manual_seed(options.seed)
    sizes = [len(part) for part in np.array_split(range(options.images), -(-options.images // options.batch))]
    steps = track(range(len(sizes) * options.steps), "synthesize images", len(sizes) * options.steps)
    made = []
    for size in sizes:
        pixels = _first_images(size, preprocessing, generator).to(place).clamp(black, white).requires_grad_(True)
        adam = torch.optim.Adam([pixels], options.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, options.steps)
        for _ in itertools.islice(steps, options.steps):
            differences.clear()
            network(pixels)
            loss = torch.stack(differences).mean() + options.smoothness * _roughness(pixels)
            if not bool(loss.isfinite()):
                raise InputError("the statistics of BatchNorm are not finite", fix="check the weights")
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            schedule.step()
            with torch.no_grad():
                pixels.copy_(pixels.clamp(black, white))
        scaled = (pixels.detach() * std + mean) * 255
        made.append(scaled.round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.ascontiguousarray(np.concatenate(made))


def synthesize_dataset(
    module: nn.Module,
    provenance: Provenance,
    options: SynthesizeOptions,
    device: str = "auto",
) -> Dataset:
    """The same images as a data set."""
    pixels = synthesize_images(module, provenance, options, device)
    return synthetic_dataset(pixels, provenance.preprocessing, provenance.labels)


def _observer(differences: list[torch.Tensor]) -> Any:
    import torch

    def observe(layer: _BatchNorm, inputs: tuple[torch.Tensor, ...]) -> None:
        """Squared errors of the batch's mean, in standard deviations, and of its deviation, as the logarithm of a ratio."""
        assert layer.running_mean is not None
        assert layer.running_var is not None
        axes = [axis for axis in range(inputs[0].ndim) if axis != 1]
        variance, mean = torch.var_mean(inputs[0], axes)
        stored = layer.running_var + layer.eps
        of_mean = (mean - layer.running_mean).square() / stored
        of_deviation = (0.5 * torch.log((variance + layer.eps) / stored)).square()
        differences.append((of_mean + of_deviation).mean())

    return observe


def _first_images(count: int, preprocessing: Preprocessing, generator: torch.Generator) -> torch.Tensor:
    import torch
    from torch.nn import functional as F

    size = preprocessing.height, preprocessing.width
    coarse = torch.randn((count, preprocessing.channels, *(-(-s // _COARSENESS) for s in size)), generator=generator)
    fine = torch.randn((count, preprocessing.channels, *size), generator=generator)
    return F.interpolate(coarse, size, mode="bicubic") + _FINE_NOISE * fine


def _roughness(images: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of vertical neighbors, plus that of horizontal ones."""
    differences = [images.diff(dim=axis).abs() for axis in (2, 3) if images.shape[axis] > 1]
    return sum((d.mean() for d in differences), images.new_zeros(()))
