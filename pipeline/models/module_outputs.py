"""What a module's forward pass returns, as named tensors in a stable order."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from maskplan.pipeline.core.artifacts import OutputKind, TensorSpec
from maskplan.pipeline.core.choices import LOGITS
from maskplan.pipeline.core.errors import InputError, listed

if TYPE_CHECKING:
    import torch
    from torch import nn

INPUT = "input"
"""The graph's input, whose name no output may have."""


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """What a recipe says of a model.

    Attributes:
        outputs: What outputs hold where the guess from their shapes is wrong, such as `boxes:values` or `mask:logits:3`.
    """

    outputs: tuple[str, ...] = ()


_ONE_MATRIX, _ONE_TENSOR, _IN_ORDER = "logits", "output", "output"


def named_tensors(returned: Any) -> dict[str, torch.Tensor]:
    """The tensors of a module's return value.

    A single tensor is called `logits` if it has two axes, else `output`; those of a tuple or list `output0`, `output1`, ...;
    those of a dict or a record (data class, named tuple, namespace) have the names of its keys and fields. Names of nested
    values are joined by points. None, numbers and texts are left out; those that follow keep their number.

    Raises:
        InputError: A value of another kind, or no tensor at all.
    """
    import torch

    if isinstance(returned, torch.Tensor):
        return {_ONE_MATRIX if returned.ndim == 2 else _ONE_TENSOR: returned}
    named: dict[str, torch.Tensor] = {}
    unknown: list[str] = []
    for path, value in _walk(returned, ()):
        if isinstance(value, torch.Tensor):
            named[_unused(".".join(path), named)] = value
        elif value is not None and not isinstance(value, bool | int | float | complex | str | bytes | torch.Size):
            unknown.append(f"{'.'.join(path) or 'the return value'} is {type(value).__name__}")
    if unknown or not named:
        raise InputError(
            "the model's forward does not return tensors",
            found=listed(unknown) or f"{type(returned).__name__} without tensors",
            fix="return tensors, or tuples, lists, dicts or data classes of them",
        )
    return named


def _walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All leaves of a nested value, with the keys that lead to them."""
    members = _members(value, at_top=not path)
    if members is None:
        yield path, value
        return
    for name, member in members:
        yield from _walk(member, (*path, name))


def _members(value: Any, *, at_top: bool) -> list[tuple[str, Any]] | None:
    """The named members of a container; None for a leaf."""
    import torch

    # Before the records: some are dicts too, whose fields of None are no keys.
    if isinstance(value, Mapping):
        return [(str(key), member) for key, member in value.items()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, types.SimpleNamespace):
        return list(vars(value).items())
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return [(f"{_IN_ORDER}{i}" if at_top else str(i), member) for i, member in enumerate(value)]
    return None


def _unused(name: str, taken: Mapping[str, Any]) -> str:
    """The name, or one like it that no other output and no input has."""
    name = name or _ONE_TENSOR
    candidate, count = (f"{name}.out" if name == INPUT else name), 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    return candidate


@contextmanager
def flat_outputs(module: nn.Module) -> Iterator[None]:
    """Let a module return a tensor or a tuple of tensors while in this context: the values of `named_tensors`, in its order.

    Values that occur twice, or are inputs, are copied: each output of a graph needs a value of its own.
    """
    import torch

    def flatten(_: nn.Module, inputs: Any, returned: Any) -> Any:
        if isinstance(returned, torch.Tensor) and all(returned is not given for given in inputs):
            return returned
        tensors = list(named_tensors(returned).values())
        seen = [given for given in inputs if isinstance(given, torch.Tensor)]
        flat = []
        for tensor in tensors:
            flat.append(tensor.clone() if any(tensor is other for other in seen) else tensor)
            seen.append(tensor)
        return tuple(flat) if len(flat) > 1 else flat[0]

    hook = module.register_forward_hook(flatten)
    try:
        yield
    finally:
        hook.remove()


def output_specs(
    first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor] | None = None
) -> tuple[TensorSpec, ...]:
    """Names, types and shapes of outputs.

    Args:
        first: Outputs for one image.
        second: The same for two images: axes whose size differs are dynamic. Without it, the first axis is if its size is 1.
    """
    specs = []
    for name, tensor in first.items():
        other = None if second is None else second.get(name)
        shape: tuple[int | None, ...] = tuple(tensor.shape)
        if other is not None and other.ndim == tensor.ndim:
            shape = tuple(a if a == b else None for a, b in zip(tensor.shape, other.shape, strict=True))
        elif shape[:1] == (1,):
            shape = (None, *shape[1:])
        specs.append(TensorSpec(name, str(tensor.dtype).removeprefix("torch."), shape))
    return tuple(specs)


def classes_of(outputs: Sequence[TensorSpec], kinds: Sequence[OutputKind]) -> int:
    """The number of classes of a classifier, which has one output: logits (N, classes); 0 for other networks."""
    if len(outputs) != 1 or len(outputs[0].shape) != 2 or kinds[0] != OutputKind(outputs[0].name, LOGITS):
        return 0
    batch, classes = outputs[0].shape
    return classes if batch is None and classes is not None else 0
