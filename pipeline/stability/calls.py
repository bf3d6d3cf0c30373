"""Operators of an exported graph: their arguments by name, and the shapes of one image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


class UncoveredError(Exception):
    """An operator, or a use of one, without a bound; the message gives the reason unless the name is enough."""


MIXES_IMAGES = "it mixes images"


@dataclass(frozen=True)
class Call:
    """One operator of an exported graph.

    Attributes:
        target: The ATen overload.
        name: Its name without namespace and overload: `conv2d`.
        args: All arguments by name, defaults included; tensors are `fx.Node`s.
        positional: Values of the positional arguments after the first, in the order of the schema.
        keywords: Names and values of the keyword-only arguments.
        shape: Of the result, for one image.
    """

    target: Any
    name: str
    args: dict[str, Any]
    positional: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]
    shape: tuple[int, ...]

    @property
    def input(self) -> Any:
        """The first argument."""
        return next(iter(self.args.values()))


def call_of(node: Any) -> Call:
    """Bind a node's arguments to the names in its operator's schema, however they were given."""
    schema = node.target._schema.arguments
    args = {a.name: a.default_value for a in schema if a.has_default_value()}
    args |= {a.name: v for a, v in zip(schema, node.args, strict=False)} | dict(node.kwargs)
    args = {a.name: args[a.name] for a in schema}
    positional = tuple(args[a.name] for a in schema if not a.kwarg_only)[1:]
    keywords = tuple((a.name, args[a.name]) for a in schema if a.kwarg_only)
    return Call(node.target, name_of(node.target), args, positional, keywords, shape_of(node))


def is_tensor(value: Any) -> bool:
    """Whether an argument is a tensor, that is, another node of the graph."""
    return hasattr(value, "users")


def tensors_in(values: Any) -> Iterator[Any]:
    """The tensors among arguments and lists of arguments, in order."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from tensors_in(value)
        elif is_tensor(value):
            yield value


def name_of(target: Any) -> str:
    """Name of an overload, without its namespace: `conv2d`."""
    schema = getattr(target, "_schema", None)
    return str(target if schema is None else schema.name).removeprefix("aten::")


def path_of(node: Any) -> str:
    """Path of the module that a node belongs to, or the node's own name."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    # Some releases of torch prefix the path with "L['self'].".
    return str(paths[-1].removeprefix("L['self'].") if paths else node.name)


def batch_shape(node: Any) -> tuple[int, ...]:
    """Shape of a node's result, or of its first result, for the whole batch."""
    value = node.meta.get("val")
    first = value[0] if isinstance(value, list | tuple) and value else value
    return tuple(int(size) for size in getattr(first, "shape", ()))


def shape_of(node: Any) -> tuple[int, ...]:
    """Shape of a node's result for one image."""
    return batch_shape(node)[1:]


def dim_of(dim: int, node: Any) -> int:
    """A dimension of the batch, counted from the front.

    Raises:
        UncoveredError: It is the dimension of the images.
    """
    position = dim % len(batch_shape(node))
    if position == 0:
        raise UncoveredError(MIXES_IMAGES)
    return position


def pair_of_ints(value: Any) -> tuple[int, int]:
    """Values for both axes; a single number is used for both."""
    if isinstance(value, int):
        return value, value
    values = [int(v) for v in value]
    return (values[0], values[-1])
