"""ONNX files of other tools through compare, check, build and deploy: PyTorch's TorchScript exporter, and hand-built graphs.

The networks are written down, not trained: the logits follow the mean color of the picture, which is what tells the toy
classes apart.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

Array = npt.NDArray[Any]
Cli = Callable[..., Any]

WIDTH = 8
# blue, green, red: the logits' order. The pictures' channels are red, green, blue.
CHANNEL_OF_CLASS = (2, 1, 0)
KINDS = ("torchscript", "matmul head", "transposed weights")
BATCHES = ("dynamic", 1)


def mixer(kept: str) -> npt.NDArray[np.float32]:
    """(8, 8): the identity on eight features; `dense` adds small numbers everywhere, `broken` swaps red and blue."""
    weight = np.eye(WIDTH, dtype=np.float32)
    if kept == "dense":
        weight += 0.002 * np.random.default_rng(0).normal(size=weight.shape).astype(np.float32)
    if kept == "broken":
        weight[[0, 2]] = weight[[2, 0]]
    return weight


STEM = np.zeros((WIDTH, 3), np.float32)
STEM[:3] = np.eye(3)
HEAD = np.zeros((3, WIDTH), np.float32)
for index, channel in enumerate(CHANNEL_OF_CLASS):
    HEAD[index, channel] = 10


class Scripted(nn.Module):
    """Stem with BatchNorm, a 3x3 convolution, mean, head."""

    def __init__(self, kept: str) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH)
        self.mix = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.head = nn.Linear(WIDTH, 3)
        with torch.no_grad():
            self.stem.weight.copy_(torch.from_numpy(STEM)[:, :, None, None])
            self.mix.weight.zero_()
            self.mix.weight[:, :, 1, 1] = torch.from_numpy(mixer(kept))
            self.mix.bias.zero_()
            self.head.weight.copy_(torch.from_numpy(HEAD))
            self.head.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.mix(torch.relu(self.norm(self.stem(x))))).mean((2, 3)))


def scripted(kept: str, batch: int | str, path: Path) -> None:
    dynamic = {"image": {0: "n"}, "scores": {0: "n"}} if batch == "dynamic" else None
    # The old exporter says at length that it is old.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Scripted(kept).eval(),
            (torch.zeros(1 if batch == "dynamic" else int(batch), 3, 20, 20),),
            path,
            dynamo=False,
            opset_version=17,
            input_names=["image"],
            output_names=["scores"],
            dynamic_axes=dynamic,
        )


def hand_built(
    nodes: list[onnx.NodeProto], tensors: dict[str, Array], batch: int | str, path: Path, classes: int = 3
) -> None:
    first = "n" if batch == "dynamic" else batch
    graph = helper.make_graph(
        nodes,
        "hand",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [first, 3, 20, 20])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [first, classes])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


def matmul_head(kept: str, batch: int | str, path: Path, head: Array = HEAD) -> None:
    """Channels last, products instead of convolutions, and a head of MatMul and Add."""
    nodes = [
        helper.make_node("Transpose", ["image"], ["last"], perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["last", "stem"], ["a"]),
        helper.make_node("MatMul", ["a", "mix"], ["b"], "mixer"),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("ReduceMean", ["c", "axes"], ["d"], keepdims=0),
        helper.make_node("MatMul", ["d", "head"], ["e"]),
        helper.make_node("Add", ["e", "bias"], ["scores"]),
    ]
    tensors = {
        "stem": np.ascontiguousarray(STEM.T),
        "mix": np.ascontiguousarray(mixer(kept).T),
        "axes": np.array([1, 2], np.int64),
        "head": np.ascontiguousarray(head.T),
        "bias": np.zeros(len(head), np.float32),
    }
    hand_built(nodes, tensors, batch, path, len(head))


def transposed(kept: str, batch: int | str, path: Path) -> None:
    """Weights stored as TensorFlow does, a Constant node, and a Gemm head behind a Transpose."""
    mix = mixer(kept)[:, :, None, None].transpose(2, 3, 1, 0)
    nodes = [
        helper.make_node("Constant", [], ["stem"], value=numpy_helper.from_array(STEM[:, :, None, None])),
        helper.make_node("Conv", ["image", "stem"], ["a"], "first"),
        helper.make_node("Transpose", ["mix"], ["mix_first"], perm=[3, 2, 0, 1]),
        helper.make_node("Conv", ["a", "mix_first"], ["b"], "mixer"),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["e"]),
        helper.make_node("Transpose", ["head"], ["head_first"]),
        helper.make_node("Gemm", ["e", "head_first"], ["scores"], "head", transB=1),
    ]
    hand_built(nodes, {"mix": np.ascontiguousarray(mix), "head": np.ascontiguousarray(HEAD.T)}, batch, path)


WRITERS = dict(zip(KINDS, (scripted, matmul_head, transposed), strict=True))


@pytest.fixture(params=[(kind, batch) for kind in KINDS for batch in BATCHES], ids=lambda p: f"{p[0]}, batch {p[1]}")
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Path]:
    """Writes the network as `dense`, `sparse` or `broken`."""
    kind, batch = request.param

    def write(kept: str) -> Path:
        path = tmp_path / f"{kept}.onnx"
        WRITERS[kind](kept, batch, path)
        return path

    return write


def logits(path: Path, x: Array) -> Array:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"image": image[None]})[0] for image in x])


def test_no_kind_is_left_out() -> None:
    assert set(WRITERS) == set(KINDS)
    assert len(KINDS) * len(BATCHES) == 6


def test_parity_passes_for_masks_that_keep_what_matters(
    written: Callable[[str], Path], cli: Cli, toy_data: Path
) -> None:
    dense, sparse = written("dense"), written("sparse")
    report = dense.with_name("parity.json")
    ran = cli("compare", dense, sparse, "--data", toy_data, "--report", report)
    assert ran.code == 0, ran.err
    found = json.loads(report.read_text())
    assert (found["verdict"], found["images"], found["top1_drop"], found["agreement"]) == ("pass", 24, 0, 100)
    assert found["top1_dense"] == found["top1_sparse"] == 100
    assert 0 < found["max_abs_diff"] < 1


def test_parity_fails_for_a_model_that_confuses_two_classes(
    written: Callable[[str], Path], cli: Cli, toy_data: Path
) -> None:
    dense, broken = written("dense"), written("broken")
    report = dense.with_name("parity.json")
    ran = cli("compare", dense, broken, "--data", toy_data, "--report", report)
    assert ran.code == 1
    assert ran.err.splitlines()[-1].startswith("failed: top-1 drops by 66.67 points")
    found = json.loads(report.read_text())
    assert found["verdict"] == "fail"
    assert found["top1_drop"] == pytest.approx(200 / 3)
    assert found["top1_sparse"] == found["agreement"] == pytest.approx(100 / 3)
    # Still, the wrong answers are often among the best five of three.
    assert found["top5_sparse"] == 100


def test_without_data_parity_is_not_applicable(written: Callable[[str], Path], cli: Cli) -> None:
    ran = cli("compare", written("dense"), written("sparse"))
    assert ran.code == 1
    assert "no labeled images" in ran.err


def test_check_finds_the_weights_whatever_they_are_called(written: Callable[[str], Path], cli: Cli) -> None:
    for kept, code in (("sparse", 0), ("dense", 1)):
        path = written(kept)
        report = path.with_suffix(".json")
        assert cli("check", path, "--report", report).code == code
        found = json.loads(report.read_text())
        # The mixer and the head; the stem takes three channels.
        assert (found["eligible"], found["ineligible"]) == (2, 1)
        assert found["violating"] == code
        assert [w["reason"] for w in found["weights"]] == ["channels_not_multiple_of_4", None, None]
        if code:
            (bad,) = [w for w in found["weights"] if w["verdict"] == "violating"]
            # Of a 3x3 convolution only the center is more than zeros.
            assert bad["violating_groups"] == 16
            assert cli("check", path, "--allow-dense", bad["name"]).code == 0


def test_build_and_deploy_take_the_file_as_it_is(written: Callable[[str], Path], cli: Cli, tmp_path: Path) -> None:
    source = written("sparse")
    engine, repository = tmp_path / "built" / "engine.onnx", tmp_path / "repository"
    ran = cli("build", source, "--backend", "onnxruntime", "-o", engine)
    assert ran.code == 0, ran.err
    sidecar = json.loads((tmp_path / "built" / "engine.onnx.json").read_text())
    assert sidecar["provenance"] is None
    (image,), (scores,) = sidecar["inputs"], sidecar["outputs"]
    assert (image["name"], image["shape"][1:], scores["name"], scores["shape"][1:]) == (
        "image",
        [3, 20, 20],
        "scores",
        [3],
    )
    ran = cli("deploy", engine, "--repository", repository, "--name", "colors")
    assert ran.code == 0, ran.err
    served = repository / "colors" / "1" / "model.onnx"
    x = np.random.default_rng(0).random((3, 3, 20, 20), dtype=np.float32)
    assert np.array_equal(logits(served, x), logits(source, x))
    config = (repository / "colors" / "config.pbtxt").read_text()
    fixed = image["shape"][0] == 1
    assert f"max_batch_size: {0 if fixed else 8}" in config
    assert ("dims: [ 1, 3, 20, 20 ]" if fixed else "dims: [ 3, 20, 20 ]") in config


def test_an_engine_of_a_foreign_file_can_be_compared_and_inspected(
    written: Callable[[str], Path], cli: Cli, toy_data: Path, tmp_path: Path
) -> None:
    engines = []
    for kept in ("dense", "sparse"):
        engines.append(tmp_path / f"{kept}_engine.onnx")
        assert cli("build", written(kept), "-o", engines[-1], "--backend", "onnxruntime").code == 0
    assert cli("compare", *engines, "--data", toy_data).code == 0
    ran = cli("inspect", engines[0])
    assert ran.code == 0
    assert "file of another tool" in ran.out


@pytest.mark.parametrize(
    ("first", "second"), [("dynamic", 1), (1, "dynamic"), (4, 4), (4, "dynamic"), ("dynamic", 4), (4, 1), (1, 4)]
)
def test_files_of_different_batches_are_compared(
    first: int | str, second: int | str, cli: Cli, toy_data: Path, tmp_path: Path
) -> None:
    matmul_head("dense", first, tmp_path / "a.onnx")
    matmul_head("sparse", second, tmp_path / "b.onnx")
    ran = cli("compare", tmp_path / "a.onnx", tmp_path / "b.onnx", "--data", toy_data, "--report", tmp_path / "r.json")
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["images"], found["top1_drop"], found["agreement"]) == (24, 0, 100)


def test_mean_and_std_shift_the_pictures_of_a_foreign_file(cli: Cli, toy_data: Path, tmp_path: Path) -> None:
    """With a red of mean 1 no picture is red any more: the Relu cuts it off, and green or blue win."""
    matmul_head("dense", "dynamic", tmp_path / "a.onnx")
    matmul_head("sparse", "dynamic", tmp_path / "b.onnx")
    accuracy = {}
    for mean, std in (("0,0,0", "1,1,1"), ("1,0,0", "1,1,1"), ("0,0,0", "1,1,0.01")):
        report = tmp_path / "r.json"
        options = ["--mean", mean, "--std", std, "--data", toy_data, "--report", report]
        assert cli("compare", tmp_path / "a.onnx", tmp_path / "b.onnx", *options).code == 0
        accuracy[mean, std] = json.loads(report.read_text())["top1_dense"]
    assert list(accuracy.values()) == [100, pytest.approx(200 / 3), pytest.approx(100 / 3)]


def test_numbers_that_do_not_fit_the_channels_are_refused(cli: Cli, toy_data: Path, tmp_path: Path) -> None:
    matmul_head("dense", "dynamic", tmp_path / "a.onnx")
    for option, text in (("--mean", "0,0"), ("--std", "1,1,1,1"), ("--mean", "a,b,c"), ("--std", "0,1,1")):
        ran = cli("compare", tmp_path / "a.onnx", tmp_path / "a.onnx", "--data", toy_data, option, text)
        assert (ran.code, ran.out) == (3, "")
        assert ran.err.startswith("error: ")


def test_another_number_of_classes_than_the_datas_is_refused(cli: Cli, toy_data: Path, tmp_path: Path) -> None:
    four = np.concatenate([HEAD, HEAD[:1]])
    for name in ("a", "b"):
        matmul_head("sparse", "dynamic", tmp_path / f"{name}.onnx", four)
    ran = cli("compare", tmp_path / "a.onnx", tmp_path / "b.onnx", "--data", toy_data)
    assert ran.code == 3
    assert "3 class folders, 4 model outputs" in ran.err


def test_models_of_different_classes_are_refused(cli: Cli, toy_data: Path, tmp_path: Path) -> None:
    matmul_head("sparse", "dynamic", tmp_path / "a.onnx")
    matmul_head("sparse", "dynamic", tmp_path / "b.onnx", np.concatenate([HEAD, HEAD[:1]]))
    for data in ([], ["--data", toy_data]):
        ran = cli("compare", tmp_path / "a.onnx", tmp_path / "b.onnx", *data)
        assert ran.code == 3
        assert "error: the models differ in their outputs" in ran.err


def with_two_outputs(path: Path) -> None:
    matmul_head("sparse", "dynamic", path)
    model = onnx.load(path)
    model.graph.output.append(helper.make_tensor_value_info("d", TensorProto.FLOAT, ["n", WIDTH]))
    path.write_bytes(model.SerializeToString())


def with_maps_of_scores(path: Path) -> None:
    """A head of 1x1 convolutions whose last axes were never flattened away: (N, classes, 1, 1)."""
    matmul_head("sparse", "dynamic", path)
    model = onnx.load(path)
    model.graph.node[-1].output[0] = "flat"
    model.graph.node.append(helper.make_node("Unsqueeze", ["flat", "ends"], ["scores"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 3], np.int64), "ends"))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 3, 1, 1]))
    path.write_bytes(model.SerializeToString())


def with_bytes_for_input(path: Path) -> None:
    """Pictures scaled to [0, 1] would all become 0."""
    matmul_head("sparse", "dynamic", path)
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    model.graph.node[0].input[0] = "floats"
    model.graph.node.insert(0, helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT))
    path.write_bytes(model.SerializeToString())


def with_two_inputs(path: Path) -> None:
    matmul_head("sparse", "dynamic", path)
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [3]))
    model.graph.node[-1].input[1] = "more"
    path.write_bytes(model.SerializeToString())


def with_flat_input(path: Path) -> None:
    nodes = [helper.make_node("Gemm", ["x", "w"], ["scores"])]
    graph = helper.make_graph(
        nodes,
        "flat",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(np.zeros((8, 3), np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (with_two_outputs, "different numbers of outputs"),
        (with_maps_of_scores, "scores float32 (dynamic, 3, 1, 1) of odd.onnx"),
        (with_bytes_for_input, "image uint8 (dynamic, 3, 20, 20) of odd.onnx"),
        (with_two_inputs, "different numbers of inputs"),
        (with_flat_input, "x float32 (dynamic, 8) of odd.onnx"),
    ],
)
def test_networks_with_different_inputs_or_outputs_are_not_compared(
    write: Callable[[Path], None], message: str, cli: Cli, toy_data: Path, tmp_path: Path
) -> None:
    matmul_head("sparse", "dynamic", tmp_path / "good.onnx")
    write(tmp_path / "odd.onnx")
    for pair in (("odd", "good"), ("good", "odd")):
        ran = cli("compare", *(tmp_path / f"{name}.onnx" for name in pair), "--data", toy_data)
        assert ran.code == 3
        assert message in ran.err
        assert "odd.onnx" in ran.err


def test_sizes_that_only_the_run_would_tell_are_refused(cli: Cli, toy_data: Path, tmp_path: Path) -> None:
    matmul_head("sparse", "dynamic", tmp_path / "a.onnx")
    model = onnx.load(tmp_path / "a.onnx")
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"side{axis}"
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    ran = cli("compare", tmp_path / "a.onnx", tmp_path / "a.onnx", "--data", toy_data)
    assert ran.code == 3
    assert "error: the model has no fixed input size" in ran.err


def test_a_file_with_external_weights_builds_an_engine_that_can_be_moved(cli: Cli, tmp_path: Path) -> None:
    """The engine and what is deployed hold their weights, or the command refuses; neither points at files left behind."""
    source = tmp_path / "source"
    source.mkdir()
    matmul_head("sparse", "dynamic", source / "model.onnx")
    x = np.random.default_rng(0).random((2, 3, 20, 20), dtype=np.float32)
    expected = logits(source / "model.onnx", x)
    model = onnx.load(source / "model.onnx")
    onnx.save(model, source / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=64)
    assert (source / "weights.bin").is_file()
    assert cli("check", source / "model.onnx").code == 0
    ran = cli("build", source / "model.onnx", "--backend", "onnxruntime", "-o", tmp_path / "out" / "engine.onnx")
    if ran.code == 3:
        assert "weights.bin" in ran.err
        assert not (tmp_path / "out" / "engine.onnx").exists()
        return
    assert ran.code == 0
    assert np.array_equal(logits(tmp_path / "out" / "engine.onnx", x), expected)
    ran = cli("deploy", tmp_path / "out" / "engine.onnx", "--repository", tmp_path / "repository", "--name", "m")
    assert ran.code == 0
    assert np.array_equal(logits(tmp_path / "repository" / "m" / "1" / "model.onnx", x), expected)


@pytest.mark.parametrize("command", ["check", "build", "compare"])
def test_what_is_not_onnx_is_refused_by_every_command(command: str, cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"MZ this is something else")
    ran = cli(command, path, *([path] if command == "compare" else []))
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.startswith("error: not an ONNX file")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_graph_that_onnx_runtime_does_not_know_is_refused_by_build(cli: Cli, tmp_path: Path) -> None:
    matmul_head("sparse", "dynamic", tmp_path / "a.onnx")
    model = onnx.load(tmp_path / "a.onnx")
    model.graph.node[3].op_type = "Rehlu"
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    ran = cli("build", tmp_path / "a.onnx", "--backend", "onnxruntime", "-o", tmp_path / "engine.onnx")
    assert ran.code == 3
    assert ran.err.startswith("error: ONNX Runtime does not accept the file")
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]
