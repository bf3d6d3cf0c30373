"""A model without files that returns zeros as its config declares them, so that loading it judges the config alone."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One instance of a model."""

    def initialize(self, args: dict[str, str]) -> None:
        self._config = json.loads(args["model_config"])

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._response(request) for request in requests]

    def _response(self, request: Any) -> Any:
        batch = list(request.inputs()[0].shape())[:1] if self._config["max_batch_size"] else []
        tensors = []
        for output in self._config["output"]:
            declared = output["reshape"]["shape"] if "reshape" in output else output["dims"]
            shape = batch + [1 if int(size) < 0 else int(size) for size in declared]
            # NumPy has no BF16: such an output is left out.
            if output["data_type"] != "TYPE_BF16":
                dtype = pb_utils.triton_string_to_numpy(output["data_type"])
                tensors.append(pb_utils.Tensor(output["name"], np.zeros(shape, dtype)))
        return pb_utils.InferenceResponse(tensors)
