"""Small networks with weights as of trained ones, and the permute stage on them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from maskplan.pipeline.core.artifacts import Preprocessing, Provenance
from maskplan.pipeline.masking.patterns import parse_pattern
from maskplan.pipeline.masking.policy import LayerPolicy
from maskplan.pipeline.models.state_dict import fit_weights, read_weights
from maskplan.pipeline.permutation.permute import PermuteOptions, permute
from maskplan.pipeline.permutation.record import Permuted

PREPROCESSING = Preprocessing(3, 16, 16, 0, "bilinear", (0.5,) * 3, (0.25,) * 3)
PROVENANCE = Provenance("net", True, "w.pth", "ab" * 32, 5, (), PREPROCESSING)
QUICK = PermuteOptions(effort=0.002)


class Net(nn.Module):
    """A residual stream whose 16 channels are also read between others, so that quadruples are shared."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.one, self.bn = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.two = nn.Conv2d(32, 16, 1)
        self.few = nn.Conv2d(16, 6, 1)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.wide = nn.Conv2d(28, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.two(torch.relu(self.bn(self.one(x))))
        few = self.few(x)
        x = self.wide(torch.cat([self.grouped(few), x, few], 1))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Shared(nn.Module):
    """The channels of `one` and `two` alternate in what `three` reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.three, self.head = nn.Conv2d(16, 24, 3), nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.cat([self.one(x), torch.relu(self.two(x))], 1).unflatten(1, (2, 8)).transpose(1, 2).flatten(1, 2)
        return self.head(torch.relu(self.three(x)).mean((2, 3)))  # type: ignore[no-any-return]


def trained(seed: int = 0, build: Callable[[], nn.Module] = Net) -> nn.Module:
    """Weights whose rows and columns differ in scale, as those of trained networks do."""
    torch.manual_seed(seed)
    module = build().eval()
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.ndim > 1:
                tensor *= torch.randn(tensor.shape[0], 1).exp().view(-1, *[1] * (tensor.ndim - 1))
                tensor *= torch.randn(1, tensor.shape[1]).exp().view(1, -1, *[1] * (tensor.ndim - 2))
            elif name.endswith(("running_var", "bn.weight")):
                tensor.uniform_(0.5, 2)
    return module


def run(
    module: nn.Module, folder: Path, pattern: str = "2:4", made: Provenance = PROVENANCE, linear: bool = False
) -> Permuted:
    policy = LayerPolicy(include_linear=linear)
    files = folder / "permuted.safetensors", folder / "order.safetensors"
    return permute(module, made, parse_pattern(pattern), policy, QUICK, *files)


def loaded(module: nn.Module, done: Permuted) -> nn.Module:
    other = copy.deepcopy(module)
    fit_weights(other, read_weights(done.checkpoint.path), where=done.checkpoint.path)
    return other
