"""ONNX Runtime on a graph in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from maskplan.pipeline.core.errors import InputError

_BATCH = 64


def open_session(model: onnx.ModelProto, where: object = None) -> Any:
    """A session on the CPU.

    Raises:
        InputError: ONNX Runtime does not accept the graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Threads that spin would take time from those that count or decode.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        raise InputError(
            "ONNX Runtime does not accept the file",
            where=where,
            found=str(error).partition("\n")[0],
            fix="check it with `maskplan check`",
        ) from error


def logits_of(model: onnx.ModelProto, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The first output of a classifier for images (N, channels, H, W): (N, classes), float32."""
    session = open_session(model)
    name, fixed = session.get_inputs()[0].name, session.get_inputs()[0].shape[0]
    step = fixed if isinstance(fixed, int) else _BATCH
    parts = []
    for start in range(0, len(images), step):
        part = images[start : start + step]
        # A graph of a fixed batch takes no less; what fills it up is not looked at.
        missing = step - len(part) if isinstance(fixed, int) else 0
        filled = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part
        parts.append(session.run(None, {name: filled})[0][: len(part)])
    return np.concatenate(parts).astype(np.float32, copy=False)
