"""From operators to maps: what each ATen operator is to the bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from maskplan.pipeline.stability.calls import Call, UncoveredError, dim_of, pair_of_ints, shape_of, tensors_of
from maskplan.pipeline.stability.network import Cat, Conv, Linear, Op, Operator, Reshape, Sum
from maskplan.pipeline.stability.windows import Windows, average_pool_factor, max_pool_factor


class Tensors(Protocol):
    """Where the tensors of an exported graph come from."""

    def parameter(self, value: Any) -> str | None:
        """The name of a saved tensor, or None where there is none."""
        ...

    def weight(self, value: Any) -> str:
        """The name of a saved tensor."""
        ...

    def is_image(self, value: Any) -> bool:
        """Whether it depends on the images."""
        ...


def _conv(reader: Tensors, call: Call) -> Op:
    if not reader.is_image(call.args["input"]):
        raise UncoveredError("it changes weights")
    kernel = call.args["weight"].meta["val"].shape[2:]
    dilation, padding = pair_of_ints(call.args["dilation"]), call.args["padding"]
    if padding == "same":
        around = [d * (int(k) - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(each % 2 for each in around):
            raise UncoveredError("its padding is not the same on both sides")
        padding = [each // 2 for each in around]
    return Conv(
        reader.weight(call.args["weight"]),
        reader.parameter(call.args["bias"]),
        pair_of_ints(call.args["stride"]),
        pair_of_ints(0 if padding == "valid" else padding),
        dilation,
        int(call.args["groups"]),
    )


def _linear(reader: Tensors, call: Call) -> Op:
    if not reader.is_image(call.args["input"]):
        raise UncoveredError("it changes weights")
    return Linear(reader.weight(call.args["weight"]), reader.parameter(call.args["bias"]))


def _sum(reader: Tensors, call: Call) -> Op:
    """`add` and `sub`, of two tensors of the same shape or of a tensor and a number; `mul` and `div` by a number."""
    first, second = call.args["self"], call.args["other"]
    alpha = float(call.args.get("alpha", 1)) * (-1 if call.name in ("sub", "rsub") else 1)
    if call.name == "rsub":
        first, second = second, first
    if call.name in ("mul", "div"):
        if call.args.get("rounding_mode") is not None:
            raise UncoveredError("it rounds")
        number = _number(second)
        return Sum((number if call.name == "mul" else 1 / number,))
    if all(reader.is_image(v) for v in (first, second)):
        if shape_of(first) != shape_of(second):
            raise UncoveredError("it spreads one tensor over another")
        return Sum((1.0, alpha))
    if reader.is_image(first):
        return Sum((1.0,), alpha * _number(second))
    return Sum((alpha,), _number(first))


def _number(value: Any) -> float:
    if isinstance(value, int | float):
        return float(value)
    raise UncoveredError("of two tensors")


def _cat(reader: Tensors, call: Call) -> Op:
    tensors = call.args["tensors"]
    if not all(reader.is_image(t) for t in tensors):
        raise UncoveredError("it adds constants")
    return Cat(dim_of(call.args["dim"], tensors[0]))


def _reshape(reader: Tensors, call: Call) -> Op:
    return Reshape()


def _isometric(dims: Callable[[Call], Sequence[int]]) -> Callable[[Tensors, Call], Op]:
    """Values that stay, move within an image, or are left out; `dims` are those it changes."""

    def rule(reader: Tensors, call: Call) -> Op:
        for dim in dims(call):
            dim_of(dim, tensors_of(call)[0])
        return Operator(call.target, call.positional, call.keywords, 1.0)

    return rule


def _permute(reader: Tensors, call: Call) -> Op:
    if call.args["dims"][0] != 0:
        raise UncoveredError("images do not stay apart")
    return Operator(call.target, call.positional, call.keywords, 1.0)


def _pad(reader: Tensors, call: Call) -> Op:
    if call.args.get("mode", "constant") != "constant" or call.args["value"] not in (None, 0, 0.0):
        raise UncoveredError("other than with zeros")
    if len(call.args["pad"]) > 2 * len(call.shape):
        raise UncoveredError("images do not stay apart")
    return Operator(call.target, call.positional, call.keywords, 1.0)


def _mean(reader: Tensors, call: Call) -> Op:
    x = call.args["self"]
    if not call.args.get("dim"):
        raise UncoveredError("images do not stay apart")
    count = math.prod(shape_of(x)[dim_of(d, x) - 1] for d in call.args["dim"])
    return Operator(call.target, call.positional, call.keywords, count**-0.5, is_pooling=True)


def _pool(reader: Tensors, call: Call) -> Op:
    x = call.args["self"]
    kernel = pair_of_ints(call.args["kernel_size"])
    stride = pair_of_ints(call.args["stride"]) if call.args["stride"] else kernel
    padding = pair_of_ints(call.args["padding"])
    dilation = pair_of_ints(call.args.get("dilation", 1))
    axes = [
        Windows.strided(n, out, k, s, p, d)
        for n, out, k, s, p, d in zip(shape_of(x)[-2:], call.shape[-2:], kernel, stride, padding, dilation, strict=True)
    ]
    if call.name == "max_pool2d":
        return Operator(call.target, call.positional, call.keywords, max_pool_factor(axes), is_pooling=True)
    if call.args["divisor_override"]:
        factor = max_pool_factor(axes) * math.sqrt(math.prod(kernel)) / abs(call.args["divisor_override"])
    else:
        factor = average_pool_factor(axes, padded=bool(call.args["count_include_pad"]))
    return Operator(call.target, call.positional, call.keywords, factor, is_pooling=True)


def _adaptive_pool(reader: Tensors, call: Call) -> Op:
    axes = [Windows.adaptive(n, out) for n, out in zip(shape_of(call.args["self"])[-2:], call.shape[-2:], strict=True)]
    return Operator(
        call.target, call.positional, call.keywords, average_pool_factor(axes, padded=False), is_pooling=True
    )


def _activation(lipschitz: float, at_zero: float = 0.0) -> Callable[[Tensors, Call], Op]:
    def rule(reader: Tensors, call: Call) -> Op:
        return Operator(call.target, call.positional, call.keywords, lipschitz, at_zero)

    return rule


def _rectifier(reader: Tensors, call: Call) -> Op:
    return Operator(call.target, call.positional, call.keywords, 1.0, is_rectifier=True)


def _leaky(reader: Tensors, call: Call) -> Op:
    return Operator(call.target, call.positional, call.keywords, max(1.0, abs(float(call.args["negative_slope"]))))


RULES: dict[str, Callable[[Tensors, Call], Op]] = {
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
