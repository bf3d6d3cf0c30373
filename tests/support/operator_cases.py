"""Every operator that the bounds accept, with common and uncommon arguments.

Cases are modules from (N, C, H, W) to (N, C', H', W'), made for the shape (C, H, W) of one image. They work for all sizes of
at least 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Tensor = torch.Tensor
Factory = Callable[[int, int, int], nn.Module]

aten = torch.ops.aten


class Function(nn.Module):
    """Calls a function with the module, which holds layers, and its input."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def of_one(function: Callable[[Tensor], Tensor]) -> Factory:
    return lambda c, h, w: Function(lambda self, x: function(x))


def of_two(function: Callable[[Tensor, Tensor], Tensor]) -> Factory:
    """A function of the input and of a convolution of it, in the same shape."""
    return lambda c, h, w: Function(lambda self, x: function(x, self.branch(x)), branch=nn.Conv2d(c, c, 1))


def of_shape(function: Callable[[Tensor, int, int, int], Tensor]) -> Factory:
    """A function of the input and of the shape (C, H, W)."""
    return lambda c, h, w: Function(lambda self, x: function(x, c, h, w))


def with_layer(layer: Callable[[int, int, int], nn.Module], function: Callable[[Any, Tensor], Tensor]) -> Factory:
    return lambda c, h, w: Function(lambda self, x: function(self.layer, x), layer=layer(c, h, w))


def norm(c: int, h: int, w: int) -> nn.Module:
    return nn.BatchNorm2d(c, eps=0.3)


def _norm_of_a_shared_layer(c: int, h: int, w: int) -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y[:, :, :, :]) + y

    return Function(forward, conv=nn.Conv2d(c, c, 1), norm=nn.BatchNorm2d(c))


def _chunks(x: Tensor, c: int, h: int, w: int) -> Tensor:
    return torch.cat(x.chunk(3, 1)[::-1], 1)


def _max_pool(x: Tensor, c: int, h: int, w: int) -> Tensor:
    kernel = (min(h, 3), min(w, 2))
    return F.max_pool2d(x, kernel, stride=(1, 2), padding=(kernel[0] // 2, 0), ceil_mode=True)


def _dilated_max_pool(x: Tensor, c: int, h: int, w: int) -> Tensor:
    return F.max_pool2d(x, 2 if min(h, w) > 2 else 1, 1, 0, dilation=2)


def _avg_pool(count_include_pad: bool, divisor: int | None = None) -> Factory:
    def function(x: Tensor, c: int, h: int, w: int) -> Tensor:
        kernel = (min(h, 2), min(w, 3))
        padding = (kernel[0] // 2, kernel[1] // 2)
        return F.avg_pool2d(x, kernel, (2, 1), padding, True, count_include_pad, divisor)

    return of_shape(function)


CASES: dict[str, Factory] = {
    "add": of_two(lambda x, y: x + y),
    "add, alpha": of_two(lambda x, y: torch.add(x, y, alpha=-0.7)),
    "add, by keyword": of_two(lambda x, y: torch.add(other=x, input=y, alpha=2)),
    "add, number": of_one(lambda x: torch.add(x, 0.3, alpha=2)),
    "add, to a number": of_one(lambda x: 2.0 + x),
    "add, itself": of_one(lambda x: x + x),
    "add, scalar overload": of_one(lambda x: aten.add.Scalar(x, 0.3, 2)),
    "add, in place": of_two(lambda x, y: y.add_(x, alpha=0.5)),
    "sub": of_two(lambda x, y: y - x),
    "sub, alpha": of_two(lambda x, y: torch.sub(x, y, alpha=1.5)),
    "sub, by keyword": of_two(lambda x, y: torch.sub(other=x, input=y, alpha=-2)),
    "sub, number": of_one(lambda x: torch.sub(x, 0.5, alpha=2)),
    "sub, scalar overload": of_one(lambda x: aten.sub.Scalar(x, 0.5, 3)),
    "sub, in place": of_two(lambda x, y: y.sub_(x, alpha=0.5)),
    "rsub": of_two(lambda x, y: torch.rsub(x, y)),
    "rsub, alpha": of_two(lambda x, y: torch.rsub(x, y, alpha=0.5)),
    "rsub, number": of_one(lambda x: torch.rsub(x, 2, alpha=-1.5)),
    "rsub, from a number": of_one(lambda x: 1 - x),
    "rsub, scalar overload": of_one(lambda x: aten.rsub.Scalar(x, 2, 3)),
    "mul": of_one(lambda x: x * -1.7),
    "mul, of a number": of_one(lambda x: 3 * x),
    "mul, scalar overload": of_one(lambda x: aten.mul.Scalar(x, 0.6)),
    "mul, in place": of_two(lambda x, y: y.mul_(-0.4)),
    "div": of_one(lambda x: x / -0.7),
    "div, no rounding": of_one(lambda x: torch.div(x, 3, rounding_mode=None)),
    "div, scalar overload": of_one(lambda x: aten.div.Scalar(x, 0.6)),
    "div, in place": of_two(lambda x, y: y.div_(2)),
    "cat": of_two(lambda x, y: torch.cat([x, y, x], 1)),
    "cat, rows": of_two(lambda x, y: torch.cat(dim=2, tensors=(y, x))),
    "cat, columns": of_two(lambda x, y: torch.cat([x, y], -1)),
    "concat": of_two(lambda x, y: aten.concat([y, x], -3)),
    "flatten, unflatten": of_shape(lambda x, c, h, w: torch.unflatten(torch.flatten(x, 2), 2, (w, h))),
    "flatten, ends": of_shape(lambda x, c, h, w: x.flatten(-3, -2).unflatten(-2, (h, c))),
    "view": of_shape(lambda x, c, h, w: x.view(x.shape[0], h, c, w)),
    "view, inferred": of_shape(lambda x, c, h, w: x.view(x.shape[0], -1, w, h)),
    "reshape": of_shape(lambda x, c, h, w: x.transpose(1, 3).reshape(x.shape[0], c, h, w)),
    "_unsafe_view": of_shape(lambda x, c, h, w: aten._unsafe_view(x, [x.shape[0], w, h, c])),
    "squeeze": of_one(lambda x: x.unsqueeze(-1).squeeze(-1)),
    "squeeze, several": of_one(lambda x: x.unsqueeze(1).unsqueeze(3).squeeze((1, 3))),
    "permute": of_one(lambda x: x.permute(0, 3, 1, 2)),
    "permute, negative": of_one(lambda x: x.permute(-4, -1, -3, -2)),
    "transpose": of_one(lambda x: x.transpose(1, 2)),
    "transpose, negative": of_one(lambda x: torch.transpose(x, dim0=-1, dim1=2)),
    "slice, step": of_one(lambda x: x[:, ::2]),
    "slice, from the end": of_one(lambda x: x[:, -2:, :, -3:]),
    "slice, several": of_shape(lambda x, c, h, w: x[:, :, h // 3 :, : -(w // 3) or None]),
    "narrow": of_shape(lambda x, c, h, w: x.narrow(1, 0, max(c // 2, 1))),
    "narrow, overload": of_shape(lambda x, c, h, w: aten.narrow.default(x, -1, w // 2, 1)),
    "select": of_one(lambda x: x.select(1, -1).unsqueeze(1)),
    "select, by index": of_one(lambda x: x[:, :, 0].unsqueeze(2)),
    "flip": of_one(lambda x: x.flip((1, -1))),
    "flip, by keyword": of_one(lambda x: torch.flip(input=x, dims=[2])),
    "pad": of_one(lambda x: F.pad(x, (1, 2, 0, 1))),
    "pad, channels": of_one(lambda x: F.pad(x, (0, 0, 0, 0, 1, 2), value=0.0)),
    "pad, crop": of_shape(lambda x, c, h, w: F.pad(x, (-(w // 2), 1, 1, -(h // 2)))),
    "pad, overload": of_one(lambda x: aten.pad.default(x, [1, 0], "constant", None)),
    "constant_pad_nd": of_one(lambda x: aten.constant_pad_nd(x, [0, 1, 1, 0])),
    "mean, channels": of_one(lambda x: x.mean(1, keepdim=True)),
    "mean, rows": of_one(lambda x: x.mean((2,)).unsqueeze(2)),
    "mean, positions": of_one(lambda x: torch.mean(dim=[-1, -2], input=x, keepdim=True)),
    "max_pool2d": of_shape(lambda x, c, h, w: F.max_pool2d(x, (min(h, 2), min(w, 2)))),
    "max_pool2d, overlap": of_shape(_max_pool),
    "max_pool2d, dilation": of_shape(_dilated_max_pool),
    "avg_pool2d": of_shape(lambda x, c, h, w: F.avg_pool2d(x, min(h, w, 2))),
    "avg_pool2d, padding": _avg_pool(count_include_pad=True),
    "avg_pool2d, padding not counted": _avg_pool(count_include_pad=False),
    "avg_pool2d, divisor": _avg_pool(count_include_pad=True, divisor=-3),
    "adaptive_avg_pool2d": of_shape(lambda x, c, h, w: F.adaptive_avg_pool2d(x, (max(h - 1, 1), None))),
    "adaptive_avg_pool2d, larger": of_shape(lambda x, c, h, w: F.adaptive_avg_pool2d(x, (h + 1, 2))),
    "linear": with_layer(lambda c, h, w: nn.Linear(w, 3), lambda layer, x: layer(x)),
    "linear, no bias": with_layer(lambda c, h, w: nn.Linear(w, 2, bias=False), lambda layer, x: layer(x)),
    "conv2d, same": with_layer(
        lambda c, h, w: nn.Conv2d(c, 4, 3, padding="same", dilation=2), lambda layer, x: layer(x)
    ),
    "conv2d, valid": with_layer(
        lambda c, h, w: nn.Conv2d(c, 4, (1, min(w, 2)), padding="valid"), lambda layer, x: layer(x)
    ),
    "conv2d, asymmetric": with_layer(
        lambda c, h, w: nn.Conv2d(c, 2 * c, (1, 3), (2, 1), (0, 1), (1, 1), groups=c), lambda layer, x: layer(x)
    ),
    "conv2d, by keyword": with_layer(
        lambda c, h, w: nn.Conv2d(c, 4, 1),
        lambda layer, x: F.conv2d(bias=layer.bias, weight=layer.weight, input=x, padding=(1, 0), stride=[2]),
    ),
    "batch_norm": with_layer(norm, lambda layer, x: layer(x)),
    "batch_norm, not affine": with_layer(lambda c, h, w: nn.BatchNorm2d(c, affine=False), lambda layer, x: layer(x)),
    "batch_norm, functional": with_layer(
        norm, lambda layer, x: F.batch_norm(x, layer.running_mean, layer.running_var, bias=layer.bias, eps=0.1)
    ),
    "batch_norm, of a layer with another reader": _norm_of_a_shared_layer,
    "_native_batch_norm_legit_no_training": with_layer(
        norm,
        lambda layer, x: aten._native_batch_norm_legit_no_training(
            x, layer.weight, layer.bias, layer.running_mean, layer.running_var, 0.1, 0.2
        )[0],
    ),
    "chunk": of_shape(_chunks),
    "chunk, columns": of_one(lambda x: torch.chunk(x, chunks=2, dim=-1)[0]),
    "split": of_one(lambda x: torch.cat(x.split(2, 1)[::-1], 1)),
    "split, columns": of_one(lambda x: torch.split(x, 1, dim=-1)[-1]),
    "split_with_sizes": of_shape(lambda x, c, h, w: aten.split_with_sizes(x, [h // 2, h - h // 2], 2)[1]),
    "relu": of_one(F.relu),
    "relu, in place": of_two(lambda x, y: F.relu(y, inplace=True)),
    "relu6": of_one(F.relu6),
    "relu6, overload": of_one(lambda x: aten.relu6(x)),
    "hardtanh": of_one(F.hardtanh),
    "hardtanh, positive": of_one(lambda x: F.hardtanh(x, 1.0, 5.0)),
    "hardtanh, negative": of_one(lambda x: F.hardtanh(x, -2.0, -0.5)),
    "hardtanh, by keyword": of_one(lambda x: F.hardtanh(x, max_val=2.0, min_val=-0.5)),
    "tanh": of_one(torch.tanh),
    "sigmoid": of_one(torch.sigmoid),
    "hardsigmoid": of_one(F.hardsigmoid),
    "hardswish": of_one(F.hardswish),
    "silu": of_one(F.silu),
    "silu, in place": of_two(lambda x, y: F.silu(y, inplace=True)),
    "gelu": of_one(F.gelu),
    "gelu, tanh": of_one(lambda x: F.gelu(x, approximate="tanh")),
    "leaky_relu": of_one(F.leaky_relu),
    "leaky_relu, steep": of_one(lambda x: F.leaky_relu(x, 1.7)),
    "leaky_relu, not monotone": of_one(lambda x: F.leaky_relu(x, negative_slope=-1.3)),
    "dropout": with_layer(lambda c, h, w: nn.Dropout(0.5), lambda layer, x: layer(x)),
    "dropout, of nothing": of_one(lambda x: aten.dropout(x, 0.0, True)),
    "feature_dropout": with_layer(lambda c, h, w: nn.Dropout2d(0.5), lambda layer, x: layer(x)),
    "alias": of_one(lambda x: aten.alias(x)),
    "detach": of_one(lambda x: x.detach()),
    "contiguous": of_one(lambda x: x.transpose(2, 3).contiguous()),
    "clone": of_one(lambda x: x.clone(memory_format=torch.channels_last)),
    "lift_fresh_copy": of_one(lambda x: aten.lift_fresh_copy(x)),
    "slice, everything": of_one(lambda x: x[:][..., :]),
}
