"""Operators of an exported graph: their arguments by name, and the shapes of one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class UncoveredError(Exception):
    """An operator, or its use, without a bound; the message says why where its name does not."""


@dataclass(frozen=True)
class Call:
    """An operator of the exported graph: its arguments by name, tensors as `fx.Node`; shapes of one image."""

    target: Any
    name: str
    args: dict[str, Any]
    shape: tuple[int, ...]
    positional: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]


def call_of(node: Any, name: str) -> Call:
    """An exported node with its arguments by name, defaults included."""
    schema = node.target._schema.arguments
    args = {a.name: a.default_value for a in schema if a.has_default_value()}
    args |= {a.name: v for a, v in zip(schema, node.args, strict=False)} | dict(node.kwargs)
    return Call(node.target, name, args, shape_of(node), tuple(node.args[1:]), tuple(node.kwargs.items()))


def tensors_of(call: Call) -> list[Any]:
    """The tensors that an operator reads, as often as it reads them, in order."""
    found = []
    for value in call.args.values():
        found += [v for v in (value if isinstance(value, list | tuple) else [value]) if hasattr(v, "users")]
    return found


def name_of(target: Any) -> str:
    """Of an overload, without its namespace: `conv2d`."""
    schema = getattr(target, "_schema", None)
    return str(target if schema is None else schema.name).removeprefix("aten::")


def path_of(node: Any) -> str:
    """Of the module that a node belongs to, or the node's own name."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    # Exported under "L['self']." in some releases.
    return str(paths[-1].removeprefix("L['self'].") if paths else node.name)


def whole_shape(node: Any) -> tuple[int, ...]:
    """Of a node's result, or of its first one, all images together."""
    value = node.meta.get("val")
    first = value[0] if isinstance(value, list | tuple) and value else value
    return tuple(int(size) for size in getattr(first, "shape", ()))


def shape_of(node: Any) -> tuple[int, ...]:
    """Of one image."""
    return whole_shape(node)[1:]


def dim_of(dim: int, node: Any) -> int:
    """A dimension counted from the front; the images' own is refused."""
    found = dim % (len(shape_of(node)) + 1)
    if found == 0:
        raise UncoveredError("images do not stay apart")
    return found


def pair_of_ints(value: Any) -> tuple[int, int]:
    """For both axes; one number is for both."""
    if isinstance(value, int):
        return value, value
    values = [int(v) for v in value]
    return (values[0], values[-1])
