"""Models of the platform `onnxruntime_onnx`, for a Triton server without NVIDIA's backend for ONNX Runtime."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from batches import Graph


class TritonPythonModel:
    """One instance of a model."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        name = config["default_model_filename"] or "model.onnx"
        path = Path(args["model_repository"]) / args["model_version"] / name
        self._graph = Graph(path.read_bytes(), config)

    def execute(self, requests: list[Any]) -> list[Any]:
        return self._graph.responses(requests)
