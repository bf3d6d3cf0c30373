"""ONNX Runtime sessions on the CPU: the only place that creates them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from maskplan.pipeline.core.errors import InputError

if TYPE_CHECKING:
    import onnxruntime

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
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if external_data_dir is not None:
        folder = str(external_data_dir.resolve())
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    source = str(model) if isinstance(model, Path) else model
    if where is None and isinstance(model, Path):
        where = model
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the exceptions of onnxruntime have no other common base class
        raise InputError(what, where=where, found=str(error).partition("\n")[0], fix=fix) from error
