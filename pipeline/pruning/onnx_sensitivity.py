"""What each mask of an ONNX file costs alone: how far the network's outputs are from the dense one's with only it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from maskplan.exporters.layer_bias import BiasSlot, shift_bias
from maskplan.pipeline.core.artifacts import OutputKind
from maskplan.pipeline.core.choices import LOGITS
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.ort_session import open_session, run_session
from maskplan.pipeline.core.progress import track
from maskplan.pipeline.data.samples import Samples, TensorSamples

log = logging.getLogger(__name__)

_BATCH = 16

Outputs = list[npt.NDArray[Any]]


@dataclass(frozen=True)
class BiasShift:
    """A shift (K,) of a layer's products of inputs and weight; `dtype` is that of its outputs."""

    slot: BiasSlot
    shift: npt.NDArray[np.floating]
    dtype: str


@dataclass(frozen=True)
class LayerChange:
    """What pruning does to one layer.

    Attributes:
        name: Of the weight.
        tensor: The weight, in the dense model.
        values: Its new values, in the tensor's shape and type.
        bias: The shift of the outputs; None if there is none.
        macs: Multiplications of a sample.
    """

    name: str
    tensor: TensorProto
    values: npt.NDArray[Any]
    bias: BiasShift | None
    macs: int


@dataclass(frozen=True)
class LayerCost:
    """What the mask of one weight costs alone.

    Attributes:
        name: Of the weight.
        cost: Distance of the outputs: for logits the KL divergence of their softmax, a mean over samples and places; for
            values the squared error relative to the dense outputs' mean square; a mean over the outputs.
        macs_percent: Its share of the multiplications of all these layers.
    """

    name: str
    cost: float
    macs_percent: float


def layer_costs(
    model: onnx.ModelProto,
    folder: Path,
    changes: Sequence[LayerChange],
    samples: Samples,
    kinds: Sequence[OutputKind],
    where: object,
) -> tuple[LayerCost, ...]:
    """Measure every change alone, in the order given.

    Args:
        model: The dense graph; changed while it is measured, and as before afterwards.
        folder: Of its external data.
        changes: Of the graph's layers.
        samples: To run it on.
        kinds: What its outputs hold.
        where: Name of the graph in messages.

    Raises:
        InputError: No output is a float, or the size of an output depends on its values.
    """
    dense = _run(model, folder, samples, kinds, where)
    counted = [kind for kind, values in zip(kinds, dense[0], strict=True) if values.dtype.kind == "f"]
    if not counted:
        found = ", ".join(map(str, kinds))
        raise InputError("the model has no float outputs that masks could be judged by", where=where, found=found)
    dense = [[v for v in batch if v.dtype.kind == "f"] for batch in dense]
    total = sum(change.macs for change in changes)
    costs = []
    for change in track(changes, "cost of each mask", len(changes)):
        with _changed(model, change):
            outputs = _run(model, folder, samples, counted, where)
        cost = _distance(dense, outputs, counted, where)
        costs.append(LayerCost(change.name, cost, 100 * change.macs / total if total else 0.0))
    return tuple(costs)


def within_budget(costs: Sequence[LayerCost], budget: float) -> tuple[str, ...]:
    """The weights to leave dense, costliest first, as long as their multiplications fit `budget`, in percent of all."""
    dense, remaining = [], budget
    for layer in sorted(costs, key=lambda layer: -layer.cost):
        if layer.macs_percent <= remaining:
            dense.append(layer.name)
            remaining -= layer.macs_percent
            log.info("%s stays dense: its mask alone costs %.4g", layer.name, layer.cost)
    return tuple(dense)


def _run(
    model: onnx.ModelProto, folder: Path, samples: Samples, kinds: Sequence[OutputKind], where: object
) -> list[Outputs]:
    """The outputs of each batch."""
    session = open_session(model.SerializeToString(), where, external_data_dir=folder)
    names = [kind.name for kind in kinds]
    size = _batch_of(session, samples)
    return [run_session(session, names, feeds, where) for feeds in samples.batches(size)]


def _batch_of(session: Any, samples: Samples) -> int:
    """The graph's own batch size if it is fixed, else samples are joined to batches."""
    if isinstance(samples, TensorSamples) and samples.one_run_each:
        return 1
    first = [given.shape[0] for given in session.get_inputs() if given.shape]
    fixed = [size for size in first if isinstance(size, int) and size > 0]
    return fixed[0] if fixed else _BATCH


def _distance(dense: list[Outputs], other: list[Outputs], kinds: Sequence[OutputKind], where: object) -> float:
    found = []
    for index, kind in enumerate(kinds):
        pairs = [(a[index].astype(np.float64), b[index].astype(np.float64)) for a, b in zip(dense, other, strict=True)]
        if any(a.shape != b.shape for a, b in pairs):
            fix = "leave out --sensitivity and --keep-dense-budget, or give a graph that ends before boxes are selected"
            raise InputError(f"the size of the output {kind.name!r} depends on its values", where=where, fix=fix)
        if kind.kind == LOGITS:
            divergences = [_divergence(a, b, kind.axis) for a, b in pairs]
            found.append(float(np.concatenate([d.ravel() for d in divergences]).mean()))
        else:
            error = sum(float(((a - b) ** 2).sum()) for a, b in pairs)
            signal = sum(float((a**2).sum()) for a, _ in pairs)
            found.append(error / signal if signal else error)
    return float(np.mean(found))


def _divergence(dense: npt.NDArray[np.float64], other: npt.NDArray[np.float64], axis: int) -> npt.NDArray[np.float64]:
    """KL divergence from the dense softmax, for every place."""
    log_p, log_q = (_log_softmax(values, axis) for values in (dense, other))
    divergence: npt.NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(axis=axis)
    return divergence


def _log_softmax(values: npt.NDArray[np.float64], axis: int) -> npt.NDArray[np.float64]:
    shifted = values - values.max(axis=axis, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))
    return result


@contextmanager
def _changed(model: onnx.ModelProto, change: LayerChange) -> Iterator[None]:
    """The model with one layer pruned, in this context; objects of the graph stay the same objects."""
    saved = [(change.tensor, change.tensor.SerializeToString())]
    inputs, count, graph = None, 0, None
    if change.bias is not None:
        slot = change.bias.slot
        graph, inputs, count = slot.graph, list(slot.node.input), len(slot.graph.initializer)
        saved += [
            (t, t.SerializeToString()) for t in graph.initializer if t.name in inputs[slot.index : slot.index + 1]
        ]
    try:
        _set(change.tensor, change.values)
        if change.bias is not None:
            shift_bias(model, change.bias.slot, change.name, change.bias.shift, change.bias.dtype)
        yield
    finally:
        for tensor, data in saved:
            tensor.ParseFromString(data)
        if change.bias is not None and graph is not None and inputs is not None:
            change.bias.slot.node.input[:] = inputs
            del graph.initializer[count:]


def _set(tensor: TensorProto, values: npt.NDArray[Any]) -> None:
    made = onnx.numpy_helper.from_array(np.ascontiguousarray(values), tensor.name)
    if made.data_type != tensor.data_type:
        # NumPy has no such type of its own: the bytes are those of the tensor's.
        made.data_type = tensor.data_type
    tensor.CopyFrom(made)
