"""The export stage: PyTorch to ONNX, checked against the eager module, with names and bytes that can be relied on."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import numpy_helper

from exporters.metadata import describe_onnx, write_provenance
from exporters.precision import to_fp16
from pipeline import __version__
from pipeline.artifacts import OnnxModel, Provenance
from pipeline.errors import InputError
from pipeline.files import write_atomically
from pipeline.layers import sample_input

if TYPE_CHECKING:
    from torch import nn

OPSET = 20
INPUT, OUTPUT = "input", "logits"
PRECISIONS = ("fp32", "fp16")
_WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


@dataclass(frozen=True)
class ExportOptions:
    """How closely the exported files must agree with PyTorch.

    Attributes:
        tolerance_fp32: Largest difference from the eager outputs, as a share of their largest value.
        tolerance_fp16: The same for FP16.
    """

    tolerance_fp32: float = 1e-3
    tolerance_fp16: float = 5e-2


def export_onnx(
    module: nn.Module, provenance: Provenance, options: ExportOptions, outs: Mapping[str, Path]
) -> tuple[OnnxModel, ...]:
    """Export a module with a dynamic batch.

    Args:
        module: In evaluation mode, with the weights to export.
        provenance: Of these weights; goes into the file's metadata.
        options: How closely ONNX Runtime must agree with the eager module.
        outs: The file to write for each precision; the inputs and outputs of FP16 files stay FP32.

    Returns:
        The files' records, in the order of `outs`.

    Raises:
        InputError: PyTorch cannot export the module, or a file computes something else.
    """
    model = trace(module, provenance)
    contents = {}
    for precision, path in outs.items():
        proto = model if precision == "fp32" else to_fp16(model)
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
    _rename(model, module)
    _positive_zeros(model)
    model.producer_name, model.producer_version = "maskplan", __version__
    write_provenance(model, provenance)
    onnx.checker.check_model(model)
    return model


def _strip(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes: stack traces with this host's paths, scopes, versions."""
    graph = model.graph
    for described in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del described.metadata_props[:]
        described.doc_string = ""
    del model.metadata_props[:]
    model.doc_string = ""
    # Shapes of inner tensors follow from the graph; the exporter's hold names of symbols.
    del graph.value_info[:]
    graph.name = "main"


def _rename(model: onnx.ModelProto, module: nn.Module) -> None:
    """Name transposed weights after their parameter, and weight-bearing nodes after their module."""
    parameters = dict(module.named_parameters())
    transposed = {
        (tuple(p.T.shape), hashlib.sha256(p.detach().T.contiguous().numpy().tobytes()).digest()): name
        for name, p in parameters.items()
        if p.ndim == 2
    }
    taken = {tensor.name for tensor in model.graph.initializer}
    names: dict[str, str] = {}
    for tensor in model.graph.initializer:
        if tensor.name in parameters or len(tensor.dims) != 2:
            continue
        name = transposed.get((tuple(tensor.dims), hashlib.sha256(numpy_helper.to_array(tensor).tobytes()).digest()))
        if name is not None and name not in taken:
            names[tensor.name] = name
            tensor.name = name
            taken.add(name)
    used: dict[str, int] = {}
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        weight = next((name for name in node.input[:2] if name in parameters), None)
        if node.op_type in _WEIGHTED and weight is not None:
            path = weight.removesuffix(".weight")
            used[path] = used.get(path, 0) + 1
            node.name = path if used[path] == 1 else f"{path}_{used[path]}"


def _positive_zeros(model: onnx.ModelProto) -> None:
    """Folding BatchNorm with a negative gamma makes -0.0 of a pruned 0.0; adding +0.0 undoes that."""
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor)
            if np.signbit(values[values == 0]).any():
                tensor.CopyFrom(numpy_helper.from_array(values + np.float32(0), tensor.name))


def _require_same(module: nn.Module, provenance: Provenance, data: bytes, tolerance: float, path: Path) -> None:
    """Run one image and three through ONNX Runtime and the eager module; the traced batch was two."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = sample_input(provenance.preprocessing, batch, seed=batch)
        with torch.no_grad():
            expected = module(x).float().numpy()
        (found,) = session.run([OUTPUT], {INPUT: x.numpy()})
        scale = max(float(np.abs(expected).max()), 1e-6)
        difference = float(np.abs(found - expected).max()) / scale
        if not difference <= tolerance:
            raise InputError(
                "the exported model computes something else than the module",
                where=f"{path.name}, batch of {batch}",
                found=f"outputs differ by {difference:.2g} of their largest value; {tolerance:g} is allowed",
                fix="if FP16 alone fails, activations overflow: keep FP32",
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints progress and warns of its own internals; neither is for our users."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _gist(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
