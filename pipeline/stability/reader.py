"""A module to the graph that the bounds are for, read off its ATen operators."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.models.aten import SAMPLE_BATCH, export_aten
from maskplan.pipeline.stability.calls import (
    Call,
    UncoveredError,
    call_of,
    dim_of,
    name_of,
    path_of,
    shape_of,
    tensors_of,
    whole_shape,
)
from maskplan.pipeline.stability.network import BatchNorm, Conv, Linear, Network, Node, Op, Operator, Scale
from maskplan.pipeline.stability.rules import RULES

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram


def read_network(module: nn.Module, preprocessing: Preprocessing) -> Network:
    """Export a module, in evaluation mode, and translate its operators.

    Raises:
        InputError: `torch.export` refuses the module, or some operators have no bound; all are named.
    """
    program = _exported(module, preprocessing)
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


def _exported(module: nn.Module, preprocessing: Preprocessing) -> ExportedProgram:
    try:
        return export_aten(module, preprocessing, whole_layers=True)
    except Exception as error:  # the exporter raises whatever the model's code leads it to
        raise InputError(
            "the bounds do not cover the model: torch.export cannot read its operators",
            found=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
            fix="rewrite what depends on values of the input",
        ) from error


_CUTS = frozenset(("chunk", "split", "split_with_sizes"))


_NORMS = frozenset(("batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit"))


# Evaluation leaves the values as they are.
_SAME = frozenset(("dropout", "feature_dropout", "alias", "detach", "contiguous", "clone", "lift_fresh_copy"))


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
                self._made[node] = self._add("input", None, (), shape_of(node))
        elif node.op == "output":
            self._output = self._made.get(node.args[0][0])
            if self._output is None and not self.uncovered:
                self.uncovered.append("an output that does not depend on the images")
        elif node.op == "call_function":
            try:
                self._translate(node)
            except UncoveredError as error:
                why = f" ({error})" if str(error) else ""
                self.uncovered.append(f"{name_of(node.target)} at {path_of(node)}{why}")
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
        name = name_of(node.target)
        if name in _CUTS:
            return  # their parts are read one by one
        tensors = [n for n in node.all_input_nodes if n in self._made]
        if not tensors:
            raise UncoveredError("it changes weights" if node.all_input_nodes else "it makes a constant")
        if whole_shape(node)[:1] != (SAMPLE_BATCH,):
            raise UncoveredError("images do not stay apart")
        call = call_of(node, name)
        if name in _SAME or (name == "slice" and shape_of(node) == shape_of(tensors[0])):
            self._made[node] = self._made[tensors[0]]
        elif name in _NORMS:
            self._norm(node, call)
        elif name in RULES:
            op = RULES[name](self, call)
            inputs = tuple(self._made[n] for n in tensors_of(call) if n in self._made)
            self._made[node] = self._add(path_of(node), op, inputs, call.shape)
        else:
            raise UncoveredError

    def parameter(self, value: Any) -> str | None:
        """The name of a saved tensor, or None where there is none.

        Raises:
            UncoveredError: It is computed.
        """
        if value is None:
            return None
        if value not in self._names:
            raise UncoveredError("its weight is computed")
        return self._names[value]

    def weight(self, value: Any) -> str:
        name = self.parameter(value)
        assert name is not None
        return name

    def is_image(self, value: Any) -> bool:
        """Whether it depends on the images."""
        return value in self._made

    def _norm(self, node: Any, call: Call) -> None:
        args = call.args
        if "running_mean" not in args or args.get("training"):
            raise UncoveredError("it takes its statistics from the batch")
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
        alone = len(source.users) == 1 and source.op == "call_function" and name_of(source.target) not in _SAME
        if (
            alone
            and isinstance(op, Conv | Linear)
            and op.norm is None
            and (isinstance(op, Conv) or len(call.shape) == 1)
        ):
            self._nodes[number] = replace(self._nodes[number], op=replace(op, norm=norm))
            self._made[node] = number
        else:
            self._made[node] = self._add(path_of(node), Scale(norm), (number,), call.shape)

    def _part(self, node: Any) -> None:
        """One of the pieces that a tensor was cut into."""
        import torch

        source, index = node.args
        name = name_of(source.target)
        if name not in _CUTS:
            # Only BatchNorm has a rule and several results, of which evaluation uses the first.
            self._made[node] = self._made[source]
            return
        call = call_of(source, name)
        whole = call.args["self"]
        dim = dim_of(call.args.get("dim", 0), whole)
        if whole not in self._made:
            raise UncoveredError("it changes weights")
        start = sum(int(part.shape[dim]) for part in source.meta["val"][:index])
        length = int(source.meta["val"][index].shape[dim])
        op = Operator(torch.ops.aten.narrow.default, (dim, start, length), (), 1.0)
        self._made[node] = self._add(path_of(node), op, (self._made[whole],), shape_of(node))
