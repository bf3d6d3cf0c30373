"""Small ONNX files of many shapes to serve, and what ONNX Runtime makes of them without a server."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, load, numpy_helper, save

from maskplan.engines.build import BuildOptions, build_engine
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.core.artifacts import Profile
from maskplan.pipeline.triton.deploy import DeployOptions, deploy

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


def served(triton: Any, name: str, source: Path, feeds: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """Deploy, load, and compare the answers to requests that are sent at once with the file's own.

    Returns:
        The config that the server runs.
    """
    deploy(engine(source), DeployOptions(triton.repository, name, **options))
    triton.server.load(name)
    with ThreadPoolExecutor(len(feeds)) as pool:
        found = list(pool.map(lambda feed: triton.infer(name, feed), feeds))
    scalars = {value.name for value in load(source).graph.input if not value.type.tensor_type.shape.dim}
    for feed, outputs in zip(feeds, found, strict=True):
        own = {key: value.reshape(()) if key in scalars else value for key, value in feed.items()}
        for key, wanted in answers(source, own).items():
            assert (outputs[key].size, outputs[key].dtype) == (wanted.size, wanted.dtype)
            tolerance = 1e-2 if wanted.dtype == np.float16 else 1e-4
            np.testing.assert_allclose(outputs[key], wanted.reshape(outputs[key].shape), rtol=tolerance, atol=tolerance)
    config: dict[str, Any] = triton.server.ask("GET", f"/v2/models/{name}/config")[1]
    return config
