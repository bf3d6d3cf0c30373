"""Deployments of every kind, served by the real Triton server in strict mode."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_cuda
import fake_tensorrt
import numpy as np
import pytest
from deployable import LABELS, PROVENANCE, built, source
from onnx import TensorProto, helper
from plan_builds import build
from served_models import answers, engine, graph, images, served, weights
from triton_messages import MISSING, environment
from triton_server import triton_server

from maskplan.pipeline.triton.config import Serving
from maskplan.pipeline.triton.deploy import DeployOptions, deploy

ODD = 'a "quoted\\" näme/ü'

# Asks for the two largest classes over gRPC.
CLASSIFY = """
import json, sys
import numpy as np
import tritonclient.grpc as grpc
url, name, image = sys.argv[1:]
tensor = grpc.InferInput("input", [1, 3, 8, 8], "FP32")
tensor.set_data_from_numpy(np.load(image))
asked = grpc.InferRequestedOutput("logits", class_count=2)
with grpc.InferenceServerClient(url) as client:
    print(json.dumps([text.decode() for text in client.infer(name, [tensor], outputs=[asked]).as_numpy("logits")[0]]))
"""


def conv(path: Path, kind: int = TensorProto.FLOAT, size: Any = 8, batch: Any = "N", name: str = "x") -> Path:
    """A convolution: images in, images out."""
    dtype = np.float16 if kind == TensorProto.FLOAT16 else np.float32
    nodes = [helper.make_node("Conv", [name, "w"], ["y"], pads=[1] * 4)]
    shape = [batch, 3, size, size]
    outputs = [("y", [batch, 4, size, size], kind)]
    return graph(path, nodes, [(name, shape, kind)], outputs, w=weights(4, 3, 3, 3).astype(dtype))


def two_heads(path: Path) -> Path:
    """Two inputs of different types and ranks, two outputs."""
    nodes = [
        helper.make_node("Mul", ["x", "gain"], ["a"]),
        helper.make_node("Relu", ["a"], ["features"]),
        helper.make_node("GlobalMaxPool", ["features"], ["most"]),
        helper.make_node("Cast", ["most"], ["whole"], to=TensorProto.INT32),
    ]
    inputs = [("x", ["N", 3, "H", "W"]), ("gain", ["N", 3, 1, 1])]
    outputs = [("features", ["N", 3, "H", "W"]), ("whole", ["N", 3, 1, 1], TensorProto.INT32)]
    return graph(path, nodes, inputs, outputs)


def test_a_classifier_answers_and_names_its_classes(tmp_path: Path, triton: Any) -> None:
    """The labels by Triton's classification extension; the model's own version and no other."""
    path = built(tmp_path / "engine")
    deploy(path, DeployOptions(triton.repository, "classifier"))
    triton.server.load("classifier")
    assert triton.server.is_ready("classifier", 1)
    assert not triton.server.is_ready("classifier", 2)
    image = images(1)
    (logits,) = answers(path, {"input": image})["logits"]
    np.testing.assert_allclose(triton.infer("classifier", {"input": image})["logits"], [logits], rtol=1e-4)
    best = np.argsort(logits)[::-1][:2]
    wanted = [(int(i), LABELS[i]) for i in best]
    asked = {
        "inputs": [{"name": "input", "shape": [1, 3, 8, 8], "datatype": "FP32", "data": image.ravel().tolist()}],
        "outputs": [{"name": "logits", "parameters": {"classification": 2}}],
    }
    status, answer = triton.server.ask("POST", "/v2/models/classifier/infer", asked)
    assert status == 200, answer
    assert [_index_and_label(text) for text in answer["outputs"][0]["data"]] == wanted
    if environment() is None:
        pytest.skip(MISSING)
    np.save(tmp_path / "image.npy", image)
    command = [sys.executable, "-c", CLASSIFY, triton.server.grpc, "classifier", tmp_path / "image.npy"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert [_index_and_label(text) for text in json.loads(done.stdout)] == wanted


def _index_and_label(text: str) -> tuple[int, str]:
    """Of an answer such as `0.93:2:red`."""
    _, index, label = text.split(":", 2)
    return int(index), label


def test_images_of_any_size_through_several_inputs_and_outputs(tmp_path: Path, triton: Any) -> None:
    feeds = [{"x": images(b, s), "gain": images(b, 1)} for b, s in ((1, 8), (2, 8), (3, 5))]
    config = served(triton, "two.heads", two_heads(tmp_path / "m.onnx"), feeds)
    assert [t["dims"] for t in config["input"]] == [[3, -1, -1], [3, 1, 1]]
    assert (config["max_batch_size"], config["output"][1]["data_type"]) == (8, "TYPE_INT32")


def test_half_precision_under_a_name_of_odd_characters(tmp_path: Path, triton: Any) -> None:
    half = conv(tmp_path / "m.onnx", TensorProto.FLOAT16, name=ODD)
    feeds = [{ODD: images(b).astype(np.float16)} for b in (1, 4)]
    config = served(triton, "a.b-c_9", half, feeds)
    assert (config["input"][0]["name"], config["input"][0]["data_type"]) == (ODD, "TYPE_FP16")


def test_a_fixed_batch(tmp_path: Path, triton: Any) -> None:
    config = served(triton, "fixed.batch", conv(tmp_path / "m.onnx", batch=4), [{"x": images(4)}])
    assert (config["max_batch_size"], config["input"][0]["dims"]) == (0, [4, 3, 8, 8])


def test_labels_with_spaces_and_other_alphabets_reach_the_client(tmp_path: Path, triton: Any) -> None:
    labels = ("grün ish", "赤", "a:b", "'quoted'", "")
    made = replace(PROVENANCE, labels=labels)
    deploy(built(tmp_path / "engine", made), DeployOptions(triton.repository, "labels"))
    triton.server.load("labels")
    zeros = [0.0] * 192
    asked = {
        "inputs": [{"name": "input", "shape": [1, 3, 8, 8], "datatype": "FP32", "data": zeros}],
        "outputs": [{"name": "logits", "parameters": {"classification": 5}}],
    }
    _, answer = triton.server.ask("POST", "/v2/models/labels/infer", asked)
    found = dict(_index_and_label(text if text.count(":") > 1 else f"{text}:") for text in answer["outputs"][0]["data"])
    assert tuple(found[i] for i in range(5)) == labels


def batches_run(triton: Any, name: str, of_images: int) -> dict[int, int]:
    """How many batches of each size ran, once `of_images` are counted: Triton answers first and counts after."""
    deadline = time.monotonic() + 60
    while True:
        _, stats = triton.server.ask("GET", f"/v2/models/{name}/stats")
        batches = stats["model_stats"][0].get("batch_stats", [])
        counts = {b["batch_size"]: b["compute_infer"]["count"] for b in batches}
        if sum(size * count for size, count in counts.items()) >= of_images or time.monotonic() > deadline:
            return counts
        time.sleep(0.05)


def test_requests_share_batches_of_the_preferred_size(tmp_path: Path, triton: Any) -> None:
    """Without preferred sizes all eight wait for each other; on a busy machine Triton at times divides them unevenly."""
    serving = Serving(queue_delay_us=30_000_000, preferred_batches=(4,), warmup=False)
    path, found = engine(conv(tmp_path / "m.onnx")), []
    for attempt in range(5):
        name = f"preferred4.{attempt}"
        deploy(path, DeployOptions(triton.repository, name, serving=serving))
        triton.server.load(name)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _, name=name: triton.infer(name, {"x": images(1)}), range(8)))
        found.append(batches_run(triton, name, 8))
        if found[-1] == {4: 2}:
            break
    assert found[-1] == {4: 2}, found


def test_warm_up_runs_every_tuned_batch_before_the_model_is_ready(tmp_path: Path, triton: Any) -> None:
    """Only one that succeeds: Triton 2.51 at times ends with a segmentation fault where a warm-up fails."""
    path = engine(conv(tmp_path / "m.onnx"))
    for warmup in (False, True):
        name = f"warm{warmup}"
        deploy(path, DeployOptions(triton.repository, name, serving=Serving(warmup=warmup)))
        triton.server.load(name)
        assert list(batches_run(triton, name, 13 if warmup else 0)) == ([1, 4, 8] if warmup else [])


def test_every_instance_is_started(tmp_path: Path, triton: Any) -> None:
    serving = Serving(instances=3)
    served(triton, "instances", conv(tmp_path / "m.onnx"), [{"x": images(1)}] * 4, serving=serving)
    assert all(f"instances_0_{i} " in triton.server.log() for i in range(3))


def test_two_versions_at_a_time(tmp_path: Path, triton: Any) -> None:
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = graph(
            folder / "m.onnx",
            [helper.make_node("Mul", ["x", "f"], ["y"])],
            [("x", ["N", 3])],
            [("y", ["N", 3])],
            f=np.float32(number),
        )
        deploy(engine(path), DeployOptions(triton.repository, "both", keep_versions=2))
    triton.server.load("both")
    ones = np.ones((1, 3), np.float32)
    found = {version: triton.infer("both", {"x": ones}, version)["y"].max() for version in (1, 2, None)}
    assert found == {1: 1.0, 2: 2.0, None: 2.0}


def plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capabilities: list[tuple[int, int]]) -> list[Path]:
    """Plans of one model, built by the stand-in for TensorRT on GPUs of these capabilities."""
    paths = []
    for capability in capabilities:
        with monkeypatch.context() as patch:
            world = fake_cuda.install(patch)
            world.capability = capability
            fake_tensorrt.install("10.3.0", world, patch)
            folder = tmp_path / "{}.{}".format(*capability)
            folder.mkdir()
            paths.append(build(source(folder / "model.onnx")).path)
    return paths


def deploy_without_gpu(paths: list[Path], repository: Path, name: str) -> None:
    """The server of the tests has no GPU, and refuses instances on one."""
    config = deploy(paths, DeployOptions(repository, name)).folder / "config.pbtxt"
    config.write_text(config.read_text().replace("KIND_GPU", "KIND_CPU"))


def test_a_plan_is_served_with_all_its_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, triton: Any) -> None:
    paths = plans(tmp_path, monkeypatch, [(8, 0), (9, 0)])
    deploy_without_gpu(paths[:1], triton.repository, "plan")
    triton.server.load("plan")
    for batch in (1, 8, 16):
        assert triton.infer("plan", {"input": images(batch)})["logits"].shape == (batch, 5)
    assert triton.server.ask("POST", "/v2/models/plan/infer", _request(images(17)))[0] == 400
    # For another GPU than the server's, as the backend pretends.
    deploy_without_gpu(paths[1:], triton.repository, "foreign")
    status, answer = triton.server.ask("POST", "/v2/repository/models/foreign/load")
    assert (status, "is for GPUs of 9.0, and this one has 8.0" in str(answer)) == (400, True)


def test_each_gpu_runs_its_own_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, triton: Any) -> None:
    """By `cc_model_filenames`; the second server loads what it finds when it starts, and nothing later."""
    paths = plans(tmp_path, monkeypatch, [(8, 0), (9, 0)])
    deploy_without_gpu(paths, triton.repository, "plans")
    triton.server.load("plans")
    wanted = triton.infer("plans", {"input": images(4)})["logits"]
    repository = tmp_path / "models"
    deploy_without_gpu(paths, repository, "plans")
    with triton_server(repository, control="none", capability="9.0") as other:
        _, answer = other.ask("POST", "/v2/models/plans/infer", _request(images(4)))
        np.testing.assert_allclose(answer["outputs"][0]["data"], wanted.ravel(), rtol=1e-5)
        deploy_without_gpu(paths, repository, "later")
        assert not other.is_ready("later")


def _request(array: Any) -> dict[str, Any]:
    tensor = {"name": "input", "shape": list(array.shape), "datatype": "FP32", "data": array.ravel().tolist()}
    return {"inputs": [tensor]}
