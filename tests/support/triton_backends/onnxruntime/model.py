"""Models of the platform `onnxruntime_onnx`, for a Triton server without NVIDIA's backend for ONNX Runtime."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from batches import responses, session_of


class TritonPythonModel:
    """One instance of a model."""

    def initialize(self, args: dict[str, str]) -> None:
        self._config = json.loads(args["model_config"])
        name = self._config["default_model_filename"] or "model.onnx"
        path = Path(args["model_repository"]) / args["model_version"] / name
        self._session = session_of(path.read_bytes())

    def execute(self, requests: list[Any]) -> list[Any]:
        return responses(requests, self._session, self._config)
