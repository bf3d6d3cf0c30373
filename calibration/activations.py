"""Histograms of the activations of an FP32 graph, collected with ONNX Runtime in one pass over the images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from maskplan.calibration.graph import Graph
from maskplan.calibration.histogram import Histogram
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.ort_session import open_session, run_session

if TYPE_CHECKING:
    import onnxruntime

# Activations of about this size are counted while the next ones, of the same size, are computed.
_SLICE_BYTES = 128 << 20

_Images = npt.NDArray[np.float32]
_Values = Mapping[str, npt.NDArray[Any]]


def collect_histograms(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    batches: Iterable[_Images | _Values],
    *,
    where: object = "the model",
    whole: bool = False,
) -> dict[str, Histogram]:
    """Run images through a graph and count the values of some of its tensors.

    Batches run in slices whose activations take about 128 MB, or in the graph's batch size if that is fixed, so memory does
    not depend on the size of a batch. A thread counts one slice while ONNX Runtime computes the next.

    Args:
        model: Without external data. Not changed.
        tensors: Names of float tensors: outputs of nodes, or inputs of the graph.
        batches: Rows of each input by its name, or of the only input; iterated once. The arrays must not be reused for the
            next batch.
        where: Name of the model in messages.
        whole: Each batch is what one run takes, with its batch axis if there is one.

    Returns:
        A histogram for each tensor, in the order given.

    Raises:
        InputError: There are no images, the graph does not run on them, or an activation is NaN or infinite.
        ValueError: The graph has no such tensor.
    """
    graph = Graph(model.graph)
    sources = [value for value in model.graph.input if value.name not in graph.constants]
    names_in = [value.name for value in sources]
    if unknown := [name for name in tensors if name not in graph.producers and name not in names_in]:
        raise ValueError(f"no such tensors: {unknown}")
    # In the order of the graph, so that the first tensor that is not finite is reported.
    names = sorted(dict.fromkeys(tensors), key=lambda name: graph.producers.get(name, -1))
    histograms = {name: Histogram() for name in names}
    computed = [name for name in names if name in graph.producers]
    session = open_session(_with_outputs(model, computed).SerializeToString(), where)
    fixed = 0 if whole else _fixed_batch(sources)

    def count(values: _Values, feeds: _Values) -> None:
        for name, histogram in histograms.items():
            histogram.update(values[name])
            if not histogram.finite:
                raise _not_finite(model, graph, name, feeds, where)

    step = fixed or 1
    # A single thread: counting holds the interpreter lock, while ONNX Runtime releases it.
    with ThreadPoolExecutor(1) as pool:
        counted: Future[None] | None = None
        for batch in batches:
            given = batch if isinstance(batch, Mapping) else {names_in[0]: batch}
            rows = 1 if whole else len(next(iter(given.values())))
            start = 0
            while start < rows:
                feeds = given if whole else {name: array[start : start + step] for name, array in given.items()}
                size = rows if whole else len(next(iter(feeds.values())))
                start += size
                padded = {name: _padded(array, fixed) for name, array in feeds.items()}
                values = {**feeds, **_run(session, computed, padded, where)}
                if size < fixed:
                    values = {name: v[:size] if v.shape[:1] == (fixed,) else v for name, v in values.items()}
                if counted is not None:
                    counted.result()
                elif not fixed:
                    # The first slice, of one image, shows how much memory an image takes.
                    step = max(1, _SLICE_BYTES * size // max(sum(v.nbytes for v in values.values()), 1))
                counted = pool.submit(count, values, feeds)
                del values
        if counted is None:
            raise InputError("no images to calibrate on", where=where, fix="give at least one batch of images")
        counted.result()
    return {name: histograms[name] for name in tensors}


def _fixed_batch(sources: Sequence[onnx.ValueInfoProto]) -> int:
    """The batch size that the graph declares; 0 if it is dynamic."""
    dims = [value.type.tensor_type.shape.dim for value in sources]
    return max((max(d[0].dim_value, 0) for d in dims if d), default=0)


def _padded(images: _Images, fixed: int) -> _Images:
    """The images, the last one repeated up to the fixed batch size of the graph."""
    return (
        images
        if not fixed or len(images) >= fixed
        else np.concatenate([images, np.repeat(images[-1:], fixed - len(images), axis=0)])
    )


def _with_outputs(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    present = {value.name for value in model.graph.output}
    # ONNX Runtime infers the types.
    extended.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    return extended


def _run(session: onnxruntime.InferenceSession, names: Sequence[str], feeds: _Values, where: object) -> dict[str, Any]:
    if not names:
        return {}
    values = run_session(session, names, feeds, where, fix="check the images' shape and type")
    return dict(zip(names, values, strict=True))


def _not_finite(model: onnx.ModelProto, graph: Graph, name: str, feeds: _Values, where: object) -> InputError:
    """The error that names the first node with a NaN or infinite output; runs the graph once more to find it."""
    broken_inputs = [source for source, values in feeds.items() if _is_broken(values)]
    if broken_inputs:
        return InputError(
            "the images are NaN or infinite",
            where=f"input {broken_inputs[0]} of {where}",
            fix="check the images and their scaling",
        )
    ancestors = _with_ancestors(graph, name)
    session = open_session(_with_outputs(model, ancestors).SerializeToString(), where)
    values = _run(session, ancestors, feeds, where)
    broken = {n for n, value in values.items() if _is_broken(value)}
    # Go back from the tensor to a node whose inputs are all finite.
    culprit, back = name, True
    while back:
        inputs = [n for n in graph.nodes[graph.producers[culprit]].input if n in broken]
        culprit, back = (inputs[0], True) if inputs else (culprit, False)
    node = graph.nodes[graph.producers[culprit]]
    value = values[culprit] if culprit in broken else np.array([np.inf])
    weights = [n for n in node.input if n in graph.constants and _is_broken(numpy_helper.to_array(graph.constants[n]))]
    produced_by = f"output of {node.op_type} {graph.names[graph.producers[culprit]]}"
    return InputError(
        "an activation is NaN or infinite",
        where=f"tensor {culprit}, {produced_by}, of {where}",
        found=f"{'NaN' if np.isnan(value).any() else 'infinity'}"
        + (f"; its constant {weights[0]} is not finite either" if weights else ""),
        fix="check the weights and the scaling of the images",
    )


def _with_ancestors(graph: Graph, name: str) -> list[str]:
    """A tensor and all tensors from which it is computed, without constants and inputs, in the order of the graph."""
    wanted, found = [name], set[str]()
    while wanted:
        tensor = wanted.pop()
        if tensor in graph.producers and tensor not in found and tensor not in graph.constants:
            found.add(tensor)
            wanted.extend(graph.nodes[graph.producers[tensor]].input)
    return sorted(found, key=lambda tensor: graph.producers[tensor])


def _is_broken(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all()
