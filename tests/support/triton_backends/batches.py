"""What both backends do with a config and a batch of requests, as NVIDIA's do.

They compare the config with the graph when a model is loaded. They join the requests of a batch, run once, and hand each as
many rows of every output as it sent. The server runs this in an environment of its own: nothing of maskplan is imported.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

_TYPES = {"float": "FP32", "float16": "FP16", "double": "FP64"}


class Graph:
    """An ONNX graph that serves a config.

    Args:
        graph: The serialized graph.
        config: The model's config, as Triton hands it to a backend.
    """

    def __init__(self, graph: bytes, config: dict[str, Any]) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._config = config
        self._scalars = {v.name for v in (*self._session.get_inputs(), *self._session.get_outputs()) if not v.shape}
        for tensors, values, exact in (
            (config["input"], self._session.get_inputs(), False),
            (config["output"], self._session.get_outputs(), True),
        ):
            _compare(tensors, {v.name: v for v in values}, config["max_batch_size"] > 0, exact)

    def responses(self, requests: list[Any]) -> list[Any]:
        """A response for each request."""
        names = [tensor["name"] for tensor in self._config["output"]]
        inputs = [{t.name(): t.as_numpy() for t in request.inputs()} for request in requests]
        if self._config["max_batch_size"] == 0:
            return [self._response(names, self._session.run(names, self._feeds(one))) for one in inputs]
        outputs = self._session.run(names, {name: np.concatenate([one[name] for one in inputs]) for name in inputs[0]})
        answers, at = [], 0
        for one in inputs:
            rows = len(next(iter(one.values())))
            answers.append(self._response(names, [output[at : at + rows] for output in outputs]))
            at += rows
        return answers

    def _feeds(self, arrays: dict[str, Any]) -> dict[str, Any]:
        return {name: array.reshape(()) if name in self._scalars else array for name, array in arrays.items()}

    def _response(self, names: list[str], arrays: list[Any]) -> Any:
        tensors = [
            pb_utils.Tensor(name, np.ascontiguousarray(array.reshape(1) if name in self._scalars else array))
            for name, array in zip(names, arrays, strict=True)
        ]
        return pb_utils.InferenceResponse(tensors)


def _compare(tensors: list[Any], values: dict[str, Any], is_batched: bool, exact: bool) -> None:
    """Refuse a config with other names, types or dims than the graph's; of an input, either may leave a size open."""
    for tensor in tensors:
        if tensor["name"] not in values:
            raise pb_utils.TritonModelException(f"unexpected tensor {tensor['name']}, allowed are {list(values)}")
        value = values[tensor["name"]]
        kind = value.type.removeprefix("tensor(").removesuffix(")")
        if tensor["data_type"] != f"TYPE_{_TYPES.get(kind, kind.upper())}":
            raise pb_utils.TritonModelException(f"{value.name} is {kind}, the config has {tensor['data_type']}")
        graph = [size if isinstance(size, int) and size >= 0 else -1 for size in value.shape]
        dims = [int(d) for d in (tensor["reshape"]["shape"] if "reshape" in tensor else tensor["dims"])]
        if not graph:
            fits = all(size == 1 for size in dims)
        else:
            full = [-1, *dims] if is_batched else dims
            fits = len(full) == len(graph) and all(
                a == b or (not exact and -1 in (a, b)) for a, b in zip(graph, full, strict=True)
            )
            fits = fits and not (is_batched and graph[0] != -1)
        if not fits:
            raise pb_utils.TritonModelException(f"{value.name} has the shape {graph}, the config has {dims}")
