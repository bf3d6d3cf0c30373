"""Small ONNX files of many shapes to serve, and what ONNX Runtime makes of them without a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper, save

from maskplan.engines.build import BuildOptions, build_engine
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.core.artifacts import Profile

Value = tuple[Any, ...]
PROFILES = (Profile(1, 1, 1), Profile(1, 4, 8))


def weights(*shape: int) -> Any:
    """Seeded values of about 1 / sqrt(fan-in)."""
    scale = np.sqrt(np.prod(shape[1:]))
    return (np.random.default_rng(len(shape)).standard_normal(shape) / scale).astype(np.float32)


def graph(path: Path, nodes: Sequence[Any], inputs: Sequence[Value], outputs: Sequence[Value], **tensors: Any) -> Path:
    """Write a graph; inputs and outputs are (name, shape) or (name, shape, type), where a shape of None is not declared."""

    def info(name: str, shape: Any, kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    made = helper.make_graph(
        list(nodes),
        "net",
        [info(*value) for value in inputs],
        [info(*value) for value in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def engine(source: Path, profiles: tuple[Profile, ...] = PROFILES, out: str = "engine.onnx") -> Path:
    """Build it for ONNX Runtime."""
    return build_engine(describe_onnx(source), BuildOptions("onnxruntime", profiles), source.with_name(out)).path


def answers(path: Path, feeds: dict[str, Any]) -> dict[str, Any]:
    """What the file answers without a server."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def images(batch: int, size: int = 8, channels: int = 3) -> Any:
    """Seeded images."""
    return np.random.default_rng(batch).random((batch, channels, size, size), dtype=np.float32)
