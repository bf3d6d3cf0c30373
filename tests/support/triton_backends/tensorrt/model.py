"""Models of the platform `tensorrt_plan`, whose plans the stand-in for TensorRT has built: the graph in them is run.

The server has no GPU. FAKE_GPU tells the compute capability that it would have.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import triton_python_backend_utils as pb_utils
from batches import Graph

# As in fake_tensorrt_runtime.py: then 8 bytes for the length of a JSON header, the header, and the graph.
MAGIC = b"FAKEPLAN"


class TritonPythonModel:
    """One instance of a model."""

    def initialize(self, args: dict[str, str]) -> None:
        self._config = json.loads(args["model_config"])
        capability = os.environ.get("FAKE_GPU", "8.0")
        name = self._config["cc_model_filenames"].get(capability) or self._config["default_model_filename"]
        path = Path(args["model_repository"]) / args["model_version"] / (name or "model.plan")
        data = path.read_bytes()
        start = len(MAGIC) + 8
        if not data.startswith(MAGIC):
            raise pb_utils.TritonModelException(f"{path.name}: magicTagRead == kMAGIC_TAG failed")
        end = start + int.from_bytes(data[len(MAGIC) : start], "little")
        header = json.loads(data[start:end])
        built_for = ".".join(map(str, header["capability"]))
        if built_for != capability:
            raise pb_utils.TritonModelException(
                f"{path.name} is for GPUs of {built_for}, and this one has {capability}"
            )
        # Without profiles in the instance group, TensorRT's backend uses the first.
        group = self._config["instance_group"][0] if self._config["instance_group"] else {}
        self._profiles = [header["profiles"][int(index)] for index in group.get("profile") or ["0"]]
        self._graph = Graph(data[end:], self._config)

    def execute(self, requests: list[Any]) -> list[Any]:
        shapes = {t.name(): list(t.as_numpy().shape) for t in requests[0].inputs()}
        if self._config["max_batch_size"]:
            rows = sum(len(request.inputs()[0].as_numpy()) for request in requests)
            shapes = {name: [rows, *shape[1:]] for name, shape in shapes.items()}
        if not any(all(_fits(shapes[name], *profile[name]) for name in shapes) for profile in self._profiles):
            error = pb_utils.TritonError(f"no profile is for {shapes}")
            return [pb_utils.InferenceResponse(error=error) for _ in requests]
        return self._graph.responses(requests)


def _fits(shape: list[int], least: list[int], _: list[int], most: list[int]) -> bool:
    return all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))
