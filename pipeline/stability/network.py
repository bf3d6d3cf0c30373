"""A network as a small graph of maps whose Lipschitz constants are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BatchNorm:
    """Names of a BatchNorm's tensors in the state dict."""

    weight: str | None
    bias: str | None
    mean: str
    variance: str
    eps: float


@dataclass(frozen=True)
class Conv:
    """A convolution with zero padding, and the BatchNorm behind it."""

    weight: str
    bias: str | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    norm: BatchNorm | None = None


@dataclass(frozen=True)
class Linear:
    """A product with the last dimension, and the BatchNorm behind it."""

    weight: str
    bias: str | None
    norm: BatchNorm | None = None


@dataclass(frozen=True)
class Scale:
    """A BatchNorm that follows no layer of its own."""

    norm: BatchNorm


@dataclass(frozen=True)
class Operator:
    """An operator of one tensor without parameters.

    Attributes:
        target: The ATen overload.
        arguments: What it takes behind the tensor.
        named: What it takes by name.
        factor: Its Lipschitz constant, an upper bound, in the Euclidean norm of an image's values.
        at_zero: What it makes of a zero; not 0 for activations such as sigmoid.
        is_pooling: It is a pooling.
        is_rectifier: It makes 0 of all that is below 0.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    lipschitz: float
    at_zero: float = 0.0
    is_pooling: bool = False
    is_rectifier: bool = False


@dataclass(frozen=True)
class Reshape:
    """The same values in the node's shape."""


@dataclass(frozen=True)
class Sum:
    """Inputs times numbers, added up, plus a constant."""

    factors: tuple[float, ...]
    constant: float = 0.0


@dataclass(frozen=True)
class Cat:
    """Inputs side by side along a dimension."""

    dim: int


Op = Conv | Linear | Scale | Operator | Reshape | Sum | Cat


Weighted = (Conv, Linear, Scale)


@dataclass(frozen=True)
class Node:
    """One step.

    Attributes:
        name: Path of the module that it belongs to.
        op: What it does; None for the images.
        inputs: Numbers of the nodes it reads, all smaller than its own.
        shape: Of its result, of one image.
    """

    name: str
    op: Op | None
    inputs: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Network:
    """Nodes in the order they are computed: the images first, the logits last, and every node leads to the logits."""

    nodes: tuple[Node, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the nodes with weights."""
        return tuple(i for i, node in enumerate(self.nodes) if isinstance(node.op, Weighted))

    @property
    def last_uses(self) -> tuple[int, ...]:
        """The last node that reads each node; that of the logits is their own."""
        last = list(range(len(self.nodes)))
        for i, node in enumerate(self.nodes):
            for read in node.inputs:
                last[read] = i
        return tuple(last)


@dataclass(frozen=True, eq=False)
class Affine:
    """What a layer computes, BatchNorm folded in, float64.

    Attributes:
        weight: Of the layer's shape; (C,) of a BatchNorm by itself.
        bias: (K,).
        frobenius: Norm of the weight before folding; 0 of a BatchNorm by itself.
        gain: The largest factor that folding multiplies a filter by, in magnitude.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    frobenius: float
    gain: float


Maps = Mapping[int, Affine]


def affine_maps(network: Network, state: Mapping[str, torch.Tensor]) -> dict[int, Affine]:
    """The layers' maps by their nodes' numbers, with the weights and statistics of a state dict."""
    return {i: _affine(network.nodes[i].op, state) for i in network.layers}


def apply_node(node: Node, affine: Affine | None, values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute a node from what it reads; `affine` is the map of a layer."""
    import torch
    from torch.nn import functional as F

    op, x = node.op, values[0]
    if affine is not None:
        if isinstance(op, Conv):
            return F.conv2d(x, affine.weight, affine.bias, op.stride, op.padding, op.dilation, op.groups)
        if isinstance(op, Linear):
            return F.linear(x, affine.weight, affine.bias)
        along = (-1, *(1,) * (x.ndim - 2))
        return x * affine.weight.view(along) + affine.bias.view(along)
    if isinstance(op, Operator):
        made: torch.Tensor = op.target(x, *op.args, **dict(op.kwargs))
        return made
    if isinstance(op, Sum):
        return sum((f * v for f, v in zip(op.factors, values, strict=True)), x.new_tensor(op.constant))
    if isinstance(op, Cat):
        return torch.cat(list(values), op.dim)
    return x.reshape(len(x), *node.shape)


def _affine(op: Op | None, state: Mapping[str, torch.Tensor]) -> Affine:
    import torch

    assert isinstance(op, Conv | Linear | Scale)

    def tensor(name: str) -> torch.Tensor:
        return state[name].detach().cpu().double()

    factor = offset = None
    if op.norm is not None:
        norm = op.norm
        factor = (tensor(norm.variance) + norm.eps).rsqrt()
        if norm.weight is not None:
            factor = factor * tensor(norm.weight)
        offset = -tensor(norm.mean) * factor
        if norm.bias is not None:
            offset = offset + tensor(norm.bias)
    if isinstance(op, Scale):
        assert factor is not None
        assert offset is not None
        return Affine(factor, offset, 0.0, 1.0)
    weight = tensor(op.weight)
    bias = weight.new_zeros(len(weight)) if op.bias is None else tensor(op.bias)
    frobenius, gain = float(torch.linalg.vector_norm(weight)), 1.0
    if factor is not None and offset is not None:
        weight = weight * factor.view(-1, *(1,) * (weight.ndim - 1))
        bias = bias * factor + offset
        gain = float(factor.abs().max())
    return Affine(weight, bias, frobenius, gain)
