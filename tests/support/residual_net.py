"""Residual networks as ONNX files, to prune, to damage in one place, and to bisect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from maskplan.pipeline.core.reports import DepthReport, LayerDifference
from maskplan.pipeline.parity.bisect import BisectOptions, bisect

Array = npt.NDArray[Any]

IMAGES = np.random.default_rng(1).standard_normal((5, 3, 8, 8), dtype=np.float32)
WEIGHTS = {"stem": (16, 3), "one.a": (16, 16), "one.b": (16, 16), "two.a": (32, 16), "two.b": (32, 32)}
WEIGHTS |= {"two.short": (32, 16), "head": (5, 32)}
LAYERS = [
    "stem",
    "stem.relu",
    "one.a",
    "one.a.relu",
    "one.b",
    "one.add",
    "one.relu",
    "two.short",
    "two.a",
    "two.a.relu",
]
LAYERS += ["two.b", "two.add", "two.relu", "pool", "flatten", "head"]


def weights(seed: int = 0) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    made = {}
    for name, (k, c) in WEIGHTS.items():
        shape = (k, c) if name == "head" else (k, c, 3, 3)
        made[name] = (generator.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)
    return made


def residual_net(path: Path, tensors: dict[str, Array], *, batch: int | str = "batch", norm: bool = False) -> Path:
    """Two residual blocks, the second with a convolution on its shortcut; with BatchNormalization behind each if asked."""
    nodes: list[onnx.NodeProto] = []
    initializers = [numpy_helper.from_array(value, f"{name}.weight") for name, value in tensors.items()]

    def conv(name: str, source: str) -> str:
        nodes.append(helper.make_node("Conv", [source, f"{name}.weight"], [f"{name}.out"], name, pads=[1, 1, 1, 1]))
        if not norm:
            return f"{name}.out"
        scale = np.linspace(0.5, 1.5, len(tensors[name])).astype(np.float32)
        stored = {"scale": scale, "bias": 0 * scale, "mean": 0 * scale, "var": 0 * scale + 1}
        initializers.extend(numpy_helper.from_array(value, f"{name}.{key}") for key, value in stored.items())
        names = [f"{name}.out", *(f"{name}.{key}" for key in stored)]
        nodes.append(helper.make_node("BatchNormalization", names, [f"{name}.normed"], f"{name}.bn", epsilon=0.0))
        return f"{name}.normed"

    def relu(name: str, source: str) -> str:
        nodes.append(helper.make_node("Relu", [source], [f"{name}.relu.out"], f"{name}.relu"))
        return f"{name}.relu.out"

    def block(name: str, source: str, shortcut: str) -> str:
        inner = conv(f"{name}.b", relu(f"{name}.a", conv(f"{name}.a", source)))
        nodes.append(helper.make_node("Add", [inner, shortcut], [f"{name}.add.out"], f"{name}.add"))
        return relu(name, f"{name}.add.out")

    x = relu("stem", conv("stem", "input"))
    x = block("one", x, x)
    x = block("two", x, conv("two.short", x))
    nodes.append(helper.make_node("GlobalAveragePool", [x], ["pool.out"], "pool"))
    nodes.append(helper.make_node("Flatten", ["pool.out"], ["flatten.out"], "flatten"))
    nodes.append(helper.make_node("Gemm", ["flatten.out", "head.weight"], ["logits"], "head", transB=1))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 5])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def pruned(tensors: dict[str, Array]) -> dict[str, Array]:
    """2:4 by magnitude along the input channels, but for the stem."""
    made = dict(tensors)
    for name, weight in tensors.items():
        if name != "stem":
            groups = np.moveaxis(weight, 1, -1).reshape(-1, 4).copy()
            np.put_along_axis(groups, np.argsort(np.abs(groups), axis=1)[:, :2], 0, axis=1)
            shape = np.moveaxis(weight, 1, -1).shape
            made[name] = np.ascontiguousarray(np.moveaxis(groups.reshape(shape), -1, 1))
    return made


def spoilt(tensors: dict[str, Array], name: str, seed: int, factor: float) -> dict[str, Array]:
    """One weight of a layer, drawn from those that are not small, times a factor."""
    weight = tensors[name].copy()
    generator = np.random.default_rng(seed)
    large = np.argwhere(np.abs(weight) > np.nanmedian(np.abs(weight[weight != 0])))
    weight[tuple(generator.choice(large))] *= factor
    return {**tensors, name: weight}


def edited(path: Path, out: Path, edit: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(path)
    edit(model)
    out.write_bytes(model.SerializeToString())
    return out


def run(dense: Path, sparse: Path, images: Array = IMAGES, **options: Any) -> DepthReport:
    return bisect(dense, sparse, images, BisectOptions(**options))


def by_node(report: DepthReport) -> dict[str, LayerDifference]:
    return {layer.node: layer for layer in report.layers}


def assert_all_the_same(report: DepthReport, nodes: Sequence[str] = tuple(LAYERS), most: float = 1e-5) -> None:
    assert sorted(layer.node for layer in report.layers) == sorted(nodes)
    assert max(layer.relative if layer.relative is not None else np.inf for layer in report.layers) <= most
    assert report.unmatched == ()
    assert report.first is None
