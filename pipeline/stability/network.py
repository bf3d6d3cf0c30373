"""A network as a graph of maps with known Lipschitz constants."""

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
    """A zero-padded convolution and the BatchNorm behind it, if any."""

    weight: str
    bias: str | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    norm: BatchNorm | None = None


@dataclass(frozen=True)
class Linear:
    """A linear layer on the last dimension and the BatchNorm behind it, if any."""

    weight: str
    bias: str | None
    norm: BatchNorm | None = None


@dataclass(frozen=True)
class Scale:
    """A BatchNorm that is not folded into a layer."""

    norm: BatchNorm


@dataclass(frozen=True)
class Operator:
    """An operator of one tensor without parameters.

    Attributes:
        target: The ATen overload.
        args: Positional arguments after the tensor.
        kwargs: Keyword arguments.
        lipschitz: Upper bound of its Lipschitz constant, in the Euclidean norm of an image's values.
        at_zero: |f(0)| of an activation f, such as 1/2 for sigmoid; 0 for all other operators.
        is_pooling: It is a pooling or a mean.
        is_rectifier: It maps all negative values to 0.
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
    """The same values, in the same order, in the node's shape."""


@dataclass(frozen=True)
class Sum:
    """The inputs times `factors`, added up, plus `constant`; one input is a scaling."""

    factors: tuple[float, ...]
    constant: float = 0.0


@dataclass(frozen=True)
class Cat:
    """A concatenation along a dimension of the batch."""

    dim: int


Op = Conv | Linear | Scale | Operator | Reshape | Sum | Cat


Weighted = (Conv, Linear, Scale)


@dataclass(frozen=True)
class Node:
    """One step.

    Attributes:
        name: Path of the module that it belongs to.
        op: The operation; None for the images.
        inputs: Numbers of the nodes that it reads, all smaller than its own.
        shape: Shape of its result for one image.
    """

    name: str
    op: Op | None
    inputs: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Network:
    """Nodes in order of computation: the images first, the logits last; the logits depend on every node."""

    nodes: tuple[Node, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the nodes with weights."""
        return tuple(i for i, node in enumerate(self.nodes) if isinstance(node.op, Weighted))

    @property
    def last_uses(self) -> tuple[int, ...]:
        """The last node that reads each node; for the logits, the logits themselves."""
        last = list(range(len(self.nodes)))
        for i, node in enumerate(self.nodes):
            for read in node.inputs:
                last[read] = i
        return tuple(last)


@dataclass(frozen=True, eq=False)
class Affine:
    """The affine map of a layer, BatchNorm folded in, float64.

    Attributes:
        weight: In the layer's shape; (C,) for a BatchNorm that is not folded.
        bias: (K,).
        frobenius: Frobenius norm of the weight before folding; 0 for a BatchNorm that is not folded.
        gain: The largest magnitude of the factors by which folding multiplies filters.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    frobenius: float
    gain: float


Maps = Mapping[int, Affine]


def affine_maps(network: Network, state: Mapping[str, torch.Tensor]) -> dict[int, Affine]:
    """The affine maps of the layers, by node, with the weights and statistics of a state dict."""
    return {i: _affine(network.nodes[i].op, state) for i in network.layers}


def apply_node(node: Node, affine: Affine | None, values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute a node from the values of its inputs; `affine` is the map of a layer."""
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
        result: torch.Tensor = op.target(x, *op.args, **dict(op.kwargs))
        return result
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
