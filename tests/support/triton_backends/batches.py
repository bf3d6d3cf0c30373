"""What both backends do with a batch of requests, as NVIDIA's do: join them, run once, hand each as many rows as it sent.

The server runs this in an environment of its own: nothing of maskplan is imported.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


def session_of(graph: bytes) -> onnxruntime.InferenceSession:
    """A session of one thread, for an ONNX graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def responses(requests: list[Any], session: Any, config: dict[str, Any]) -> list[Any]:
    """A response for each request."""
    names = [tensor["name"] for tensor in config["output"]]
    inputs = [{t.name(): t.as_numpy() for t in request.inputs()} for request in requests]
    if config["max_batch_size"] == 0:
        return [_response(names, session.run(names, feeds)) for feeds in inputs]
    outputs = session.run(names, {name: np.concatenate([one[name] for one in inputs]) for name in inputs[0]})
    answers, at = [], 0
    for one in inputs:
        rows = len(next(iter(one.values())))
        answers.append(_response(names, [output[at : at + rows] for output in outputs]))
        at += rows
    return answers


def _response(names: list[str], arrays: list[Any]) -> Any:
    tensors = [pb_utils.Tensor(n, np.ascontiguousarray(a)) for n, a in zip(names, arrays, strict=True)]
    return pb_utils.InferenceResponse(tensors)
