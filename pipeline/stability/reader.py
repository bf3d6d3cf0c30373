"""Reads a module as a network for the bounds, from its exported ATen operators."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.models.aten import SAMPLE_BATCH, export_aten
from maskplan.pipeline.stability.calls import (
    MIXES_IMAGES,
    Call,
    UncoveredError,
    batch_shape,
    call_of,
    dim_of,
    name_of,
    path_of,
    shape_of,
    tensors_in,
)
from maskplan.pipeline.stability.network import BatchNorm, Conv, Linear, Network, Node, Op, Operator, Scale
from maskplan.pipeline.stability.rules import RULES

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

# Operators with several results, each of which is read as a slice.
_SPLITS = frozenset(("split", "split_with_sizes"))

# BatchNorm in evaluation mode.
_BATCH_NORM = "_native_batch_norm_legit_no_training"

ACCEPTED_OPERATORS = frozenset(RULES) | _SPLITS | {_BATCH_NORM}
"""Names of the operators that can be read; some of their uses are refused."""


def read_network(module: nn.Module, preprocessing: Preprocessing) -> Network:
    """Export a module, in evaluation mode, and translate its operators.

    Raises:
        InputError: `torch.export` refuses the module, or some operators have no bound; all are named.
    """
    return read_program(_exported(module, preprocessing))


def read_program(program: ExportedProgram) -> Network:
    """Translate the operators of an exported module.

    Raises:
        InputError: Some operators have no bound; all are named.
    """
    reader = _Reader(program)
    for node in program.graph.nodes:
        reader.read(node)
    if reader.uncovered:
        raise InputError(
            "the bounds do not cover the model",
            found=listed(reader.uncovered),
            fix="bounds exist for convolutions, linear layers, BatchNorm, pooling, sums, concatenations and activations;"
            " measurements on images, as in `compare`, are possible for any model",
        )
    return reader.network()


def _exported(module: nn.Module, preprocessing: Preprocessing) -> ExportedProgram:
    try:
        return export_aten(module, preprocessing, whole_layers=True)
    except Exception as error:  # the exporter raises whatever the model's code leads it to
        raise InputError(
            "the bounds do not cover the model: torch.export cannot read its operators",
            found=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
            fix="rewrite code that depends on values of the input",
        ) from error


class _Reader:
    """Translates nodes of an exported graph in order.

    Attributes:
        uncovered: Operators without a bound, with their places and reasons.
    """

    def __init__(self, program: ExportedProgram) -> None:
        signature = program.graph_signature
        self._state_names: dict[str, str] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._not_saved = frozenset(signature.non_persistent_buffers)
        self._images = signature.user_inputs[0]
        self._outputs = signature.user_outputs
        self._nodes: list[Node] = []
        # By exported node: the number of the network's node with the same values, or the name in the state dict.
        self._numbers: dict[Any, int] = {}
        self._names: dict[Any, str] = {}
        self._output: int | None = None
        self.uncovered: list[str] = []

    def read(self, node: Any) -> None:
        """Translate the next node of the exported graph."""
        if node.op == "placeholder":
            if node.name in self._state_names:
                self._names[node] = self._state_names[node.name]
            elif node.name == self._images:
                self._numbers[node] = self._add("input", None, (), shape_of(node))
        elif node.op == "output":
            self._read_output(node)
        elif node.op == "call_function":
            try:
                self._translate(node)
            except UncoveredError as error:
                reason = f" ({error})" if str(error) else ""
                self.uncovered.append(f"{name_of(node.target)} at {path_of(node)}{reason}")
                # Operators that follow are checked as well.
                self._numbers[node] = 0

    def network(self) -> Network:
        """The nodes that the logits depend on, renumbered."""
        assert self._output is not None
        used, pending = set(), [self._output]
        while pending:
            number = pending.pop()
            if number not in used:
                used.add(number)
                pending += self._nodes[number].inputs
        # The images come first even if the logits do not depend on them.
        new_number = {old: new for new, old in enumerate(sorted(used | {0}))}
        return Network(
            tuple(
                replace(self._nodes[old], inputs=tuple(new_number[i] for i in self._nodes[old].inputs))
                for old in new_number
            )
        )

    def parameter(self, value: Any) -> str | None:
        """Name of a tensor of the state dict; None for a missing argument.

        Raises:
            UncoveredError: The tensor is computed, a constant, or not saved in the state dict.
        """
        if value is None:
            return None
        if value not in self._names:
            raise UncoveredError("its weight is computed")
        if self._names[value] in self._not_saved:
            raise UncoveredError("its weight is not part of the state dict")
        return self._names[value]

    def weight(self, value: Any) -> str:
        """Name of a tensor of the state dict."""
        name = self.parameter(value)
        if name is None:
            raise UncoveredError("without a weight")
        return name

    def is_image(self, value: Any) -> bool:
        """Whether a tensor depends on the images."""
        return value in self._numbers

    def _read_output(self, node: Any) -> None:
        # The node lists changed buffers before the module's own results.
        results = [n for n in tensors_in(node.args) if n.name in self._outputs]
        if len(self._outputs) != 1 or len(results) != 1:
            self.uncovered.append(f"{len(self._outputs)} outputs instead of one")
        elif results[0] not in self._numbers:
            self.uncovered.append("an output that does not depend on the images")
        else:
            self._output = self._numbers[results[0]]

    def _add(self, name: str, op: Op | None, inputs: tuple[int, ...], shape: tuple[int, ...]) -> int:
        self._nodes.append(Node(name, op, inputs, shape))
        return len(self._nodes) - 1

    def _translate(self, node: Any) -> None:
        if node.target is operator.getitem:
            self._read_part(node)
            return
        name = name_of(node.target)
        if name in _SPLITS:
            return  # the parts are read one by one
        if not any(self.is_image(n) for n in node.all_input_nodes):
            raise UncoveredError("it changes weights" if node.all_input_nodes else "it makes a constant")
        if batch_shape(node)[:1] != (SAMPLE_BATCH,):
            raise UncoveredError(MIXES_IMAGES)
        if name == _BATCH_NORM:
            self._read_norm(node, call_of(node))
        elif name in RULES:
            call = call_of(node)
            op, tensors = RULES[name](self, call)
            numbers = tuple(self._numbers[tensor] for tensor in tensors)
            self._numbers[node] = numbers[0] if op is None else self._add(path_of(node), op, numbers, call.shape)
        else:
            raise UncoveredError

    def _read_norm(self, node: Any, call: Call) -> None:
        args = call.args
        source = args["input"]
        if not self.is_image(source):
            raise UncoveredError("it changes weights")
        norm = BatchNorm(
            self.parameter(args["weight"]),
            self.parameter(args["bias"]),
            self.weight(args["running_mean"]),
            self.weight(args["running_var"]),
            float(args["eps"]),
        )
        number = self._numbers[source]
        op = self._nodes[number].op
        # Fold into a layer whose result nothing else reads. An identity in between may share the layer with other readers.
        is_layer = source.op == "call_function" and name_of(source.target) in ("conv2d", "linear")
        if (
            is_layer
            and len(source.users) == 1
            and (isinstance(op, Conv) or (isinstance(op, Linear) and len(call.shape) == 1))
        ):
            self._nodes[number] = replace(self._nodes[number], op=replace(op, norm=norm))
            self._numbers[node] = number
        else:
            self._numbers[node] = self._add(path_of(node), Scale(norm), (number,), call.shape)

    def _read_part(self, node: Any) -> None:
        """One of several results: a piece of a split tensor, or the normalized values of a BatchNorm."""
        import torch

        source, index = node.args
        name = name_of(source.target)
        if name == _BATCH_NORM:
            if index != 0:
                raise UncoveredError(f"result {index} of {name}")
            self._numbers[node] = self._numbers[source]
            return
        if name not in _SPLITS:
            # The operator itself is named already.
            self._numbers[node] = 0
            return
        call = call_of(source)
        whole = call.input
        dim = dim_of(call.args["dim"], whole)
        if not self.is_image(whole):
            raise UncoveredError("it changes weights")
        parts = source.meta["val"]
        position = index % len(parts)
        start = sum(int(part.shape[dim]) for part in parts[:position])
        length = int(parts[position].shape[dim])
        op = Operator(torch.ops.aten.narrow.default, (dim, start, length), (), 1.0)
        self._numbers[node] = self._add(path_of(node), op, (self._numbers[whole],), shape_of(node))
