"""The shapes of a graph's inputs and outputs, found by running it: files of many tools declare none, or wrong ones."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from maskplan.exporters.metadata import load_onnx
from maskplan.exporters.subgraphs import model_nodes
from maskplan.exporters.tensors import TensorError, read_values
from maskplan.pipeline.core.artifacts import OnnxModel, TensorSpec
from maskplan.pipeline.core.errors import InputError, PipelineError, listed
from maskplan.pipeline.core.ort_session import open_session

log = logging.getLogger(__name__)

_BATCHES = (1, 2, 3)
# Larger ones are rather windows or pixels than images.
_MAX_BATCH = 256
# For dynamic axes behind the batch, such as the height and width of images: the first that the graph runs with.
_SIZES = (64, 224, 32, 8, 1)
# Operators whose number of results depends on the values of their inputs.
_DATA_DEPENDENT = frozenset({"NonMaxSuppression", "NonZero", "Unique", "Compress"})

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class RunShapes:
    """What running a graph has shown.

    Attributes:
        inputs: As declared, but with the batch fixed if the graph runs with one only.
        outputs: As declared where the runs agree; axes that differ between runs are None.
        batched: Whether each image of a batch has one row in every output; None if the graph does not run here.
        notes: What is declared wrongly.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool | None
    notes: tuple[str, ...] = ()


def run_shapes(onnx_model: OnnxModel) -> RunShapes:
    """Run a graph on random inputs of several batch sizes with ONNX Runtime, and compare its outputs with their declaration.

    A graph that ONNX Runtime does not run on these keeps what it declares.

    Raises:
        InputError: An input has no shape.
    """
    inputs, outputs = onnx_model.inputs, onnx_model.outputs
    _require_input_shapes(onnx_model)
    if _is_static(inputs) and all(_is_static([o]) and o.shape for o in outputs):
        return RunShapes(inputs, outputs, False)
    try:
        graph = _Graph(onnx_model)
    except PipelineError as error:
        log.debug("%s: %s", onnx_model.path, error)
        return RunShapes(inputs, outputs, None)
    size = next((s for s in _SIZES if graph.run(1, s) or graph.run(2, s)), None)
    if all(spec.shape[:1] != (None,) for spec in inputs):
        runs = [] if size is None else [r for r in (graph.run(1, size), graph.run(1, 2 * size)) if r]
        learned, notes = _learned(outputs, runs)
        return RunShapes(inputs, learned, False if runs else None, notes)
    return _with_batches(graph, onnx_model, _SIZES[0] if size is None else size)


def baked_batch(onnx_model: OnnxModel, model: onnx.ModelProto) -> RunShapes | None:
    """What running shows of a graph that takes one batch only, although it declares a dynamic one; None of other graphs.

    Only graphs that reshape to a constant first size are run.

    Raises:
        InputError: An input has no shape.
    """
    _require_input_shapes(onnx_model)
    if all(spec.shape[:1] != (None,) for spec in onnx_model.inputs) or not _first_sizes(model):
        return None
    found = run_shapes(onnx_model)
    return found if found.inputs != onnx_model.inputs else None


def set_shapes(model: onnx.ModelProto, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Declare the shapes of a graph's inputs and outputs, in place; returns whether one was declared otherwise."""
    changed = False
    wanted = {spec.name: spec.shape for spec in (*inputs, *outputs)}
    for value in (*model.graph.input, *model.graph.output):
        tensor, shape = value.type.tensor_type, wanted.get(value.name)
        declared = tuple(
            d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else None for d in tensor.shape.dim
        )
        # Without a declared shape the record has (): that says nothing, and is no scalar.
        if shape is None or declared == shape:
            continue
        changed = True
        names = [d.dim_param for d in tensor.shape.dim]
        tensor.ClearField("shape")
        tensor.shape.SetInParent()
        for axis, size in enumerate(shape):
            dim = tensor.shape.dim.add()
            if size is not None:
                dim.dim_value = size
            else:
                dim.dim_param = names[axis] if len(names) == len(shape) and names[axis] else f"{value.name}_{axis}"
    return changed


class _Graph:
    """A graph that runs on seeded random inputs."""

    def __init__(self, onnx_model: OnnxModel) -> None:
        model = load_onnx(onnx_model.path)
        self.inputs, self._names = onnx_model.inputs, [o.name for o in onnx_model.outputs]
        self._session = open_session(onnx_model.path, quiet=True)
        self._symbols = {
            v.name: v.type.tensor_type.shape.dim[0].dim_param
            for v in (*model.graph.input, *model.graph.output)
            if v.type.tensor_type.shape.dim
        }
        # A batch that an exporter has written into the graph is found there.
        self.reshaped_to = _first_sizes(model)
        self.has_data_dependent_sizes = any(node.op_type in _DATA_DEPENDENT for node in model_nodes(model))

    def is_of_the_batch(self, output: str) -> bool:
        """Whether an output's first axis has the same name as an input's."""
        name = self._symbols.get(output, "")
        return bool(name) and name in {self._symbols.get(spec.name) for spec in self.inputs}

    def different_batches(self) -> list[list[int]]:
        """Sizes of the inputs' first axes that differ: by the axes' names, and for one input at a time."""
        names = [self._symbols.get(spec.name) or spec.name for spec in self.inputs]
        distinct = list(dict.fromkeys(names))
        if len(names) < 2:
            return []
        by_name = [[2 + distinct.index(name) for name in names]] if len(distinct) > 1 else []
        return by_name + [[2 if i == other else 3 for i in range(len(names))] for other in range(len(names))]

    def run(self, batch: int | Sequence[int], size: int, scale: float = 1.0) -> Shapes | None:
        """Shapes of the outputs; None if the graph fails.

        Args:
            batch: The batch size, or one for each input.
            size: Of dynamic axes behind the batch.
            scale: Of the random values; 0 gives zeros.
        """
        batches = [batch] * len(self.inputs) if isinstance(batch, int) else batch
        generator = np.random.default_rng(0)
        feeds: dict[str, Any] = {}
        for spec, rows in zip(self.inputs, batches, strict=True):
            shape = [(rows if axis == 0 else size) if d is None else d for axis, d in enumerate(spec.shape)]
            floats = spec.dtype.startswith("float")
            values = generator.standard_normal(shape) * scale if floats else np.zeros(shape)
            try:
                feeds[spec.name] = np.asarray(values, np.dtype(spec.dtype))
            except TypeError:  # a type that NumPy lacks
                return None
        try:
            arrays = self._session.run(self._names, feeds)
        except Exception as error:  # the exceptions of onnxruntime have no other common base class
            log.debug("batch %s, size %s: %s", batch, size, error)
            return None
        return {name: np.shape(array) for name, array in zip(self._names, arrays, strict=True)}


def _first_sizes(model: onnx.ModelProto) -> set[int]:
    """The constant first sizes that Reshape and Expand give their results."""
    targets = {
        node.input[1] for node in model_nodes(model) if node.op_type in ("Reshape", "Expand") and len(node.input) > 1
    }
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model_nodes(model):
        if node.op_type == "Constant" and node.attribute[:1] and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    found: set[int] = set()
    for name in targets & constants.keys():
        with contextlib.suppress(TensorError):
            values = read_values(constants[name], None).array
            if values.ndim == 1 and values.size and 0 < values[0] <= _MAX_BATCH:
                found.add(int(values[0]))
    return found


def _with_batches(graph: _Graph, onnx_model: OnnxModel, size: int) -> RunShapes:
    inputs, outputs = onnx_model.inputs, onnx_model.outputs
    runs = {batch: shapes for batch in _BATCHES if (shapes := graph.run(batch, size))}
    fitting = [batch for batch, shapes in runs.items() if _is_as_declared(outputs, batch, shapes)]
    merged = _merged_batches(list(runs.values())) & graph.reshaped_to
    if merged or not fitting:
        for batch in sorted(merged or graph.reshaped_to - runs.keys()):
            shapes = runs.get(batch) or graph.run(batch, size)
            if shapes and _is_as_declared(outputs, batch, shapes):
                runs, fitting = {batch: shapes}, [batch]
                break
    if not runs:
        return RunShapes(inputs, outputs, None)
    if len(fitting) == 1:
        (batch,) = fitting
        return _with_fixed_batch(inputs, outputs, batch, runs[batch])
    kept = [runs[batch] for batch in fitting] or list(runs.values())
    if any(None in spec.shape[1:] for spec in inputs) and (other := graph.run(1, 2 * size)):
        kept.append(other)
    learned, notes = _learned(outputs, kept)
    rows = {batch: shapes for batch, shapes in runs.items() if not fitting or batch in fitting}
    return RunShapes(inputs, learned, _is_batched(graph, onnx_model, size, rows), notes)


def _with_fixed_batch(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], batch: int, shapes: Shapes
) -> RunShapes:
    fixed = [replace(s, shape=(batch, *s.shape[1:])) if s.shape[:1] == (None,) else s for s in inputs]
    # Inner axes of the inputs that are dynamic may be so in the outputs.
    is_open = any(None in spec.shape[1:] for spec in inputs)
    kept = [o.shape[1:] if is_open and o.shape else shapes[o.name][1:] for o in outputs]
    full = [replace(o, shape=(*shapes[o.name][:1], *rest)) for o, rest in zip(outputs, kept, strict=True)]
    note = (
        f"the batch is declared as dynamic, but the graph runs only with a batch of {batch}: the engine has this batch"
    )
    return RunShapes(tuple(fixed), tuple(full), False, (note,))


def _merged_batches(runs: Sequence[Shapes]) -> set[int]:
    """First sizes that stay as they are while another axis grows with the batch, as after a Reshape to (1, -1)."""
    found = set()
    for shapes in zip(*(run.values() for run in runs), strict=True) if len(runs) == len(_BATCHES) else ():
        if len({(shape[:1], len(shape)) for shape in shapes}) == 1 and shapes[0]:
            axes = list(zip(*shapes, strict=True))
            grows = [axis == tuple(axis[0] * batch for batch in _BATCHES) for axis in axes]
            # An axis that is the batch itself is one that was moved on purpose.
            if any(grown and axis[0] > 1 for grown, axis in zip(grows, axes, strict=True)) and _BATCHES not in axes:
                found.add(axes[0][0])
    return found


def _is_as_declared(outputs: Sequence[TensorSpec], batch: int, shapes: Shapes) -> bool:
    """Whether every output has a shape that its declaration admits, or as many rows as images; an empty one admits all."""
    return all(
        _admits((*shapes[o.name][:1], *o.shape[1:]) if shapes[o.name][:1] == (batch,) else o.shape, shapes[o.name])
        for o in outputs
        if o.shape
    )


def _admits(declared: Sequence[int | None], shape: Sequence[int]) -> bool:
    return len(declared) == len(shape) and all(d in (None, n) for d, n in zip(declared, shape, strict=True))


def _learned(outputs: Sequence[TensorSpec], runs: Sequence[Shapes]) -> tuple[tuple[TensorSpec, ...], tuple[str, ...]]:
    """Outputs with the shapes of the runs where the declaration is missing or wrong."""
    learned, notes = [], []
    for spec in outputs:
        shapes = [run[spec.name] for run in runs]
        ranks = {len(shape) for shape in shapes}
        if len(ranks) != 1 or (spec.shape and all(_admits(spec.shape, shape) for shape in shapes)):
            learned.append(spec)
            continue
        sizes = zip(*shapes, strict=True)
        shape = tuple(
            axis[0] if len(set(axis)) == 1 and not (i == 0 and len(axis) == 1) else None for i, axis in enumerate(sizes)
        )
        learned.append(replace(spec, shape=shape))
        if spec.shape:
            notes.append(f"output {spec.name} is declared as {spec.shape}, but has the shape {shape}")
    return tuple(learned), tuple(notes)


def _is_batched(graph: _Graph, onnx_model: OnnxModel, size: int, runs: Mapping[int, Shapes]) -> bool:
    """Whether each image has one row in every output, whatever is in the images."""
    if any(spec.shape[:1] != (None,) for spec in onnx_model.inputs):
        return False
    rows = dict(runs)
    if not all(shape[:1] == (batch,) for batch, shapes in rows.items() for shape in shapes.values()):
        return False
    if graph.has_data_dependent_sizes:
        if not all(graph.is_of_the_batch(output.name) for output in onnx_model.outputs):
            return False
        others = [graph.run(2, size, scale) for scale in (0.0, 100.0)]
        if not all(shape[:1] == (2,) for shapes in others if shapes for shape in shapes.values()):
            return False
    # Inputs whose first axes may differ do not share a batch.
    return not any(graph.run(sizes, size) for sizes in graph.different_batches())


def _require_input_shapes(onnx_model: OnnxModel) -> None:
    """Require that inputs without axes are scalars."""
    suspects = {spec.name for spec in onnx_model.inputs if not spec.shape}
    if not suspects:
        return
    values = [v for v in load_onnx(onnx_model.path).graph.input if v.name in suspects]
    shapeless = [v.name for v in values if not v.type.tensor_type.HasField("shape")]
    if shapeless:
        raise InputError(
            "an input has no shape",
            where=onnx_model.path,
            found=listed(shapeless),
            fix="export with a shape for each input; an axis of any size is a named one",
        )


def _is_static(specs: Sequence[TensorSpec]) -> bool:
    return all(None not in spec.shape for spec in specs)
