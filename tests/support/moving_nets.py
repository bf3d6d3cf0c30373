"""Small networks of any operators, and what moving their channels in every permitted way does to them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.models.layers import sample_input
from maskplan.pipeline.permutation.apply import Move, permuted_state
from maskplan.pipeline.permutation.groups import Axes, Group, find_groups

PREPROCESSING = Preprocessing(3, 16, 16, 0, "bilinear", (0.5,) * 3, (0.25,) * 3)


class Net(nn.Module):
    """Layers by name and a function of them: a network of an unknown class."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], torch.Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward(self, x)


def conv(c: int, k: int, size: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c, k, size, padding=size // 2, **options)


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """Parameters and statistics that differ from channel to channel."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point():
                if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
                    tensor.uniform_(0.5, 2, generator=generator)
                elif tensor.ndim < 2:
                    tensor.normal_(0, 0.3, generator=generator)
                elif not tensor.any():
                    tensor.normal_(0, 0.1, generator=generator)
    return module.eval()


def moved(module: nn.Module, groups: tuple[Group, ...], preprocessing: Preprocessing, seed: int = 0) -> float:
    """How far outputs move when all groups are shuffled, beside how far two images' outputs lie apart, in float64."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(group.size) for group in groups]
    moves = [
        Move(g, np.roll(o, 1) if (o == np.arange(g.size)).all() else o) for g, o in zip(groups, orders, strict=True)
    ]
    return difference(module, permuted_state(module.state_dict(), moves), preprocessing)


def difference(module: nn.Module, state: dict[str, torch.Tensor], preprocessing: Preprocessing) -> float:
    other = copy.deepcopy(module)
    other.load_state_dict(state)
    sample = sample_input(preprocessing, 2, seed=7).double()
    with torch.no_grad():
        before, after = (m.double().eval()(sample) for m in (copy.deepcopy(module), other))
    spread = (before[0] - before[1]).abs().max()
    assert spread > 0
    return float((before - after).abs().max() / spread)


def stays(module: nn.Module, preprocessing: Preprocessing = PREPROCESSING) -> Axes:
    """Assert that some groups can move, and that moving all of them changes nothing."""
    axes = find_groups(module, preprocessing)
    assert axes.movable
    assert moved(module, axes.movable, preprocessing) < 1e-9
    return axes


def sizes(axes: Axes) -> dict[str, int]:
    return {group.name: group.size for group in axes.movable}


def reasons(axes: Axes) -> dict[str, str]:
    """Why layers' channels are fixed, but for the ends of the network."""
    return {
        f.name: f.reason
        for f in axes.fixed
        if f.reason not in ("it is an input of the network", "it is an output of the network")
    }


def pooled(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def head(c: int) -> nn.Linear:
    return nn.Linear(c, 5)
