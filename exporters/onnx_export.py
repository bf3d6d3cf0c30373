"""The export stage: PyTorch to ONNX, checked against the eager module, with names and bytes that can be relied on."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from maskplan.exporters.half_range import MARGIN, beyond_half
from maskplan.exporters.metadata import describe_onnx, write_provenance
from maskplan.exporters.precision import to_fp16
from maskplan.exporters.subgraphs import subgraphs
from maskplan.exporters.weight_ops import WEIGHT_OPS
from maskplan.pipeline import __version__
from maskplan.pipeline.core.artifacts import OnnxModel, Preprocessing, Provenance
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.files import write_atomically
from maskplan.pipeline.core.validation import above
from maskplan.pipeline.models.layers import sample_input, trace_layers

if TYPE_CHECKING:
    import onnxruntime
    from torch import nn

log = logging.getLogger(__name__)

OPSET = 20
INPUT, OUTPUT = "input", "logits"
PRECISIONS = ("fp32", "fp16")


@dataclass(frozen=True)
class ExportOptions:
    """How closely the exported files must agree with PyTorch.

    Attributes:
        tolerance_fp32: Largest difference from the eager outputs, as a share of their largest value.
        tolerance_fp16: The same for FP16.
    """

    tolerance_fp32: float = 1e-3
    tolerance_fp16: float = 5e-2

    def __post_init__(self) -> None:
        above(0, tolerance_fp32=self.tolerance_fp32, tolerance_fp16=self.tolerance_fp16)


def export_onnx(
    module: nn.Module, provenance: Provenance, options: ExportOptions, outs: Mapping[str, Path]
) -> tuple[OnnxModel, ...]:
    """Export a module with a dynamic batch.

    Args:
        module: In evaluation mode, with the weights to export.
        provenance: Of these weights; goes into the file's metadata.
        options: How closely ONNX Runtime must agree with the eager module.
        outs: The file to write for each precision; the inputs and outputs of FP16 files stay FP32, and so do layers whose
            activations FP16 cannot hold: a warning names them.

    Returns:
        The files' records, in the order of `outs`.

    Raises:
        InputError: PyTorch cannot export the module, or a file computes something else.
    """
    model = trace(module, provenance)
    contents = {}
    for precision, path in outs.items():
        proto = model if precision == "fp32" else to_fp16(model, _beyond_half(model, provenance, path))
        data = proto.SerializeToString(deterministic=True)
        tolerance = options.tolerance_fp32 if precision == "fp32" else options.tolerance_fp16
        _require_same(module, provenance, data, tolerance, path)
        contents[path] = data
    # Written last and together: a model that fails in one precision leaves no file of the other.
    for path, data in contents.items():
        write_atomically(path, data)
    return tuple(describe_onnx(path) for path in contents)


def trace(module: nn.Module, provenance: Provenance) -> onnx.ModelProto:
    """The module as an ONNX graph in FP32, cleaned of everything that is not the model.

    Raises:
        InputError: PyTorch cannot export the module.
    """
    import torch

    # Two images: with one, the exporter would take the batch for a constant.
    example = sample_input(provenance.preprocessing, 2)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module.eval(),
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    except Exception as error:  # the exporter raises whatever its passes meet
        raise InputError(
            "PyTorch cannot export the model to ONNX",
            where=provenance.model,
            found=f"{type(error).__name__}: {_gist(error)}",
            fix="make the forward pass free of data-dependent Python, with any batch size",
        ) from error
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    _strip(model)
    _rename(model, module, provenance.preprocessing)
    _positive_zeros(model)
    model.producer_name, model.producer_version = "maskplan", __version__
    write_provenance(model, provenance)
    onnx.checker.check_model(model)
    return model


def _strip(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes: stack traces with this host's paths, scopes, versions."""
    del model.metadata_props[:]
    model.doc_string = ""
    for function in model.functions:
        _strip_nodes(function.node)
        del function.metadata_props[:]
        function.doc_string = ""
        del function.value_info[:]
    _strip_graph(model.graph)
    model.graph.name = "main"


def _strip_graph(graph: onnx.GraphProto) -> None:
    for described in (graph, *graph.input, *graph.output, *graph.initializer):
        del described.metadata_props[:]
        described.doc_string = ""
    # Shapes of inner tensors follow from the graph; the exporter's hold names of symbols.
    del graph.value_info[:]
    _strip_nodes(graph.node)


def _strip_nodes(nodes: Sequence[onnx.NodeProto]) -> None:
    for node in nodes:
        del node.metadata_props[:]
        node.doc_string = ""
        for graph in subgraphs(node):
            _strip_graph(graph)


def _rename(model: onnx.ModelProto, module: nn.Module, preprocessing: Preprocessing) -> None:
    """Name weights after their parameter and weight-bearing nodes after their module.

    The exporter stores a linear layer's weight transposed under a name of its own, and equal weights once.
    """
    names: dict[tuple[tuple[int, ...], bytes], list[str]] = {}
    for name, parameter in module.named_parameters():
        weight = parameter.detach().cpu()
        if weight.ndim > 1 and weight.is_floating_point():
            for form in (weight, weight.T) if weight.ndim == 2 else (weight,):
                group = names.setdefault(_content(form.contiguous().numpy()), [])
                if name not in group:
                    group.append(name)
    if any(len(group) > 1 for group in names.values()):
        # Equal weights are told apart by the order in which the model, and so the graph, uses them.
        order = {layer.name: layer.position or 0 for layer in trace_layers(module, preprocessing)[0]}
        for group in names.values():
            group.sort(key=lambda name: order.get(name, 0))
    twins = {name: group for group in names.values() for name in group}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    users: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in model.graph.node:
        if node.op_type in WEIGHT_OPS:
            for i, name in enumerate(node.input[:2]):
                if name in stored and len(stored[name].dims) > 1:
                    users.setdefault(name, []).append((node, i))
    for name, nodes in users.items():
        group = twins.get(name) or names.get(_content(numpy_helper.to_array(stored[name])), [])
        if len(group) == len(nodes) and group != [name]:
            tensors = [stored[name], *(model.graph.initializer.add() for _ in group[1:])]
            for tensor, own, (node, i) in zip(tensors, group, nodes, strict=True):
                tensor.CopyFrom(stored[name])
                tensor.name = node.input[i] = own
    count: Counter[str] = Counter()
    for node in model.graph.node:
        weight_name = next((name for name in node.input[:2] if name in twins), None)
        if node.op_type in WEIGHT_OPS and weight_name is not None:
            path = weight_name.removesuffix(".weight")
            count[path] += 1
            node.name = path if count[path] == 1 else f"{path}_{count[path]}"


def _content(values: npt.NDArray[Any]) -> tuple[tuple[int, ...], bytes]:
    return values.shape, hashlib.sha256(values.tobytes()).digest()


def _positive_zeros(model: onnx.ModelProto) -> None:
    """Folding BatchNorm with a negative gamma makes -0.0 of a pruned 0.0; adding +0.0 undoes that."""
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor)
            if np.signbit(values[values == 0]).any():
                tensor.CopyFrom(numpy_helper.from_array(values + np.float32(0), tensor.name))


def _require_same(module: nn.Module, provenance: Provenance, data: bytes, tolerance: float, path: Path) -> None:
    """Run one image and three through ONNX Runtime and the eager module; the traced batch was two."""
    import torch

    session = _session(data, path)
    for batch in (1, 3):
        x = sample_input(provenance.preprocessing, batch, seed=batch)
        with torch.no_grad():
            expected = module(x).float().numpy()
        (found,) = session.run([OUTPUT], {INPUT: x.numpy()})
        scale = max(float(np.abs(expected).max()), 1e-6)
        # NaN and infinity fail the comparison below; NumPy need not warn of them as well.
        with np.errstate(all="ignore"):
            difference = float(np.abs(found - expected).max()) / scale
        if not difference <= tolerance:
            raise InputError(
                "the exported model computes something else than the module",
                where=f"{path.name}, batch of {batch}",
                found=f"outputs differ by {difference:.2g} of their largest value; {tolerance:g} is allowed",
                fix="if FP16 alone fails, it is too coarse for this model: keep FP32",
            )


def _beyond_half(model: onnx.ModelProto, provenance: Provenance, path: Path) -> dict[str, float]:
    """The activations that exceed FP16 on a sample, told in a warning; a CPU computes FP16 in FP32 and does not show it."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(
        onnx.ValueInfoProto(name=name) for node in probe.graph.node for name in node.output if name
    )
    x = sample_input(provenance.preprocessing, 1)
    values = _session(probe.SerializeToString(), path).run(None, {INPUT: x.numpy()})
    # Infinity itself fits into FP16; where it is an overflow of FP32, the comparison with the module fails.
    ranges = {
        output.name: float(np.abs(value).max(initial=0, where=np.isfinite(value)))
        for output, value in zip(probe.graph.output, values, strict=True)
        if value.dtype == np.float32
    }
    beyond = beyond_half(model, ranges)
    if beyond:
        makers = {name: node for node in model.graph.node for name in node.output}
        log.warning(
            "%s: these layers stay FP32 between casts, for FP16 ends at 65504 and a margin of %g is kept: %s",
            path.name,
            MARGIN,
            listed(
                f"{makers[name].name} ({makers[name].op_type}) makes {name} up to {value:.4g}"
                for name, value in beyond.items()
            ),
        )
    return beyond


def _session(data: bytes, path: Path) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        raise InputError(
            "ONNX Runtime does not run the exported model",
            where=path.name,
            found=str(error).partition("\n")[0],
            fix="use operators and types that ONNX Runtime has; float32 is always one",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints progress and warns of its own internals; neither is for our users."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _gist(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
