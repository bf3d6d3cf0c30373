"""ONNX Runtime sessions on the CPU: the only place that creates and runs them."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskplan.pipeline.core.errors import InputError

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnxruntime

log = logging.getLogger(__name__)

UNFUSED = "ONNX Runtime runs it without fusing Q/DQ, because its fused operators do not support FP16"
"""What logs and engine records say of a session that `open_session` opened without the optimizer below."""

# Fuses Q/DQ with the operator between them, also where the fused operator does not take FP16 scales (QLinearConcat).
_QDQ_FUSION = "QDQSelectorActionTransformer"
# Ends the process by a segmentation fault where an FP16 LayerNormalization stands between two transpositions behind a Conv,
# as in the first block of vision transformers (seen in ONNX Runtime 1.31.1).
_LAYOUT_OPTIMIZER = "NchwcTransformer"
_logged: set[str] = set()
_unfused: weakref.WeakSet[onnxruntime.InferenceSession] = weakref.WeakSet()

REJECTED = "ONNX Runtime does not accept the file"
_ERRORS, _FATAL_ERRORS = 3, 4


def open_session(
    model: Path | bytes,
    where: object = None,
    *,
    optimized: bool = True,
    external_data_dir: Path | None = None,
    quiet: bool = False,
    what: str = REJECTED,
    fix: str = "check it with `maskplan check`",
) -> onnxruntime.InferenceSession:
    """Load an ONNX model with ONNX Runtime's CPU provider.

    Where ONNX Runtime fails on an operator that its own optimizer made of Q/DQ, the model runs without that optimizer, and a
    log line says so: the operators then compute on floats, with the same results.

    Args:
        model: The path of an ONNX file, or a serialized `ModelProto`.
        where: What error messages name; the path by default.
        optimized: False disables graph optimization, so that each node computes exactly what the graph says.
        external_data_dir: The folder of external weights when the model is given as bytes.
        quiet: Log fatal errors only; by default ONNX Runtime also logs errors to stderr.
        what: First line of the error message when the model is rejected.
        fix: Last line of that message.

    Raises:
        InputError: ONNX Runtime rejects the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ERRORS if quiet else _ERRORS
    # Several sessions and other worker threads share the CPU; spinning threads would take time from them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Without it, products of INT8 saturate in 16 bits on CPUs with AVX2 but without VNNI: a convolution of ones can be 0
    # (seen in ONNX Runtime 1.31.1). On x86, weights are then computed with as UINT8, with the same values.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if external_data_dir is not None:
        folder = str(external_data_dir.resolve())
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    source = str(model) if isinstance(model, Path) else model
    if where is None and isinstance(model, Path):
        where = model
    providers = ["CPUExecutionProvider"]
    disabled = [_LAYOUT_OPTIMIZER] if optimized and _normalizes_in_fp16(model) else []
    try:
        return onnxruntime.InferenceSession(source, options, providers=providers, disabled_optimizers=disabled)
    except Exception as error:  # the exceptions of onnxruntime have no other common base class
        failure = error
    if optimized and "QLinear" in str(failure):
        with contextlib.suppress(Exception):
            session = onnxruntime.InferenceSession(
                source, options, providers=providers, disabled_optimizers=[_QDQ_FUSION, *disabled]
            )
            _unfused.add(session)
            if str(where) not in _logged:
                _logged.add(str(where))
                log.info("%s: %s", where or "model", UNFUSED)
            return session
    raise InputError(what, where=where, found=str(failure).partition("\n")[0], fix=fix) from failure


def run_session(
    session: onnxruntime.InferenceSession,
    outputs: Sequence[str],
    feeds: Mapping[str, npt.NDArray[Any]],
    where: object,
    *,
    fix: str = "check the input's shape and type",
) -> list[npt.NDArray[Any]]:
    """Run a session once and return the outputs in the order of their names; all outputs where none is named.

    Args:
        session: The session.
        outputs: Names of outputs.
        feeds: Inputs by name.
        where: What error messages name.
        fix: Last line of the error message.

    Raises:
        InputError: The feeds do not match the inputs, or the graph fails on them.
    """
    try:
        return list(session.run(list(outputs) or None, dict(feeds)))
    except Exception as error:  # the exceptions of onnxruntime have no other common base class
        found = str(error).partition("\n")[0]
        raise InputError("ONNX Runtime cannot run the model", where=where, found=found, fix=fix) from error


def _normalizes_in_fp16(model: Path | bytes) -> bool:
    """Whether a model has a Conv, a LayerNormalization and FP16 values; unreadable models are left to ONNX Runtime."""
    import onnx

    try:
        content = model.read_bytes() if isinstance(model, Path) else model
        # Parsing takes longer than this search, and few convolutional networks have the operator.
        if b"LayerNormalization" not in content or b"Conv" not in content:
            return False
        graph = onnx.ModelProto.FromString(content).graph
    except Exception:
        return False
    half = onnx.TensorProto.FLOAT16
    return any(tensor.data_type == half for tensor in graph.initializer) or any(
        attribute.i == half or attribute.t.data_type == half
        for node in graph.node
        if node.op_type in ("Cast", "Constant")
        for attribute in node.attribute
    )


def is_unfused(session: onnxruntime.InferenceSession) -> bool:
    """Whether `open_session` had to disable the fusion of Q/DQ for a session."""
    return session in _unfused
