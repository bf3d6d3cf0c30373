"""A module as a small graph of maps whose Lipschitz constants are known, read off its ATen operators."""

from __future__ import annotations

import logging
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import Preprocessing
from pipeline.errors import InputError, listed
from pipeline.layers import sample_input

if TYPE_CHECKING:
    import torch
    from torch import nn

# Images in the sample. One could be taken for a dimension of length 1.
_BATCH = 2


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
        pools: It is a pooling.
        rectifies: It makes 0 of all that is below 0.
    """

    target: Any
    arguments: tuple[Any, ...]
    named: tuple[tuple[str, Any], ...]
    factor: float
    at_zero: float = 0.0
    pools: bool = False
    rectifies: bool = False


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


def read_network(module: nn.Module, how: Preprocessing) -> Network:
    """Export a module, in evaluation mode, and translate its operators.

    Raises:
        InputError: `torch.export` refuses the module, or some operators have no bound; all are named.
    """
    program = _exported(module, how)
    reader = _Reader(program)
    for node in program.graph.nodes:
        reader.read(node)
    if reader.uncovered:
        raise InputError(
            "the bounds do not cover the model",
            found=listed(reader.uncovered),
            fix="bounds are for convolutions, linear layers, BatchNorm, pooling, sums, concatenations and activations;"
            " what was measured on images, as `compare` reports, holds for any model",
        )
    return reader.network()


def affine_maps(network: Network, state: Mapping[str, torch.Tensor]) -> dict[int, Affine]:
    """The layers' maps by their nodes' numbers, with the weights and statistics of a state dict."""
    return {i: _affine(network.nodes[i].op, state) for i in network.layers}


def apply(node: Node, affine: Affine | None, values: Sequence[torch.Tensor]) -> torch.Tensor:
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
        made: torch.Tensor = op.target(x, *op.arguments, **dict(op.named))
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


def _exported(module: nn.Module, how: Preprocessing) -> Any:
    import torch

    sample = sample_input(how, _BATCH)
    for parameter in module.parameters():
        sample = sample.to(parameter)
        break
    try:
        with _quiet(), torch.no_grad():
            # Without changes in place, but with whole layers: an empty table leaves operators as they are.
            return torch.export.export(module.eval(), (sample,)).run_decompositions({})
    except Exception as error:  # the exporter raises whatever the model's code leads it to
        raise InputError(
            "the bounds do not cover the model: torch.export cannot read its operators",
            found=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
            fix="rewrite what depends on values of the input",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs and prints what it raises anyway."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(StringIO()), redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _UncoveredError(Exception):
    """An operator, or its use, without a bound; the message says why where its name does not."""


@dataclass(frozen=True)
class _Call:
    """An operator of the exported graph: its arguments by name, tensors as `fx.Node`; shapes of one image."""

    target: Any
    name: str
    args: dict[str, Any]
    shape: tuple[int, ...]
    given: tuple[Any, ...]
    named: tuple[tuple[str, Any], ...]


class _Reader:
    """Nodes so far, and where each tensor of the exported graph comes from."""

    def __init__(self, program: Any) -> None:
        signature = program.graph_signature
        self._saved: dict[str, str] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._images = signature.user_inputs[0]
        self._nodes: list[Node] = []
        self._made: dict[Any, int] = {}
        self._names: dict[Any, str] = {}
        self._output: int | None = None
        self.uncovered: list[str] = []

    def read(self, node: Any) -> None:
        """Take the next node of the exported graph."""
        if node.op == "placeholder":
            if node.name in self._saved:
                self._names[node] = self._saved[node.name]
            elif node.name == self._images:
                self._made[node] = self._add("input", None, (), _shape(node))
        elif node.op == "output":
            self._output = self._made.get(node.args[0][0])
            if self._output is None and not self.uncovered:
                self.uncovered.append("an output that does not depend on the images")
        elif node.op == "call_function":
            try:
                self._translate(node)
            except _UncoveredError as error:
                why = f" ({error})" if str(error) else ""
                self.uncovered.append(f"{_name_of(node.target)} at {_path(node)}{why}")
                # So that what follows is looked at too.
                self._made[node] = 0

    def network(self) -> Network:
        """What leads to the logits, numbered anew."""
        assert self._output is not None
        wanted, open_ = set(), [self._output]
        while open_:
            each = open_.pop()
            if each not in wanted:
                wanted.add(each)
                open_ += self._nodes[each].inputs
        number = {old: new for new, old in enumerate(sorted(wanted))}
        return Network(
            tuple(replace(self._nodes[old], inputs=tuple(number[i] for i in self._nodes[old].inputs)) for old in number)
        )

    def _add(self, name: str, op: Op | None, inputs: tuple[int, ...], shape: tuple[int, ...]) -> int:
        self._nodes.append(Node(name, op, inputs, shape))
        return len(self._nodes) - 1

    def _translate(self, node: Any) -> None:
        if node.target is operator.getitem:
            self._part(node)
            return
        name = _name_of(node.target)
        if name in _CUTS:
            return  # their parts are read one by one
        tensors = [n for n in node.all_input_nodes if n in self._made]
        if not tensors:
            raise _UncoveredError("it changes weights" if node.all_input_nodes else "it makes a constant")
        if _whole_shape(node)[:1] != (_BATCH,):
            raise _UncoveredError("images do not stay apart")
        call = _call(node, name)
        if name in _SAME or (name == "slice" and _shape(node) == _shape(tensors[0])):
            self._made[node] = self._made[tensors[0]]
        elif name in _NORMS:
            self._norm(node, call)
        elif name in _RULES:
            op = _RULES[name](self, call)
            inputs = tuple(self._made[n] for n in _tensors_of(call) if n in self._made)
            self._made[node] = self._add(_path(node), op, inputs, call.shape)
        else:
            raise _UncoveredError

    def parameter(self, value: Any) -> str | None:
        """The name of a saved tensor, or None where there is none.

        Raises:
            _UncoveredError: It is computed.
        """
        if value is None:
            return None
        if value not in self._names:
            raise _UncoveredError("its weight is computed")
        return self._names[value]

    def weight(self, value: Any) -> str:
        name = self.parameter(value)
        assert name is not None
        return name

    def is_image(self, value: Any) -> bool:
        """Whether it depends on the images."""
        return value in self._made

    def _norm(self, node: Any, call: _Call) -> None:
        args = call.args
        if "running_mean" not in args or args.get("training"):
            raise _UncoveredError("it takes its statistics from the batch")
        norm = BatchNorm(
            self.parameter(args["weight"]),
            self.parameter(args["bias"]),
            self.weight(args["running_mean"]),
            self.weight(args["running_var"]),
            float(args["eps"]),
        )
        source = args["input"]
        number = self._made[source]
        op = self._nodes[number].op
        alone = len(source.users) == 1 and source.op == "call_function" and _name_of(source.target) not in _SAME
        if (
            alone
            and isinstance(op, Conv | Linear)
            and op.norm is None
            and (isinstance(op, Conv) or len(call.shape) == 1)
        ):
            self._nodes[number] = replace(self._nodes[number], op=replace(op, norm=norm))
            self._made[node] = number
        else:
            self._made[node] = self._add(_path(node), Scale(norm), (number,), call.shape)

    def _part(self, node: Any) -> None:
        """One of the pieces that a tensor was cut into."""
        import torch

        source, index = node.args
        name = _name_of(source.target)
        if name not in _CUTS:
            # Only BatchNorm has a rule and several results, of which evaluation uses the first.
            self._made[node] = self._made[source]
            return
        call = _call(source, name)
        whole = call.args["self"]
        dim = _dim(call.args.get("dim", 0), whole)
        if whole not in self._made:
            raise _UncoveredError("it changes weights")
        start = sum(int(part.shape[dim]) for part in source.meta["val"][:index])
        length = int(source.meta["val"][index].shape[dim])
        op = Operator(torch.ops.aten.narrow.default, (dim, start, length), (), 1.0)
        self._made[node] = self._add(_path(node), op, (self._made[whole],), _shape(node))


def _call(node: Any, name: str) -> _Call:
    schema = node.target._schema.arguments
    args = {a.name: a.default_value for a in schema if a.has_default_value()}
    args |= {a.name: v for a, v in zip(schema, node.args, strict=False)} | dict(node.kwargs)
    return _Call(node.target, name, args, _shape(node), tuple(node.args[1:]), tuple(node.kwargs.items()))


def _tensors_of(call: _Call) -> list[Any]:
    """The tensors that an operator reads, as often as it reads them, in order."""
    found = []
    for value in call.args.values():
        found += [v for v in (value if isinstance(value, list | tuple) else [value]) if hasattr(v, "users")]
    return found


def _name_of(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    return str(target if schema is None else schema.name).removeprefix("aten::")


def _path(node: Any) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    # Exported under "L['self']." in some releases.
    return str(paths[-1].removeprefix("L['self'].") if paths else node.name)


def _whole_shape(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val")
    first = value[0] if isinstance(value, list | tuple) and value else value
    return tuple(int(size) for size in getattr(first, "shape", ()))


def _shape(node: Any) -> tuple[int, ...]:
    return _whole_shape(node)[1:]


def _dim(dim: int, node: Any) -> int:
    """A dimension counted from the front; the images' own is refused."""
    found = dim % (len(_shape(node)) + 1)
    if found == 0:
        raise _UncoveredError("images do not stay apart")
    return found


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    values = [int(v) for v in value]
    return (values[0], values[-1])


def _conv(reader: _Reader, call: _Call) -> Op:
    if not reader.is_image(call.args["input"]):
        raise _UncoveredError("it changes weights")
    kernel = call.args["weight"].meta["val"].shape[2:]
    dilation, padding = _pair(call.args["dilation"]), call.args["padding"]
    if padding == "same":
        around = [d * (int(k) - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(each % 2 for each in around):
            raise _UncoveredError("its padding is not the same on both sides")
        padding = [each // 2 for each in around]
    return Conv(
        reader.weight(call.args["weight"]),
        reader.parameter(call.args["bias"]),
        _pair(call.args["stride"]),
        _pair(0 if padding == "valid" else padding),
        dilation,
        int(call.args["groups"]),
    )


def _linear(reader: _Reader, call: _Call) -> Op:
    if not reader.is_image(call.args["input"]):
        raise _UncoveredError("it changes weights")
    return Linear(reader.weight(call.args["weight"]), reader.parameter(call.args["bias"]))


def _sum(reader: _Reader, call: _Call) -> Op:
    """`add` and `sub`, of two tensors of the same shape or of a tensor and a number; `mul` and `div` by a number."""
    first, second = call.args["self"], call.args["other"]
    alpha = float(call.args.get("alpha", 1)) * (-1 if call.name in ("sub", "rsub") else 1)
    if call.name == "rsub":
        first, second = second, first
    if call.name in ("mul", "div"):
        if call.args.get("rounding_mode") is not None:
            raise _UncoveredError("it rounds")
        number = _number(second)
        return Sum((number if call.name == "mul" else 1 / number,))
    if all(reader.is_image(v) for v in (first, second)):
        if _shape(first) != _shape(second):
            raise _UncoveredError("it spreads one tensor over another")
        return Sum((1.0, alpha))
    if reader.is_image(first):
        return Sum((1.0,), alpha * _number(second))
    return Sum((alpha,), _number(first))


def _number(value: Any) -> float:
    if isinstance(value, int | float):
        return float(value)
    raise _UncoveredError("of two tensors")


def _cat(reader: _Reader, call: _Call) -> Op:
    tensors = call.args["tensors"]
    if not all(reader.is_image(t) for t in tensors):
        raise _UncoveredError("it adds constants")
    return Cat(_dim(call.args["dim"], tensors[0]))


def _reshape(reader: _Reader, call: _Call) -> Op:
    return Reshape()


def _isometric(dims: Callable[[_Call], Sequence[int]]) -> Callable[[_Reader, _Call], Op]:
    """Values that stay, move within an image, or are left out; `dims` are those it changes."""

    def rule(reader: _Reader, call: _Call) -> Op:
        for dim in dims(call):
            _dim(dim, _tensors_of(call)[0])
        return Operator(call.target, call.given, call.named, 1.0)

    return rule


def _permute(reader: _Reader, call: _Call) -> Op:
    if call.args["dims"][0] != 0:
        raise _UncoveredError("images do not stay apart")
    return Operator(call.target, call.given, call.named, 1.0)


def _pad(reader: _Reader, call: _Call) -> Op:
    if call.args.get("mode", "constant") != "constant" or call.args["value"] not in (None, 0, 0.0):
        raise _UncoveredError("other than with zeros")
    if len(call.args["pad"]) > 2 * len(call.shape):
        raise _UncoveredError("images do not stay apart")
    return Operator(call.target, call.given, call.named, 1.0)


def _mean(reader: _Reader, call: _Call) -> Op:
    x = call.args["self"]
    if not call.args.get("dim"):
        raise _UncoveredError("images do not stay apart")
    count = math.prod(_shape(x)[_dim(d, x) - 1] for d in call.args["dim"])
    return Operator(call.target, call.given, call.named, count**-0.5, pools=True)


def _pool(reader: _Reader, call: _Call) -> Op:
    x = call.args["self"]
    kernel = _pair(call.args["kernel_size"])
    stride = _pair(call.args["stride"]) if call.args["stride"] else kernel
    padding = _pair(call.args["padding"])
    dilation = _pair(call.args.get("dilation", 1))
    axes = [
        _Windows.strided(n, out, k, s, p, d)
        for n, out, k, s, p, d in zip(_shape(x)[-2:], call.shape[-2:], kernel, stride, padding, dilation, strict=True)
    ]
    if call.name == "max_pool2d":
        return Operator(call.target, call.given, call.named, max_pool_factor(axes), pools=True)
    if call.args["divisor_override"]:
        factor = max_pool_factor(axes) * math.sqrt(math.prod(kernel)) / abs(call.args["divisor_override"])
    else:
        factor = average_pool_factor(axes, padded=bool(call.args["count_include_pad"]))
    return Operator(call.target, call.given, call.named, factor, pools=True)


def _adaptive_pool(reader: _Reader, call: _Call) -> Op:
    axes = [_Windows.adaptive(n, out) for n, out in zip(_shape(call.args["self"])[-2:], call.shape[-2:], strict=True)]
    return Operator(call.target, call.given, call.named, average_pool_factor(axes, padded=False), pools=True)


@dataclass(frozen=True)
class _Windows:
    """Those of a pooling along one axis.

    Attributes:
        coverage: In how many windows a value lies at most.
        values: How many values a window has at least.
        counted: The same with padding.
    """

    coverage: int
    values: int
    counted: int

    @classmethod
    def strided(cls, length: int, windows: int, kernel: int, stride: int, padding: int, dilation: int) -> _Windows:
        reached = [
            range(w * stride - padding, w * stride - padding + kernel * dilation, dilation) for w in range(windows)
        ]
        inside = [[i for i in window if 0 <= i < length] for window in reached]
        counted = [sum(i < length + padding for i in window) for window in reached]
        return cls._of(length, inside, counted)

    @classmethod
    def adaptive(cls, length: int, windows: int) -> _Windows:
        inside = [list(range(w * length // windows, -(-(w + 1) * length // windows))) for w in range(windows)]
        return cls._of(length, inside, [len(window) for window in inside])

    @classmethod
    def _of(cls, length: int, inside: Sequence[Sequence[int]], counted: Sequence[int]) -> _Windows:
        times = [0] * length
        for window in inside:
            for i in window:
                times[i] += 1
        return cls(max(times), max(min(map(len, inside)), 1), max(min(counted), 1))


def max_pool_factor(axes: Sequence[_Windows]) -> float:
    """Lipschitz constant of max-pooling: a value that is the largest in all its windows is copied into each."""
    return math.sqrt(math.prod(axis.coverage for axis in axes))


def average_pool_factor(axes: Sequence[_Windows], *, padded: bool) -> float:
    """Of average pooling: by Cauchy-Schwarz, a mean of n values is at most 1/sqrt(n) of their norm."""
    smallest = math.prod(axis.counted if padded else axis.values for axis in axes)
    return max_pool_factor(axes) / math.sqrt(smallest)


def _activation(lipschitz: float, at_zero: float = 0.0) -> Callable[[_Reader, _Call], Op]:
    def rule(reader: _Reader, call: _Call) -> Op:
        return Operator(call.target, call.given, call.named, lipschitz, at_zero)

    return rule


def _rectifier(reader: _Reader, call: _Call) -> Op:
    return Operator(call.target, call.given, call.named, 1.0, rectifies=True)


def _leaky(reader: _Reader, call: _Call) -> Op:
    return Operator(call.target, call.given, call.named, max(1.0, abs(float(call.args["negative_slope"]))))


_CUTS = frozenset(("chunk", "split", "split_with_sizes"))

_NORMS = frozenset(("batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit"))

# Evaluation leaves the values as they are.
_SAME = frozenset(("dropout", "feature_dropout", "alias", "detach", "contiguous", "clone", "lift_fresh_copy"))

_RULES: dict[str, Callable[[_Reader, _Call], Op]] = {
    "conv2d": _conv,
    "linear": _linear,
    **dict.fromkeys(("add", "sub", "rsub", "mul", "div"), _sum),
    **dict.fromkeys(("cat", "concat"), _cat),
    **dict.fromkeys(("flatten", "view", "reshape", "_unsafe_view", "squeeze", "unsqueeze", "unflatten"), _reshape),
    "permute": _permute,
    "transpose": _isometric(lambda call: (call.args["dim0"], call.args["dim1"])),
    "slice": _isometric(lambda call: (call.args["dim"],)),
    "narrow": _isometric(lambda call: (call.args["dim"],)),
    "select": _isometric(lambda call: (call.args["dim"],)),
    "flip": _isometric(lambda call: call.args["dims"]),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "mean": _mean,
    **dict.fromkeys(("max_pool2d", "avg_pool2d"), _pool),
    "adaptive_avg_pool2d": _adaptive_pool,
    # Largest slopes, rounded up: gelu's lies at sqrt(2), silu's near 2.4, hardswish's at 3.
    **dict.fromkeys(("relu", "relu6"), _rectifier),
    **dict.fromkeys(("hardtanh", "tanh"), _activation(1.0)),
    "leaky_relu": _leaky,
    "gelu": _activation(1.13),
    "silu": _activation(1.1),
    "hardswish": _activation(1.5),
    "sigmoid": _activation(0.25, 0.5),
    "hardsigmoid": _activation(1 / 6, 0.5),
}
