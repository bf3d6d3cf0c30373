"""The export stage: PyTorch to ONNX, verified against the eager module, with reproducible names and bytes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import string
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from maskplan.exporters.half_range import MARGIN, outside_fp16
from maskplan.exporters.metadata import describe_onnx, write_provenance
from maskplan.exporters.precision import to_fp16
from maskplan.exporters.subgraphs import subgraphs, walk_nodes
from maskplan.pipeline import __version__
from maskplan.pipeline.core.artifacts import OnnxModel, Preprocessing, Provenance
from maskplan.pipeline.core.choices import FP32, FloatPrecision
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.files import write_atomically
from maskplan.pipeline.core.ort_session import open_session
from maskplan.pipeline.core.validation import above
from maskplan.pipeline.core.weight_ops import WEIGHT_OPS
from maskplan.pipeline.models.layers import sample_input, trace_layers
from maskplan.pipeline.models.module_outputs import INPUT, flat_outputs, named_tensors

if TYPE_CHECKING:
    import onnxruntime
    from torch import nn

log = logging.getLogger(__name__)

OPSET = 20
PRECISIONS: tuple[FloatPrecision, ...] = get_args(FloatPrecision)


@dataclass(frozen=True)
class ExportOptions:
    """How closely the exported files must agree with PyTorch.

    Attributes:
        tolerance_fp32: Largest allowed difference from the eager outputs, for each output relative to its largest magnitude.
            Of integer outputs it is the share of elements that may differ, but never less than `tolerance_fp16`.
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
        outs: The file to write for each precision. Inputs and outputs of FP16 files stay FP32, and so do layers whose
            activations overflow FP16; a warning names them.

    Returns:
        The files' records, in the order of `outs`.

    Raises:
        InputError: PyTorch cannot export the module, or the outputs of an exported file differ from the module's.
    """
    model = trace(module, provenance)
    contents = {}
    for precision, path in outs.items():
        proto = model if precision == FP32 else to_fp16(model, _activations_outside_fp16(model, provenance, path))
        data = proto.SerializeToString(deterministic=True)
        _require_same_outputs(module, provenance, data, options, precision, path)
        contents[path] = data
    # Written only after all precisions passed: a failure in one of them leaves no file of the others.
    for path, data in contents.items():
        write_atomically(path, data)
    return tuple(describe_onnx(path) for path in contents)


def trace(module: nn.Module, provenance: Provenance) -> onnx.ModelProto:
    """Trace a module to an ONNX graph in FP32 that contains nothing but the model: no stack traces, no paths.

    Raises:
        InputError: PyTorch cannot export the module.
    """
    import torch

    # Two images: with one, the exporter would treat the batch size as a constant.
    example = sample_input(provenance.preprocessing, 2)
    try:
        with torch.no_grad():
            names = list(named_tensors(module.eval()(example[:1])))
        with _quiet(), torch.no_grad(), flat_outputs(module):
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=names,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    except InputError:
        raise
    except Exception as error:  # the passes of the exporter raise errors of any type
        raise InputError(
            "PyTorch cannot export the model to ONNX",
            where=provenance.model,
            found=f"{type(error).__name__}: {_root_cause(error)}",
            fix="remove Python control flow that depends on the data from the forward pass, and allow any batch size",
        ) from error
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    _remove_exporter_notes(model)
    _copy_constants_to_outputs(model.graph)
    _rename_weights_and_nodes(model, module, provenance.preprocessing)
    _normalize_zeros(model)
    _lower_case_einsums(model)
    model.producer_name, model.producer_version = "maskplan", __version__
    write_provenance(model, provenance)
    onnx.checker.check_model(model)
    return model


def _copy_constants_to_outputs(graph: onnx.GraphProto) -> None:
    """Let a node compute each output: ONNX allows no weight or constant as an output."""
    outputs = {value.name for value in graph.output}
    for tensor in [tensor for tensor in graph.initializer if tensor.name in outputs]:
        name, tensor.name = tensor.name, f"{tensor.name}.value"
        for node in walk_nodes(graph.node):
            node.input[:] = [tensor.name if given == name else given for given in node.input]
        # A copy of its own: the layers' weights are named after their parameters.
        copied = graph.initializer.add()
        copied.CopyFrom(tensor)
        copied.name = f"{name}.copy"
        graph.node.append(onnx.helper.make_node("Identity", [copied.name], [name]))


def _lower_case_einsums(model: onnx.ModelProto) -> None:
    """Rename the indices of Einsum equations: TensorRT's parser takes lower-case letters only."""
    for node in walk_nodes(model.graph.node):
        for attribute in node.attribute if node.op_type == "Einsum" else ():
            equation = attribute.s.decode()
            letters = list(dict.fromkeys(c for c in equation if c.isalpha()))
            if attribute.name == "equation" and not equation.islower() and len(letters) <= len(string.ascii_lowercase):
                names = dict(zip(letters, string.ascii_lowercase, strict=False))
                attribute.s = "".join(names.get(c, c) for c in equation).encode()


def _remove_exporter_notes(model: onnx.ModelProto) -> None:
    """Remove the exporter's metadata: stack traces with paths of this host, scopes, versions."""
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
    # Shapes of inner tensors follow from the graph; the exporter's contain names of symbols.
    del graph.value_info[:]
    _strip_nodes(graph.node)


def _strip_nodes(nodes: Sequence[onnx.NodeProto]) -> None:
    for node in nodes:
        del node.metadata_props[:]
        node.doc_string = ""
        for graph in subgraphs(node):
            _strip_graph(graph)


def _rename_weights_and_nodes(model: onnx.ModelProto, module: nn.Module, preprocessing: Preprocessing) -> None:
    """Name weights after their parameter, and nodes with weights after their module.

    The exporter stores the weight of some linear layers transposed under a generated name, and stores equal weights only
    once. So parameters are matched to initializers by content, and shared initializers are split again.
    """
    # Parameters by the content of their weight; a list, since layers may have equal weights.
    names: dict[tuple[tuple[int, ...], bytes], list[str]] = {}
    for name, parameter in (*module.named_parameters(), *_tied_convolutions(module, preprocessing)):
        weight = parameter.detach().cpu()
        if weight.ndim > 1 and weight.is_floating_point():
            for stored_form in (weight, weight.T) if weight.ndim == 2 else (weight,):
                group = names.setdefault(_content_key(stored_form.contiguous().numpy()), [])
                if name not in group:
                    group.append(name)
    if any(len(group) > 1 for group in names.values()):
        # Equal weights are assigned in the order in which the model, and therefore the graph, uses them.
        order = {layer.name: layer.position or 0 for layer in trace_layers(module, preprocessing)[0]}
        for group in names.values():
            group.sort(key=lambda name: order.get(name, 0))
    equal_weights = {name: group for group in names.values() for name in group}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    users: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in model.graph.node:
        if node.op_type in WEIGHT_OPS:
            for i, name in enumerate(node.input[:2]):
                if name in stored and len(stored[name].dims) > 1:
                    users.setdefault(name, []).append((node, i))
    for name, nodes in users.items():
        group = equal_weights.get(name) or names.get(_content_key(numpy_helper.to_array(stored[name])), [])
        # Only if every parameter has exactly one node; a layer that is called twice keeps its one initializer.
        if len(group) == len(nodes) and group != [name]:
            tensors = [stored[name], *(model.graph.initializer.add() for _ in group[1:])]
            for tensor, own, (node, i) in zip(tensors, group, nodes, strict=True):
                tensor.CopyFrom(stored[name])
                tensor.name = node.input[i] = own
    count: Counter[str] = Counter()
    for node in model.graph.node:
        weight_name = next((name for name in node.input[:2] if name in equal_weights), None)
        if node.op_type in WEIGHT_OPS and weight_name is not None:
            path = weight_name.removesuffix(".weight")
            count[path] += 1
            node.name = path if count[path] == 1 else f"{path}_{count[path]}"


def _tied_convolutions(module: nn.Module, preprocessing: Preprocessing) -> list[tuple[str, nn.Parameter]]:
    """Further names of convolution weights that several layers share; each of these layers may be masked."""
    first = {name for name, _ in module.named_parameters()}
    tied = {n: p for n, p in module.named_parameters(remove_duplicate=False) if n not in first and p.ndim > 2}
    if not tied:
        return []
    layers, _ = trace_layers(module, preprocessing)
    return [(layer.name, tied[layer.name]) for layer in layers if layer.name in tied and layer.position is not None]


def _content_key(values: npt.NDArray[Any]) -> tuple[tuple[int, ...], bytes]:
    return values.shape, hashlib.sha256(values.tobytes()).digest()


def _normalize_zeros(model: onnx.ModelProto) -> None:
    """Turn -0.0, which folding BatchNorm with a negative gamma produces from a pruned 0.0, back into +0.0."""
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor)
            if np.signbit(values[values == 0]).any():
                tensor.CopyFrom(numpy_helper.from_array(values + np.float32(0), tensor.name))


def _require_same_outputs(
    module: nn.Module, provenance: Provenance, data: bytes, options: ExportOptions, precision: str, path: Path
) -> None:
    """Compare ONNX Runtime with the eager module at batch sizes 1 and 3; the traced batch size is 2."""
    import torch

    tolerance = options.tolerance_fp32 if precision == FP32 else options.tolerance_fp16
    session = _session(data, path)
    for batch in (1, 3):
        x = sample_input(provenance.preprocessing, batch, seed=batch)
        with torch.no_grad():
            expected = {
                name: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
                for name, tensor in named_tensors(module(x)).items()
            }
        found = dict(zip(expected, session.run(list(expected), {INPUT: x.numpy()}), strict=True))
        problems = []
        for name, values in expected.items():
            allowed = tolerance if values.dtype.kind == "f" else max(tolerance, options.tolerance_fp16)
            difference = _difference(found[name], values)
            if not difference <= allowed:
                problems.append(_told_difference(name, found[name], values, difference, allowed))
        if problems:
            raise InputError(
                "the outputs of the exported model differ from the module's",
                where=f"{path.name}, batch of {batch}",
                found=listed(problems),
                fix="if only FP16 fails, its precision is too low for this model: export FP32",
            )


def _difference(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Of floats the largest difference, relative to the largest value; of other types the share that differs."""
    if found.shape != expected.shape:
        return float("nan")
    if not expected.size:
        return 0.0
    if expected.dtype.kind != "f":
        return float((found != expected).mean())
    if not np.isfinite(expected).any():
        return float("nan")
    # Equal infinities, such as those of a mask, are no difference. NaN fails the comparison; NumPy need not warn of it.
    with np.errstate(all="ignore"):
        differences = np.where(found == expected, 0, np.abs(found - expected.astype(np.float32)))
        scale = float(np.abs(expected).max(initial=0, where=np.isfinite(expected)))
    return float(differences.max()) / max(scale, 1e-6)


def _told_difference(
    name: str, found: npt.NDArray[Any], expected: npt.NDArray[Any], difference: float, allowed: float
) -> str:
    if found.shape != expected.shape:
        return f"{name} has the shape {found.shape} instead of {expected.shape}"
    if expected.dtype.kind != "f":
        return f"{name} differs in {difference:.2g} of its elements; {allowed:g} is allowed"
    return f"{name} differs by {difference:.2g} of its largest value; {allowed:g} is allowed"


def _activations_outside_fp16(model: onnx.ModelProto, provenance: Provenance, path: Path) -> dict[str, float]:
    """The activations that overflow or vanish in FP16 on a sample image; logs a warning with their layers.

    Measured in FP32, because the CPU kernels for FP16 compute in FP32 and never overflow.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(
        onnx.ValueInfoProto(name=name) for node in probe.graph.node for name in node.output if name
    )
    x = sample_input(provenance.preprocessing, 1)
    values = _session(probe.SerializeToString(), path).run(None, {INPUT: x.numpy()})
    # Infinite values are ignored: as a mask they exist in FP16 too, and an overflow of FP32 fails the comparison above.
    ranges = {
        output.name: float(np.abs(value).max(initial=0, where=np.isfinite(value)))
        for output, value in zip(probe.graph.output, values, strict=True)
        if value.dtype == np.float32
    }
    outside = outside_fp16(model, ranges)
    if outside:
        producers = {name: node for node in model.graph.node for name in node.output}
        log.warning(
            "%s: these layers stay FP32, because activations exceed the range of FP16 (65504, with a margin of %g) or "
            "vanish in it: %s",
            path.name,
            MARGIN,
            listed(
                f"{producers[name].name} ({producers[name].op_type}), whose output {name} reaches {value:.4g}"
                for name, value in outside.items()
            ),
        )
    return outside


def _session(data: bytes, path: Path) -> onnxruntime.InferenceSession:
    return open_session(
        data,
        path.name,
        quiet=True,
        what="ONNX Runtime cannot load the exported model",
        fix="use only operators and types that ONNX Runtime supports, such as float32",
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's progress output and its warnings about its own internals."""
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


def _root_cause(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
