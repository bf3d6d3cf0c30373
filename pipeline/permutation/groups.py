"""Which channels of a network can be swapped with which others.

This is read from the ATen operators that `torch.export` records, so that the classes of the network's modules do not matter.
The steps: (1) every axis of every parameter and buffer gets its own channels; (2) the operators are followed in order, and
each ties channels or pins them (`operators.py`); (3) channels of tensors that share memory are tied as well; (4) channels
with equal signatures (`axes.py`) that nothing pins form a group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.models.aten import export_aten
from maskplan.pipeline.permutation.axes import Channels, Integers, Places, Value
from maskplan.pipeline.permutation.calls import Call
from maskplan.pipeline.permutation.operators import follow

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.export import ExportedProgram

_ALONE = "no other channel is used in the same positions"
_UNSAVED = "it is tied to a tensor that checkpoints do not store"


class UnexportableError(InputError):
    """The model cannot be permuted because its operators cannot be read; it can be used without a permutation."""


@dataclass(frozen=True, eq=False)
class Place:
    """The positions of a group's channels along one axis of a tensor of the state dict.

    The same channel may occur at several positions of an axis (its copies), such as the pixels of a channel that a linear
    layer reads flattened; all of them move with the channel.

    Attributes:
        tensor: Name in the state dict.
        axis: Axis of the tensor.
        positions: (channels, copies) int64; row i lists the positions of channel i.
    """

    tensor: str
    axis: int
    positions: Integers


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that can be reordered freely: if all places follow, the network computes the same function.

    Attributes:
        name: Name of the layer that produces them, with a number if it produces several groups.
        places: Every axis that they run along, first the one that the name is from; all list the channels in the same order.
    """

    name: str
    places: tuple[Place, ...]

    @property
    def size(self) -> int:
        """Number of channels."""
        return len(self.places[0].positions)


@dataclass(frozen=True)
class Fixed:
    """Channels that cannot move.

    Attributes:
        name: Name of the layer that produces or reads them.
        channels: Number of channels.
        reason: Why they cannot move.
    """

    name: str
    channels: int
    reason: str


@dataclass(frozen=True)
class Axes:
    """All channels of a network's layers."""

    movable: tuple[Group, ...]
    fixed: tuple[Fixed, ...]


def find_groups(module: nn.Module, preprocessing: Preprocessing) -> Axes:
    """Export a module to ATen operators and follow its channels from the input to the output.

    Args:
        module: Its weights do not change.
        preprocessing: Gives the size of an image.

    Raises:
        UnexportableError: `torch.export` cannot export the module, or sizes depend on values of the input.
    """
    program = _exported(module, preprocessing)
    channels = Channels()
    values, parameters = _walk(program, channels)
    _tie_shared(channels, parameters, module)
    return _grouped(channels, values, parameters, set(module.state_dict()))


def _exported(module: nn.Module, preprocessing: Preprocessing) -> ExportedProgram:
    try:
        program = export_aten(module, preprocessing)
        for node in program.graph.nodes:
            _require_sizes(node)
        return program
    except Exception as error:  # the exporter raises any exception that the model's code causes
        raise UnexportableError(
            "the model cannot be permuted: torch.export cannot read its operators",
            found=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
            fix="continue without permuting it, or rewrite the code that depends on values of the input",
        ) from error


def _require_sizes(node: torch.fx.Node) -> None:
    """Raise for a size that is a symbol because it depends on values of the input."""
    value = _first(node.meta.get("val"))
    if not all(isinstance(size, int) for size in getattr(value, "shape", ())):
        raise ValueError(f"the size of {node.name} depends on values of the input")


def _walk(program: ExportedProgram, channels: Channels) -> tuple[list[Value], dict[str, Value]]:
    """All tensors of a network, and its parameters and buffers by name."""
    signature = program.graph_signature
    saved = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names = saved | signature.inputs_to_lifted_tensor_constants
    known = {node: program.constants[name] for node, name in names.items() if name in program.constants}
    values: dict[torch.fx.Node, Any] = {}
    parameters: dict[str, Value] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = _input(channels, node, saved, _uniform_dims(known.get(node.name)), parameters)
        elif node.op == "output":
            for value in _tensors(_substituted(node.args, values)):
                for places in value.places:
                    channels.pin(places, "it is an output of the network")
        elif node.op == "call_function" and isinstance(node.target, _overload()):
            values[node] = follow(channels, _call(node, values), _is_pointwise(node.target))
        elif node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem":
            source, index = _substituted(node.args, values)
            values[node] = source[index] if isinstance(source, list) else Value(_shape(node))
        else:
            for value in _tensors(_substituted((node.args, node.kwargs), values)):
                for places in value.places:
                    channels.pin(places, f"the operator {node.target} is not supported")
            values[node] = Value(_shape(node))
    return list(_tensors(values.values())), parameters


def _input(
    channels: Channels,
    node: torch.fx.Node,
    saved: Mapping[str, str],
    even: frozenset[int],
    parameters: dict[str, Value],
) -> Value:
    shape = _shape(node)
    name = saved.get(node.name)
    if name is not None:
        dims = [d for d, size in enumerate(shape) if size > 1 and d not in even]
        value = Value(shape, tuple(channels.fresh(shape, d) for d in dims), even)
        parameters[name] = value
        return value
    if node.name in _user_inputs(node) and len(shape) == 4 and shape[1] > 1:
        return Value(shape, (channels.fresh(shape, 1, "it is an input of the network"),))
    return Value(shape, constant=even)


def _uniform_dims(constant: torch.Tensor | None) -> frozenset[int]:
    """Dimensions along which all values are equal, such as those of a blur filter that all channels share."""
    if constant is None or not constant.numel():
        return frozenset()
    return frozenset(d for d in range(constant.ndim) if bool((constant == constant.narrow(d, 0, 1)).all()))


def _user_inputs(node: torch.fx.Node) -> set[str]:
    # The images come last, after the module's parameters, buffers and constants.
    last = [n.name for n in node.graph.nodes if n.op == "placeholder"][-1:]
    return set(last)


def _call(node: torch.fx.Node, values: Mapping[Any, Any]) -> Call:
    target: Any = node.target
    arguments = {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}
    arguments |= {a.name: v for a, v in zip(target._schema.arguments, node.args, strict=False)}
    arguments |= node.kwargs
    used = {n.args[1] for n in node.users if getattr(n.target, "__name__", "") == "getitem"}
    return Call(
        target._schema.name.removeprefix("aten::"),
        {name: _substituted(value, values) for name, value in arguments.items()},
        _shape(node),
        frozenset(i for i in used if isinstance(i, int)),
        _same_layout(node),
    )


def _substituted(value: Any, values: Mapping[Any, Any]) -> Any:
    """An argument of a node, with each node of the graph replaced by its `Value`."""
    if isinstance(value, list | tuple):
        return [_substituted(v, values) for v in value]
    if isinstance(value, dict):
        return {k: _substituted(v, values) for k, v in value.items()}
    return values.get(value, Value(())) if hasattr(value, "users") else value


def _tensors(values: Any) -> Iterable[Value]:
    if isinstance(values, Value):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(values.values())
    elif not isinstance(values, str) and isinstance(values, Iterable):
        for value in values:
            yield from _tensors(value)


def _overload() -> type:
    from torch._ops import OpOverload

    return OpOverload


def _is_pointwise(target: Any) -> bool:
    import torch

    return torch.Tag.pointwise in target.tags


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list | tuple) and value else value


def _shape(node: torch.fx.Node) -> tuple[int, ...]:
    return tuple(int(size) for size in getattr(_first(node.meta.get("val")), "shape", ()))


def _same_layout(node: torch.fx.Node) -> bool:
    made, given = (_first(n.meta.get("val")) if n is not None else None for n in (node, _first_tensor(node)))
    if made is None or given is None or not hasattr(made, "stride") or made.shape != given.shape:
        return False
    pairs = zip(made.shape, made.stride(), given.stride(), strict=True)
    return all(size == 1 or one == other for size, one, other in pairs)


def _first_tensor(node: torch.fx.Node) -> torch.fx.Node | None:
    first = node.args[0] if node.args else None
    return first if first is not None and hasattr(first, "users") else None  # type: ignore[return-value]


def _tie_shared(channels: Channels, parameters: Mapping[str, Value], module: nn.Module) -> None:
    """Tie tensors that share memory, such as those of a layer with two names; export reads only one of them."""
    state = module.state_dict(keep_vars=True)
    by_memory: dict[int, list[str]] = defaultdict(list)
    for name in parameters:
        if name in state and state[name].numel():
            by_memory[state[name].untyped_storage().data_ptr()].append(name)
    for first, *others in by_memory.values():
        for name in others:
            one, other = parameters[first], parameters[name]
            if _layout(state[first]) == _layout(state[name]):
                for pair in zip(one.places, other.places, strict=True):
                    channels.tie(*pair)
            else:
                for places in (*one.places, *other.places):
                    channels.pin(places, "another tensor shares its memory in a different layout")


def _layout(tensor: torch.Tensor) -> tuple[object, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def _grouped(channels: Channels, values: Sequence[Value], parameters: Mapping[str, Value], saved: set[str]) -> Axes:
    for name, value in parameters.items():
        if name not in saved:
            for places in value.places:
                channels.pin(places, _UNSAVED)
    signatures = channels.signatures(values)
    pinned = channels.pinned()
    owned = [
        (name, places.dims[0], channels.resolved(places))
        for name, value in sorted(parameters.items(), key=lambda item: len(item[1].shape) < 2)
        for places in value.places
        if name in saved
    ]
    classes = _classes(owned, signatures, pinned)
    movable: list[Group] = []
    fixed: list[Fixed] = []
    names: dict[str, int] = defaultdict(int)
    index = np.full(len(signatures), -1)
    for (reason, _), (members, axes) in classes.items():
        index[members] = np.arange(len(members))
        members_at = [Place(name, axis, _positions(index, each, len(members))) for name, axis, each in axes]
        index[members] = -1
        layers = [p for p in members_at if len(parameters[p.tensor].shape) > 1 and p.axis < 2]
        if not layers:
            continue
        first = min(layers, key=lambda p: p.axis)
        name = first.tensor.removesuffix(".weight")
        if reason is None and len(members) > 1:
            names[name] += 1
            number = f"#{names[name]}" if names[name] > 1 else ""
            movable.append(Group(name + number, (first, *(p for p in members_at if p is not first))))
        else:
            fixed.append(Fixed(name, len(members), reason or _ALONE))
    return Axes(tuple(movable), _merged(fixed))


_Owned = tuple[str, int, Places]


def _classes(
    owned: Sequence[_Owned], signatures: npt.NDArray[np.uint64], pinned: Mapping[int, str]
) -> dict[tuple[str | None, int], tuple[Integers, list[_Owned]]]:
    """Channels by the reason that pins them and by signature, with the axes that they run along, in the order of tensors."""
    members: dict[tuple[str | None, int], dict[int, None]] = defaultdict(dict)
    axes: dict[tuple[str | None, int], list[_Owned]] = defaultdict(list)
    for each in owned:
        met = set()
        for channel in each[2].channels.ravel().tolist():
            key = (pinned.get(channel), int(signatures[channel]))
            members[key][channel] = None
            met.add(key)
        for key in met:
            axes[key].append(each)
    return {key: (np.fromiter(own, np.int64), axes[key]) for key, own in members.items()}


def _positions(index: Integers, places: Places, count: int) -> Integers:
    """(channels, copies) int64, the copies in the order of their numbers."""
    ids, copies = index[places.channels.ravel()], places.copies.ravel()
    own = np.flatnonzero(ids >= 0)
    order = own[np.lexsort((copies[own], ids[own]))]
    # Of channels that are pinned, some may own more places than others.
    return order.reshape(count, -1) if order.size % count == 0 else order[:, None]


def _merged(fixed: Sequence[Fixed]) -> tuple[Fixed, ...]:
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for each in fixed:
        counts[each.name, each.reason] += each.channels
    return tuple(Fixed(name, count, reason) for (name, reason), count in counts.items())
