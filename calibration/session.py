"""ONNX Runtime on an ONNX graph in memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx

from maskplan.pipeline.core.ort_session import open_session

_BATCH = 64


def logits_of(model: onnx.ModelProto, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The first output of a classifier for images (N, channels, H, W): (N, classes), float32."""
    session = open_session(model.SerializeToString())
    name, fixed = session.get_inputs()[0].name, session.get_inputs()[0].shape[0]
    step = fixed if isinstance(fixed, int) and fixed > 0 else _BATCH
    parts = []
    for start in range(0, len(images), step):
        part = images[start : start + step]
        # A fixed batch must be full; the outputs of the padding are dropped.
        missing = step - len(part) if step == fixed else 0
        padded = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part
        parts.append(session.run(None, {name: padded})[0][: len(part)])
    return np.concatenate(parts).astype(np.float32, copy=False)
