"""Rules for ATen operators: how each is represented in the network, and its Lipschitz constant.

Operators with weights, sums and concatenations have a representation of their own. All others are evaluated by calling the
operator with its own arguments, so that only the constant can be wrong. A rule refuses whatever it cannot represent exactly.
The exporter rewrites others to these: `flatten` to `view`, `chunk` to `split`, `narrow` to `slice`; dropout vanishes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from maskplan.pipeline.stability.calls import (
    MIXES_IMAGES,
    Call,
    UncoveredError,
    batch_shape,
    dim_of,
    is_tensor,
    pair_of_ints,
    shape_of,
    tensors_in,
)
from maskplan.pipeline.stability.network import Cat, Conv, Linear, Op, Operator, Reshape, Sum
from maskplan.pipeline.stability.windows import Windows, average_pool_constant, max_pool_constant


class Tensors(Protocol):
    """The tensors of an exported graph."""

    def parameter(self, value: Any) -> str | None:
        """Name of a tensor of the state dict; None for a missing argument."""
        ...

    def weight(self, value: Any) -> str:
        """Name of a tensor of the state dict."""
        ...

    def is_image(self, value: Any) -> bool:
        """Whether a tensor depends on the images."""
        ...


Reading = tuple[Op | None, tuple[Any, ...]]
"""An operator and the tensors that it reads, in order; None for an operator that returns its input."""

Rule = Callable[[Tensors, Call], Reading]


def _conv(tensors: Tensors, call: Call) -> Reading:
    x = call.args["input"]
    if not tensors.is_image(x):
        raise UncoveredError("it changes weights")
    if len(batch_shape(x)) != 4:
        # Without a batch dimension, torch takes the images for channels.
        raise UncoveredError(MIXES_IMAGES)
    kernel = call.args["weight"].meta["val"].shape[2:]
    dilation, padding = pair_of_ints(call.args["dilation"]), call.args["padding"]
    if padding == "same":
        total = [d * (int(k) - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(each % 2 for each in total):
            raise UncoveredError("its padding is not the same on both sides")
        padding = [each // 2 for each in total]
    op = Conv(
        tensors.weight(call.args["weight"]),
        tensors.parameter(call.args["bias"]),
        pair_of_ints(call.args["stride"]),
        pair_of_ints(0 if padding == "valid" else padding),
        dilation,
        int(call.args["groups"]),
    )
    return op, (x,)


def _linear(tensors: Tensors, call: Call) -> Reading:
    x = call.args["input"]
    if not tensors.is_image(x):
        raise UncoveredError("it changes weights")
    if len(batch_shape(x)) < 2:
        # The product would be with the dimension of the images.
        raise UncoveredError(MIXES_IMAGES)
    return Linear(tensors.weight(call.args["weight"]), tensors.parameter(call.args["bias"])), (x,)


def _add_or_subtract(tensors: Tensors, call: Call) -> Reading:
    """`add` and `sub` are self +- alpha * other, `rsub` is other - alpha * self; each argument a tensor or a number."""
    alpha = _finite(call.args.get("alpha", 1))
    factors = {"add": (1.0, alpha), "sub": (1.0, -alpha), "rsub": (-alpha, 1.0)}[call.name]
    terms = list(zip(factors, (call.args["self"], call.args["other"]), strict=True))
    images = [(factor, term) for factor, term in terms if tensors.is_image(term)]
    constant = sum(factor * _number(term) for factor, term in terms if not tensors.is_image(term))
    if any(shape_of(term) != call.shape for _, term in images):
        raise UncoveredError("it broadcasts one tensor over another")
    return Sum(tuple(factor for factor, _ in images), constant), tuple(term for _, term in images)


def _scale(tensors: Tensors, call: Call) -> Reading:
    """`mul` and `div` by a number."""
    x, other = call.args["self"], call.args["other"]
    if call.args.get("rounding_mode") is not None:
        raise UncoveredError("it rounds")
    if call.name == "mul" and not tensors.is_image(x):
        x, other = other, x
    number = _number(other)
    if call.name == "div" and number == 0:
        raise UncoveredError("it divides by zero")
    return Sum((number if call.name == "mul" else 1 / number,)), (_only_image(tensors, call, x),)


def _number(value: Any) -> float:
    if is_tensor(value):
        raise UncoveredError("of two tensors")
    return _finite(value)


def _finite(value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UncoveredError(f"of the number {value}")
    return float(value)


def _only_image(tensors: Tensors, call: Call, x: Any) -> Any:
    """`x` itself.

    Raises:
        UncoveredError: It does not depend on the images, or the operator reads other tensors as well.
    """
    if not is_tensor(x) or not tensors.is_image(x):
        raise UncoveredError("it changes weights")
    if any(tensor is not x for tensor in tensors_in(call.args.values())):
        raise UncoveredError("of two tensors")
    return x


def _cat(tensors: Tensors, call: Call) -> Reading:
    parts = tuple(call.args["tensors"])
    if not all(tensors.is_image(t) for t in parts):
        raise UncoveredError("it adds constants")
    if len({len(batch_shape(t)) for t in parts}) > 1:
        raise UncoveredError("of tensors of different ranks")
    return Cat(dim_of(call.args["dim"], parts[0])), parts


def _reshape(tensors: Tensors, call: Call) -> Reading:
    x = _only_image(tensors, call, call.input)
    if "dtype" in call.args:
        raise UncoveredError("it reinterprets the bits of values")
    if math.prod(call.shape) != math.prod(shape_of(x)):
        raise UncoveredError(MIXES_IMAGES)
    return Reshape(), (x,)


def _identity(tensors: Tensors, call: Call) -> Reading:
    return None, (_only_image(tensors, call, call.input),)


def _own(
    tensors: Tensors,
    call: Call,
    lipschitz: float,
    at_zero: float = 0.0,
    *,
    is_pooling: bool = False,
    is_rectifier: bool = False,
) -> Reading:
    """The operator itself, with its own arguments."""
    x = _only_image(tensors, call, call.input)
    op = Operator(call.target, call.positional, call.keywords, lipschitz, at_zero, is_pooling, is_rectifier)
    return op, (x,)


def _isometric(dims: Callable[[Call], Sequence[int]]) -> Rule:
    """Values that stay, move within an image, or are omitted; `dims` are the dimensions involved."""

    def rule(tensors: Tensors, call: Call) -> Reading:
        for dim in dims(call):
            dim_of(dim, call.input)
        return _own(tensors, call, 1.0)

    return rule


def _slice(tensors: Tensors, call: Call) -> Reading:
    if call.shape == shape_of(call.input):
        # Everything, such as `x[:]`. A slice of some images changes their number, which the reader refuses.
        return _identity(tensors, call)
    dim_of(call.args["dim"], call.input)
    return _own(tensors, call, 1.0)


def _permute(tensors: Tensors, call: Call) -> Reading:
    if call.args["dims"][0] % len(call.args["dims"]) != 0:
        raise UncoveredError(MIXES_IMAGES)
    return _own(tensors, call, 1.0)


def _pad(tensors: Tensors, call: Call) -> Reading:
    if call.args.get("mode", "constant") != "constant" or call.args["value"] not in (None, 0, 0.0):
        raise UncoveredError("other than with zeros")
    if len(call.args["pad"]) > 2 * len(call.shape):
        raise UncoveredError(MIXES_IMAGES)
    return _own(tensors, call, 1.0)


def _mean(tensors: Tensors, call: Call) -> Reading:
    x = call.input
    if call.args.get("dtype") is not None:
        raise UncoveredError("it changes the data type")
    if not call.args.get("dim"):
        raise UncoveredError(MIXES_IMAGES)
    # By Cauchy-Schwarz, the mean of n values is at most 1/sqrt(n) of their norm.
    count = math.prod(shape_of(x)[dim_of(d, x) - 1] for d in call.args["dim"])
    return _own(tensors, call, count**-0.5, is_pooling=True)


def _pool(tensors: Tensors, call: Call) -> Reading:
    kernel = pair_of_ints(call.args["kernel_size"])
    stride = pair_of_ints(call.args["stride"]) if call.args["stride"] else kernel
    padding = pair_of_ints(call.args["padding"])
    dilation = pair_of_ints(call.args.get("dilation", 1))
    sizes = zip(shape_of(call.input)[-2:], call.shape[-2:], kernel, stride, padding, dilation, strict=True)
    axes = [Windows.strided(*each) for each in sizes]
    if call.name == "max_pool2d":
        constant = max_pool_constant(axes)
    elif call.args["divisor_override"]:
        # A sum of n values is at most sqrt(n) times their norm.
        constant = max_pool_constant(axes) * math.sqrt(math.prod(kernel)) / abs(call.args["divisor_override"])
    else:
        constant = average_pool_constant(axes, padded=bool(call.args["count_include_pad"]))
    return _own(tensors, call, constant, is_pooling=True)


def _adaptive_pool(tensors: Tensors, call: Call) -> Reading:
    axes = [Windows.adaptive(n, out) for n, out in zip(shape_of(call.input)[-2:], call.shape[-2:], strict=True)]
    return _own(tensors, call, average_pool_constant(axes, padded=False), is_pooling=True)


def _activation(lipschitz: float | Callable[[Call], float], *, is_rectifier: bool = False) -> Rule:
    """An elementwise function; its value at zero is computed, as it may depend on the arguments (`hardtanh(1, 5)`)."""

    def rule(tensors: Tensors, call: Call) -> Reading:
        import torch

        steepest = lipschitz(call) if callable(lipschitz) else lipschitz
        zero = torch.zeros(1, dtype=torch.float64)
        at_zero = abs(float(call.target(zero, *call.positional, **dict(call.keywords))))
        if not math.isfinite(steepest) or not math.isfinite(at_zero):
            raise UncoveredError("of arguments that are not finite")
        return _own(tensors, call, steepest, at_zero, is_rectifier=is_rectifier)

    return rule


def _leaky_slope(call: Call) -> float:
    return max(1.0, abs(float(call.args["negative_slope"])))


RULES: dict[str, Rule] = {
    "conv2d": _conv,
    "linear": _linear,
    **dict.fromkeys(("add", "sub", "rsub"), _add_or_subtract),
    **dict.fromkeys(("mul", "div"), _scale),
    **dict.fromkeys(("cat", "concat"), _cat),
    **dict.fromkeys(("view", "_unsafe_view", "squeeze", "unsqueeze"), _reshape),
    "permute": _permute,
    "transpose": _isometric(lambda call: (call.args["dim0"], call.args["dim1"])),
    "slice": _slice,
    "select": _isometric(lambda call: (call.args["dim"],)),
    "flip": _isometric(lambda call: call.args["dims"]),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "mean": _mean,
    **dict.fromkeys(("max_pool2d", "avg_pool2d"), _pool),
    "adaptive_avg_pool2d": _adaptive_pool,
    **dict.fromkeys(("relu", "relu6"), _activation(1.0, is_rectifier=True)),
    **dict.fromkeys(("hardtanh", "tanh"), _activation(1.0)),
    "leaky_relu": _activation(_leaky_slope),
    # Largest slopes, rounded up: of gelu at sqrt(2), of silu near 2.4, of hardswish at 3.
    "gelu": _activation(1.13),
    "silu": _activation(1.1),
    "hardswish": _activation(1.5),
    "sigmoid": _activation(0.25),
    "hardsigmoid": _activation(1 / 6),
    **dict.fromkeys(("alias", "detach", "clone"), _identity),
}
