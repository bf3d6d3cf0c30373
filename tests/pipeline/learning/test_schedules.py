"""The schedules and the noise that training steps really use, recorded at the optimizer and at the gates."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from gray_images import PREPROCESSING, dataset, random_images
from torch import nn

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.learning.gates import Gates
from maskplan.pipeline.learning.options import LearnOptions
from maskplan.pipeline.learning.trainer import learn_masks
from maskplan.pipeline.masking.magnitude import magnitude_mask

OPTIONS = LearnOptions(epochs=4, batch=8, lr=0.5, tau_start=2.0, tau_end=0.5, noise_start=0.8, noise_end=0.2)
STEPS, LAYERS = 12, 2


@dataclasses.dataclass(frozen=True)
class Recording:
    """One learning rate per step, and temperature, noise scale and seed of each sample of a gate."""

    lr: list[float]
    tau: list[float]
    noise: list[float]
    seeds: list[int]


@pytest.fixture(scope="module")
def recording() -> Recording:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    names = ("2.weight", "5.weight")
    start = {name: magnitude_mask(net.state_dict()[name].numpy(), Pattern(2, 4)) for name in names}
    found = Recording([], [], [], [])
    step, sample = torch.optim.Adam.step, Gates.sample

    def recorded_step(self: torch.optim.Adam, *arguments: Any, **named: Any) -> Any:
        found.lr.append(float(self.param_groups[0]["lr"]))
        return step(self, *arguments, **named)

    def recorded_sample(self: Gates, weight: torch.Tensor, tau: float, seed: int, **named: Any) -> torch.Tensor:
        found.tau.append(tau)
        found.noise.append(named["noise"])
        found.seeds.append(seed)
        return sample(self, weight, tau, seed, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", recorded_step)
        patch.setattr(Gates, "sample", recorded_sample)
        learn_masks(net.eval(), start, Pattern(2, 4), PREPROCESSING, dataset(random_images(36), 24), OPTIONS)
    assert len(found.lr) == STEPS
    assert len(found.seeds) == STEPS * LAYERS
    return found


def test_the_learning_rate_decays_along_a_cosine_to_a_hundredth(recording: Recording) -> None:
    cosine = [0.5 * (1 + math.cos(math.pi * i / (STEPS - 1))) for i in range(STEPS)]
    assert recording.lr == pytest.approx([OPTIONS.lr * (0.01 + 0.99 * c) for c in cosine])


def test_noise_falls_linearly_and_temperature_geometrically(recording: Recording) -> None:
    assert recording.noise[::LAYERS] == recording.noise[1::LAYERS] == pytest.approx(np.linspace(0.8, 0.2, STEPS))
    assert recording.tau[::LAYERS] == recording.tau[1::LAYERS] == pytest.approx(np.geomspace(2.0, 0.5, STEPS))


def test_every_step_and_layer_has_its_own_noise(recording: Recording) -> None:
    assert len(set(recording.seeds)) == STEPS * LAYERS
