"""Random small networks, weights, masks, updates and images in float64, for testing bounds; determined by their seeds.

Some weights and images are drawn to come close to the bounds: equal values, signs, single spikes, and biases that cancel a
layer's outputs on the first image.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from operator_cases import CASES
from torch import nn
from torch.nn import functional as F

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.models.aten import export_aten
from maskplan.pipeline.stability.bounds import ForwardObservation, Pair, change_bounds, observe, pair_of
from maskplan.pipeline.stability.calls import name_of
from maskplan.pipeline.stability.network import Network, affine_maps
from maskplan.pipeline.stability.reader import read_program

State = dict[str, torch.Tensor]
Shape = tuple[int, int, int]

CASES_PER_NETWORK = 5
"""Operator cases in each network: networks 0, 1, ... take them in turn, so that the first `ALL_CASES` contain every case."""

ALL_CASES = -(-len(CASES) // CASES_PER_NETWORK)

ACTIVATIONS = (
    F.relu,
    F.relu,
    F.relu,
    F.gelu,
    F.silu,
    F.hardswish,
    F.hardsigmoid,
    torch.sigmoid,
    torch.tanh,
    F.relu6,
    partial(F.leaky_relu, negative_slope=0.2),
    nn.Identity(),
)


class Block(nn.Module):
    """Layers in sequence, each with or without BatchNorm and activation, joined with the block's input."""

    def __init__(
        self, layers: Sequence[nn.Module], activations: Sequence, joined: str, shortcut: nn.Module | None
    ) -> None:
        super().__init__()
        self.layers, self.shortcut = nn.ModuleList(layers), shortcut
        self.activations, self.joined = list(activations), joined

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for layer, activation in zip(self.layers, self.activations, strict=True):
            y = activation(layer(y))
        shortcut = x if self.shortcut is None else self.shortcut(x)
        if self.joined == "add":
            return F.relu(y + shortcut)
        if self.joined == "sum":
            return y + shortcut
        if self.joined == "difference":
            return 0.5 * (shortcut - y)
        if self.joined == "cat":
            return torch.cat([shortcut, y], 1)
        if self.joined == "shuffle":
            one, other = y.chunk(2, 1)
            return torch.cat([other, F.relu(one)], 1)
        if self.joined == "option A":
            half = y.shape[1] - x.shape[1]
            return F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half // 2, half - half // 2)))
        return y


class RandomNet(nn.Module):
    """Blocks, pooling, some of the operator cases in turn, and perhaps hidden layers and a head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        self.channels, self.size = int(rng.choice([1, 3, 4])), int(rng.choice([4, 5, 7, 8]))
        channels, size = self.channels, self.size
        steps: list[nn.Module] = []
        for _ in range(int(rng.integers(1, 3))):
            step, channels, size = _step(rng, channels, size)
            steps.append(step)
        shape = (channels, size, size)
        for number in range(CASES_PER_NETWORK):
            added = _operator_case(rng, (CASES_PER_NETWORK * seed + number) % len(CASES), shape)
            steps += added
            shape = _shape_after(nn.Sequential(*added), shape)
        self.steps = nn.Sequential(*steps)
        size = min(shape[1:])
        self.end = str(rng.choice(["mean", "adaptive", "flatten", "flatten"]))
        if self.end == "adaptive":
            self.pool = nn.AdaptiveAvgPool2d(int(rng.integers(1, size + 1)))
        with torch.no_grad():
            width = self.ended(torch.zeros(2, self.channels, self.size, self.size)).shape[1]
        hidden = [int(rng.choice([4, 8])) for _ in range(int(rng.integers(0, 2)))]
        self.hidden = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b) if rng.random() < 0.3 else nn.Identity())
            for a, b in zip([width, *hidden], hidden, strict=False)
        )
        # Every network has a layer.
        bare = not any(isinstance(m, nn.Conv2d | nn.Linear) for m in self.modules())
        ends = rng.random() < 0.8 or bare
        self.head = nn.Linear(hidden[-1] if hidden else width, int(rng.integers(2, 6))) if ends else None

    def ended(self, x: torch.Tensor) -> torch.Tensor:
        x = self.steps(x)
        if self.end == "mean":
            return x.mean((2, 3))
        return torch.flatten(self.pool(x) if self.end == "adaptive" else x, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.ended(x)
        for layer in self.hidden:
            x = F.relu(layer(x))
        return x if self.head is None else self.head(x)


def _operator_case(rng: np.random.Generator, number: int, shape: Shape) -> list[nn.Module]:
    """An operator case, perhaps behind a convolution, and smaller again if it is large."""
    modules: list[nn.Module] = []
    if rng.random() < 0.5:
        filters = int(rng.choice([shape[0], 4]))
        layer = _conv(rng, shape[0], filters, int(rng.choice([1, 3])), 1, 1)
        modules.append(layer)
        shape = _shape_after(layer, shape)
    case = list(CASES.values())[number](*shape)
    modules.append(case)
    channels, height, width = _shape_after(case, shape)
    if channels * height * width > 300:
        modules.append(nn.Conv2d(channels, 4, 3, 2, 1))
    return modules


def _shape_after(layer: nn.Module, shape: Shape) -> Shape:
    with torch.no_grad():
        channels, height, width = layer.eval()(torch.zeros(2, *shape)).shape[1:]
    return channels, height, width


def _step(rng: np.random.Generator, channels: int, size: int) -> tuple[nn.Module, int, int]:
    kind = rng.choice(["conv", "conv", "residual", "pool", "pool", "cat", "down"])
    if kind == "pool" and size >= 3:
        pool = _pool(rng)
        return pool, channels, _size_after(pool, size)
    if kind == "residual":
        count = int(rng.integers(1, 3))
        layers = [_conv(rng, channels, channels, 3, 1, 1) for _ in range(count)]
        shortcut = _conv(rng, channels, channels, 1, 1, 0) if rng.random() < 0.4 else None
        joined = str(rng.choice(["add", "add", "sum", "difference"]))
        return Block(layers, _activations(rng, count - 1, last=nn.Identity()), joined, shortcut), channels, size
    if kind == "down" and size >= 4:
        more = channels * 2
        if rng.random() < 0.5:
            layers, joined, shortcut = [_conv(rng, channels, more, 3, 2, 1)], "option A", None
        else:
            layers, joined, shortcut = [_conv(rng, channels, more, 3, 2, 1)], "add", _conv(rng, channels, more, 1, 2, 0)
        return Block(layers, [nn.Identity()], joined, shortcut), more, (size + 1) // 2
    if kind == "cat" and channels <= 8:
        return Block([_conv(rng, channels, 4, 3, 1, 1)], _activations(rng, 1), "cat", None), channels + 4, size
    kernel, stride, dilation = int(rng.integers(1, 4)), int(rng.integers(1, 3)), int(rng.integers(1, 3))
    if dilation * (kernel - 1) + 1 > size:
        dilation = kernel = 1
    filters = int(rng.choice([4, 8]))
    groups = int(rng.choice([1, 1, 1, channels])) if filters % channels == 0 else 1
    padding = int(rng.integers(0, kernel))
    layer = _conv(rng, channels, filters, kernel, stride, padding, dilation, groups)
    joined = "shuffle" if rng.random() < 0.2 else "none"
    return Block([layer], _activations(rng, 1), joined, None), filters, _size_after(layer[0], size)


def _conv(
    rng: np.random.Generator,
    channels: int,
    filters: int,
    kernel: int,
    stride: int,
    padding: int,
    dilation: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    layer = nn.Conv2d(channels, filters, kernel, stride, padding, dilation, groups, bias=bool(rng.random() < 0.6))
    return nn.Sequential(layer, *([nn.BatchNorm2d(filters)] if rng.random() < 0.4 else []))


def _activations(rng: np.random.Generator, count: int, last: nn.Module | None = None) -> list:
    found = [ACTIVATIONS[int(rng.integers(len(ACTIVATIONS)))] for _ in range(count)]
    return found if last is None else [*found, last]


def _pool(rng: np.random.Generator) -> nn.Module:
    kernel, stride = int(rng.integers(2, 4)), int(rng.choice([1, 1, 2, 3]))
    padding, ceil = int(rng.integers(0, 2)), bool(rng.random() < 0.3)
    if rng.random() < 0.6:
        return nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil)
    return nn.AvgPool2d(kernel, stride, padding, ceil, bool(rng.random() < 0.5))


def _size_after(layer: nn.Module, size: int) -> int:
    with torch.no_grad():
        channels = layer.in_channels if isinstance(layer, nn.Conv2d) else 1
        return layer(torch.zeros(1, channels, size, size)).shape[-1]


@dataclass(frozen=True, eq=False)
class Case:
    """Two sets of weights for one network, and images."""

    module: nn.Module
    network: Network
    first: State
    second: State
    masked: State
    dense: State
    images: torch.Tensor

    def logits(self, state: State) -> torch.Tensor:
        """What torch makes of the images."""
        with torch.no_grad():
            return torch.func.functional_call(self.module, state, (self.images,))

    def pair(self) -> Pair:
        return pair_of(self.network, affine_maps(self.network, self.first), affine_maps(self.network, self.second))


@cache
def architecture(seed: int) -> tuple[RandomNet, Network, frozenset[str]]:
    """A network in float64, the network as read, and the names of its exported operators."""
    torch.manual_seed(seed)
    module = RandomNet(seed).double().eval()
    shape = (module.channels, module.size, module.size)
    preprocessing = Preprocessing(*shape, 0, "bilinear", (0.0,) * module.channels, (1.0,) * module.channels)
    program = export_aten(module, preprocessing, whole_layers=True)
    calls = [node for node in program.graph.nodes if node.op == "call_function" and node.target is not operator.getitem]
    return module, read_program(program), frozenset(name_of(node.target) for node in calls)


def case(network: int, seed: int, images: int = 3) -> Case:
    """Random weights, masks and images for a random network."""
    module, graph, _ = architecture(network)
    rng = np.random.default_rng([network, seed])
    x = _images(rng, (images, module.channels, module.size, module.size))
    # Weights of the shared module are overwritten; results depend on the state dicts only.
    drawn = module
    _draw(drawn, rng)
    if rng.random() < 0.4:
        _cancel(drawn, x, rng)
    dense = {k: v.detach().clone() for k, v in drawn.state_dict().items()}
    masked = dict(dense)
    for name in _weights(drawn):
        if rng.random() < 0.8:
            masked[name] = torch.where(torch.from_numpy(random_mask(rng, dense[name].shape)), dense[name], 0.0)
    first, second = dense, masked
    kind = rng.choice(["mask", "mask", "recalibrated", "updated"])
    if kind == "recalibrated":
        second = masked | {k: _shifted(rng, k, v) for k, v in masked.items() if "running" in k}
    if kind == "updated":
        first, second = masked, _updated(rng, masked, _weights(drawn))
    return Case(drawn, graph, first, second, masked, dense, x)


def random_mask(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """2:4 along the input channels where they allow it, or any other pattern."""
    kind = rng.choice(["2:4", "2:4", "one for all filters", "any", "nothing"], p=[0.4, 0.2, 0.2, 0.15, 0.05])
    if kind == "nothing":
        return np.zeros(shape, bool)
    if kind != "any" and shape[1] % 4 == 0:
        filters = 1 if kind == "one for all filters" else shape[0]
        order = rng.random((filters, shape[1] // 4, 4, *shape[2:])).argsort(axis=2)
        return np.broadcast_to((order < 2).reshape(filters, *shape[1:]), shape).copy()
    return rng.random(shape) < rng.choice([0.1, 0.5, 0.9])


def update_within(case: Case, rho: float, layers: Sequence[int], rng: np.random.Generator) -> State:
    """The masked weights with an update on the border of the ball around them."""
    state = dict(case.masked)
    for i in layers:
        op = case.network.nodes[i].op
        name = getattr(op, "weight", None)
        if name is None:
            continue
        update = _values(rng, tuple(state[name].shape))
        if rng.random() < 0.5:
            update = update * (case.masked[name] != 0)
        size = float(update.norm())
        if size:
            state[name] = state[name] + update * (rho * float(case.dense[name].norm()) / size)
    return state


def violated(pair: Pair, observed: ForwardObservation, start: int = 0) -> bool:
    """Whether some node changes by more than its bound; rounding is left out."""
    return exceeds(observed, change_bounds(pair, observed, start), start)


def exceeds(observed: ForwardObservation, bounds: np.ndarray, start: int = 0) -> bool:
    rounding = 1e-11 * (observed.sizes_first + observed.sizes_second)
    return bool((observed.changes > bounds * (1 + 1e-9) + rounding)[start:].any())


def observe_case(case: Case) -> tuple[Pair, ForwardObservation]:
    pair = case.pair()
    return pair, observe(pair, case.images)


def _weights(module: nn.Module) -> list[str]:
    return [f"{n}.weight" for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def _values(rng: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    kind = rng.choice(["normal", "equal", "signs", "spike", "rows"], p=[0.4, 0.2, 0.2, 0.1, 0.1])
    values = rng.normal(size=shape)
    if kind == "equal":
        values = np.full(shape, rng.choice([-1.0, 1.0]))
    elif kind == "signs":
        values = np.sign(values)
    elif kind == "spike":
        values = np.where(rng.random(shape) < 1 / max(np.prod(shape[1:]), 2), values, 0.0)
    elif kind == "rows":
        values = np.broadcast_to(rng.normal(size=(1, *shape[1:])), shape).copy()
    return torch.from_numpy(values)


def _images(rng: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([_values(rng, shape[1:]) for _ in range(shape[0])]) * float(rng.choice([0.1, 1.0, 5.0]))


def _draw(module: nn.Module, rng: np.random.Generator) -> None:
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            if tensor.ndim > 1:
                fan = float(np.prod(tensor.shape[1:]))
                tensor.copy_(_values(rng, tuple(tensor.shape)) * rng.choice([0.3, 1.0, 3.0]) / fan**0.5)
            elif name.endswith("running_var"):
                tensor.copy_(torch.from_numpy(rng.uniform(0.2, 3.0, tensor.shape)))
            elif name.endswith("weight"):
                tensor.copy_(torch.from_numpy(rng.uniform(0.3, 2.0, tensor.shape) * rng.choice([-1, 1], tensor.shape)))
            else:
                tensor.copy_(torch.from_numpy(rng.normal(0, 0.5, tensor.shape)))


def _cancel(module: nn.Module, images: torch.Tensor, rng: np.random.Generator) -> None:
    """Choose biases so that what some layers make of the first image is 0 on average."""

    def center(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if isinstance(layer, nn.Linear):
            mean = output[0].reshape(-1, output.shape[-1]).mean(0)
            layer.bias -= mean
            return output - mean
        mean = output[0].flatten(1).mean(1)
        layer.bias -= mean
        return output - mean.view(-1, 1, 1)

    chosen = [
        m
        for m in module.modules()
        if isinstance(m, nn.Conv2d | nn.Linear) and m.bias is not None and rng.random() < 0.5
    ]
    hooks = [m.register_forward_hook(center) for m in chosen]
    with torch.no_grad():
        module(images)
    for hook in hooks:
        hook.remove()


def _shifted(rng: np.random.Generator, name: str, value: torch.Tensor) -> torch.Tensor:
    factor = torch.from_numpy(rng.uniform(0.5, 1.5, tuple(value.shape)))
    return value * factor if name.endswith("var") else value + 0.2 * (factor - 1)


def _updated(rng: np.random.Generator, masked: State, weights: Sequence[str]) -> State:
    """An update of some layers, none of whose zeros it fills."""
    found = dict(masked)
    for name in weights:
        if rng.random() < 0.5:
            size = rng.choice([1e-3, 0.1, 1.0])
            found[name] = masked[name] + size * _values(rng, tuple(masked[name].shape)) * (masked[name] != 0)
    return found
