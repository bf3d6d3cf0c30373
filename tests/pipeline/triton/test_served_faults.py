"""Graphs that other tools export, deployed and served by the real Triton server: faults that people have met."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployable import record
from onnx import TensorProto, helper
from served_models import engine, graph, images, served, weights
from triton_server import missing, triton_server

from maskplan.engines.sidecar import read_engine, write_sidecar
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.files import sha256_of

INT64 = TensorProto.INT64

# Deploys a plan, and prints how many bytes the process has held at most.
DEPLOY = """
import re, sys
from pathlib import Path
from maskplan.pipeline.triton.deploy import DeployOptions, deploy
deploy(Path(sys.argv[1]), DeployOptions(Path(sys.argv[2]), "big"))
# Not ru_maxrss: that of a process starts at what its parent had.
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024)
"""


def net(path: Path, last: Any, shape: Any, batch: Any = "N", **tensors: Any) -> Path:
    """A convolution and pooling to (N, 4, 1, 1), named p, and a last node to y."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "conv", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        last,
    ]
    return graph(path, nodes, [("x", [batch, 3, 8, 8])], [("y", shape)], w=weights(4, 3, 3, 3), **tensors)


def flattened(path: Path, shape: Any = ("N", 4), batch: Any = "N") -> Path:
    return net(path, helper.make_node("Flatten", ["p"], ["y"]), shape, batch)


def detector(path: Path, per_class: int = 3) -> Path:
    """Boxes of four places and their scores, and as many rows as detections are left of all images."""
    nodes = [
        helper.make_node("Conv", ["x", "wb"], ["b"], "box", strides=[4, 4]),
        helper.make_node("Conv", ["x", "ws"], ["s"], "score", strides=[4, 4]),
        helper.make_node("Reshape", ["b", "sb"], ["b1"]),
        helper.make_node("Transpose", ["b1"], ["boxes"], perm=[0, 2, 1]),
        helper.make_node("Reshape", ["s", "ss"], ["s1"]),
        helper.make_node("Sigmoid", ["s1"], ["scores"]),
        helper.make_node("NonMaxSuppression", ["boxes", "scores", "most", "iou", "least"], ["y"]),
    ]
    return graph(
        path,
        nodes,
        [("x", ["batch", 3, 8, 8])],
        [("y", ["num_dets", 3], INT64)],
        wb=weights(4, 3, 4, 4),
        ws=weights(2, 3, 4, 4),
        sb=np.array([0, 4, -1], np.int64),
        ss=np.array([0, 2, -1], np.int64),
        most=np.array([per_class], np.int64),
        iou=np.array([0.5], np.float32),
        least=np.array([0.1], np.float32),
    )


@pytest.mark.parametrize("per_class", [3, 1])
def test_rows_of_detections_are_not_split_among_requests(per_class: int, tmp_path: Path, triton: Any) -> None:
    """Three clients at a time: with dynamic batching, Triton would give each as many rows as it sent images."""
    feeds = [{"x": images(batch)} for batch in (1, 2, 3)]
    config = served(triton, f"detector{per_class}", detector(tmp_path / "m.onnx", per_class), feeds)
    assert config["max_batch_size"] == 0
    assert "dynamic_batching" not in config


def test_a_scalar_input_is_a_vector_of_one(tmp_path: Path, triton: Any) -> None:
    nodes = [helper.make_node("Mul", ["x", "gain"], ["y"]), helper.make_node("ReduceSum", ["y"], ["sum"], keepdims=0)]
    for position in range(2):
        inputs = [("x", ["N", 3]), ("gain", [])][:: 1 - 2 * position]
        source = graph(tmp_path / "m.onnx", nodes, inputs, [("y", ["N", 3]), ("sum", [])])
        feeds = [{"x": np.arange(6, dtype=np.float32).reshape(2, 3), "gain": np.float32([3])}]
        config = served(triton, f"scalar{position}", source, feeds)
        dims = {tensor["name"]: tensor["dims"] for tensor in (*config["input"], *config["output"])}
        assert (dims["gain"], dims["sum"], config["max_batch_size"]) == ([1], [1], 0)


def test_one_number_for_each_image_is_still_batched(tmp_path: Path, triton: Any) -> None:
    nodes = [helper.make_node("ArgMax", ["x"], ["y"], axis=1, keepdims=0)]
    source = graph(tmp_path / "m.onnx", nodes, [("x", ["N", 7])], [("y", ["N"], INT64)])
    feeds = [{"x": np.random.default_rng(b).random((b, 7), dtype=np.float32)} for b in (1, 2, 4)]
    assert served(triton, "argmax", source, feeds)["max_batch_size"] == 8


@pytest.mark.parametrize("declared", [None, ["N", 5]])
def test_an_output_without_a_shape_or_with_a_wrong_one_gets_its_own(declared: Any, tmp_path: Path, triton: Any) -> None:
    source = flattened(tmp_path / "m.onnx", declared)
    config = served(triton, f"shapeless{declared and len(declared)}", source, [{"x": images(b)} for b in (1, 3)])
    assert (config["max_batch_size"], config["output"][0]["dims"]) == (8, [4])


@pytest.mark.parametrize(("target", "declared"), [([1, -1], ("N", 4)), ([2, -1], None)])
def test_a_batch_baked_into_a_reshape_is_fixed(target: list[int], declared: Any, tmp_path: Path, triton: Any) -> None:
    last = helper.make_node("Reshape", ["p", "target"], ["y"])
    source = net(tmp_path / "m.onnx", last, declared, target=np.array(target, np.int64))
    batch = target[0]
    name = f"baked{batch}"
    config = served(triton, name, source, [{"x": images(batch)}])
    assert (config["max_batch_size"], config["input"][0]["dims"]) == (0, [batch, 3, 8, 8])
    assert config["output"][0]["dims"] == [batch, 4]
    with pytest.raises(InputError, match="shape"):
        triton.infer(name, {"x": images(batch + 1)})


def test_a_dimension_of_minus_one_is_a_dynamic_one(tmp_path: Path, triton: Any) -> None:
    source = flattened(tmp_path / "m.onnx", [-1, 4], -1)
    config = served(triton, "minus", source, [{"x": images(b)} for b in (1, 5)])
    assert (config["max_batch_size"], config["input"][0]["dims"]) == (8, [3, 8, 8])


def test_inputs_that_do_not_share_a_batch_are_not_batched(tmp_path: Path, triton: Any) -> None:
    """Images and boxes: each request has its own number of boxes."""
    nodes = [
        helper.make_node("RoiAlign", ["x", "boxes", "which"], ["r"], output_height=2, output_width=2),
        helper.make_node("Flatten", ["r"], ["y"]),
    ]
    inputs = [("x", ["N", 3, 8, 8]), ("boxes", ["R", 4]), ("which", ["R"], INT64)]
    source = graph(tmp_path / "m.onnx", nodes, inputs, [("y", ["R", 12])])
    boxes = np.float32([[0, 0, 4, 4], [1, 1, 7, 7], [2, 0, 6, 3]])
    feeds = [{"x": images(b), "boxes": boxes[:n], "which": np.arange(n) % b} for b, n in ((1, 3), (2, 2))]
    assert served(triton, "boxes", source, feeds)["max_batch_size"] == 0


def test_an_input_without_a_shape_is_refused(tmp_path: Path) -> None:
    source = graph(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], [("x", None)], [("y", ["N", 3])])
    with pytest.raises(InputError, match="an input has no shape") as caught:
        engine(source)
    assert "x" in str(caught.value)


@pytest.mark.slow
def test_a_plan_of_more_than_2_gb_is_deployed_in_parts(tmp_path: Path) -> None:
    """Larger than one message of protobuf and one write of Linux; the server's backend is one that does not read it."""
    if missing():
        pytest.skip(missing())
    path = tmp_path / "big.plan"
    with path.open("wb") as file:
        file.write(b"start")
        file.truncate(2**31 + 2**20)
        file.seek(0, 2)
        file.write(b"end")
    write_sidecar(record(path=path, sha256=sha256_of(path), bytes=path.stat().st_size))
    done = subprocess.run([sys.executable, "-c", DEPLOY, path, tmp_path / "models"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2**30
    deployed = tmp_path / "models/big/1/model.plan"
    assert read_engine(deployed).bytes == deployed.stat().st_size == 2**31 + 2**20 + 3
    config = tmp_path / "models/big/config.pbtxt"
    config.write_text(config.read_text().replace("KIND_GPU", "KIND_CPU"))
    with triton_server(tmp_path / "models", control="none", any_model=True) as server:
        assert server.is_ready("big", 1)
