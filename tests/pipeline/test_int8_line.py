"""The line in INT8: what it leaves, that it is 2:4 on its integers, what it is judged by, and what is done again."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import fake_cuda
import fake_tensorrt
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from digits_run import LEARN
from onnx import numpy_helper
from safetensors.numpy import load_file
from small_line import RECIPE, digests, read_json, stages_of

from maskplan.engines.sidecar import read_engine
from maskplan.pipeline.cli.app import main
from maskplan.pipeline.data.dataset import batches
from maskplan.pipeline.data.digits import load_digits

Array = npt.NDArray[Any]
PRECISIONS = ("", ", FP16", ", INT8")
FILES = [f"{name}.int8{rest}.onnx" for name in ("dense", "sparse") for rest in ("", ".fp16")]
# What follows from other options of calibration, in order.
CALIBRATED = (
    "calibrate-dense", "calibrate-sparse", "check-int8", "build-sparse", "build-dense", "compare", "time", "depth",
    "report",
)  # fmt: skip
# By entropy the dense digits network loses an image, so that it can be told from the untouched one.
QUICK = f"{LEARN}[compile]\nmode = 'off'\n[time]\nseconds = 0.1\nbatches = [1]\n[calibrate]\nmethod = 'entropy'\n"


@pytest.fixture(scope="module")
def finished(finished_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits in INT8, in a folder where they were made in FP32 before; do not write to it."""
    out = tmp_path_factory.mktemp("int8") / "digits"
    shutil.copytree(finished_digits, out)
    (out.parent / "quick.toml").write_text(QUICK)
    assert main(["engine", *options(out), "--out", str(out)]) == 0
    return out


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    """A copy, to go on with."""
    shutil.copy(finished.parent / "quick.toml", tmp_path)
    return Path(shutil.copytree(finished, tmp_path / "digits"))


def options(out: Path, recipe: str = "quick.toml") -> tuple[str, ...]:
    return ("digits_resnet", "--precision", "int8", "--recipe", str(out.parent / recipe))


def stored(path: Path) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def val_logits(path: Path) -> tuple[Array, Array]:
    """Of the held-out digits, by ONNX Runtime itself, and their labels."""
    how = read_json(path.parent / "report.json")["model"]["preprocessing"]
    val = load_digits().val
    pixels = np.concatenate([images for images, _ in batches(val, preprocessing(how), 64)])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: pixels})[0], val.labels


def preprocessing(how: dict[str, Any]) -> Any:
    from maskplan.pipeline.core.artifacts import Preprocessing
    from maskplan.pipeline.core.serialization import decode

    return decode(Preprocessing, how)


# --- what it leaves


def test_both_models_are_left_in_int8_beside_fp32_and_fp16_with_their_ranges(finished: Path) -> None:
    for name in FILES:
        found = stored(finished / name)
        wanted = np.float16 if ".fp16." in name else np.float32
        assert {v.dtype.type for n, v in found.items() if n.endswith("_scale")} == {wanted}, name
    for name in ("dense", "sparse"):
        assert set(read_json(finished / f"{name}.ranges.json")["amax"]) >= {"input"}
    # ONNX Runtime runs what stands beside FP32.
    assert digests(finished, ["sparse.int8.onnx"]).popitem()[1] == digests(finished, ["engine.onnx"]).popitem()[1]
    assert digests(finished, ["dense.int8.onnx"]).popitem()[1] == digests(finished, ["dense_engine.onnx"]).popitem()[1]
    assert read_engine(finished / "engine.onnx").precision == "int8"


@pytest.mark.parametrize("name", ["sparse.int8.onnx", "sparse.int8.fp16.onnx"])
def test_masked_weights_are_2_to_4_on_their_integers_and_pruned_positions_the_zero_point(
    finished: Path, name: str
) -> None:
    masks, found = load_file(finished / "masks.safetensors"), stored(finished / name)
    assert len(masks) == 8
    for weight, mask in masks.items():
        integers, zero = found[weight], found[f"{weight}_zero_point"]
        assert integers.dtype == zero.dtype == np.int8
        assert not zero.any()
        assert not integers[~mask.astype(bool)].any()
        groups = np.moveaxis(integers, 1, -1).reshape(-1, 4)
        assert np.count_nonzero(groups, axis=1).max() == 2


def test_the_dense_model_is_not_2_to_4(finished: Path) -> None:
    masks, found = load_file(finished / "masks.safetensors"), stored(finished / "dense.int8.onnx")
    for weight in masks:
        assert np.count_nonzero(np.moveaxis(found[weight], 1, -1).reshape(-1, 4), axis=1).max() > 2


@pytest.mark.parametrize("name", ["sparse.int8.onnx", "sparse.int8.fp16.onnx"])
def test_one_integer_that_is_flipped_is_caught(
    finished: Path, tmp_path: Path, cli: Callable[..., Any], name: str
) -> None:
    shutil.copy(finished / name, tmp_path)
    assert cli("check", tmp_path / name).code == 0
    model, weight = onnx.load(tmp_path / name), "blocks.1.conv1.weight"
    (tensor,) = [t for t in model.graph.initializer if t.name == weight]
    integers = numpy_helper.to_array(tensor).copy()
    full = np.argwhere(np.count_nonzero(integers.reshape(len(integers), -1, 4, 3, 3), axis=2) == 2)[7]
    k, group, r, s = full
    (c, _) = np.flatnonzero(integers[k, 4 * group : 4 * group + 4, r, s] == 0)
    integers[k, 4 * group + c, r, s] = -1
    tensor.CopyFrom(numpy_helper.from_array(integers, weight))
    onnx.save(model, tmp_path / name)

    ran = cli("check", tmp_path / name, "--report", tmp_path / "check.json")

    assert ran.code == 1
    found = read_json(tmp_path / "check.json")
    assert (found["violating"], found["conforming"]) == (1, 7)
    assert [w["name"] for w in found["weights"] if w["verdict"] == "violating"] == [weight]


# --- what it is judged by


def test_the_table_has_both_models_in_three_precisions(finished: Path) -> None:
    rows = {row["name"]: row for row in read_json(finished / "report.json")["parity"]["methods"]}
    wanted = [f"{name}{precision}" for name in ("dense", "learned, recalibrated") for precision in PRECISIONS]
    assert set(wanted) <= set(rows)
    page = (finished / "report.html").read_text()
    for name in wanted:
        assert name in page
    files = [f"{name}{part}.onnx" for name in ("dense", "sparse") for part in ("", ".fp16", ".int8")]
    for name, file in zip(wanted, files, strict=True):
        logits, labels = val_logits(finished / file)
        assert rows[name]["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).mean()), name


def test_the_gate_compares_with_the_untouched_dense_model(finished: Path) -> None:
    """And not with the dense INT8 engine, which is timed beside it and does worse on the digits."""
    parity = read_json(finished / "report.json")["parity"]
    (untouched, labels), (dense_int8, _) = (val_logits(finished / f"{n}.onnx") for n in ("dense", "dense.int8"))
    sparse_int8, _ = val_logits(finished / "engine.onnx")
    assert not np.array_equal(untouched.argmax(1), dense_int8.argmax(1)), "the two could not be told apart"
    agreement = 100 * (untouched.argmax(1) == sparse_int8.argmax(1)).mean()
    assert parity["agreement"] == pytest.approx(agreement)
    assert parity["top1_dense"] == pytest.approx(100 * (untouched.argmax(1) == labels).mean())
    assert parity["top1_sparse"] == pytest.approx(100 * (sparse_int8.argmax(1) == labels).mean())


def test_int8_flips_at_most_two_digits(finished: Path) -> None:
    parity = read_json(finished / "report.json")["parity"]
    top1 = {row["name"]: row["top1"] for row in parity["methods"]}
    flips = (top1["learned, recalibrated"] - top1["learned, recalibrated, INT8"]) * parity["images"] / 100
    assert parity["images"] == 359
    assert round(flips) <= 2


def test_the_report_says_how_it_was_calibrated(finished: Path) -> None:
    report = read_json(finished / "report.json")
    assert report["calibration"] == {
        "method": "entropy",
        "images": 512,
        "ranges_from": "images",
        "quantized_layers": 10,
        "in_float": [],
        "select_drop": None,
        "select_images": 0,
    }
    assert report["engine"]["precision"] == report["dense_engine"]["precision"] == "int8"
    assert (report["conformance"]["verdict"], report["conformance"]["conforming"]) == ("pass", 8)
    assert {w["dtype"] for w in report["conformance"]["weights"] if w["verdict"] == "conforming"} == {"int8"}


def test_calibration_images_are_in_the_files_own_record(finished: Path) -> None:
    made = read_engine(finished / "engine.onnx").provenance
    assert made is not None
    assert [(s.role, s.images) for s in made.image_sets] == [("train", 1295), ("select", 143), ("train", 512)]


def test_a_run_without_int8_has_no_calibration(finished_digits: Path) -> None:
    assert read_json(finished_digits / "report.json")["calibration"] is None
    assert not [p.name for p in finished_digits.iterdir() if "int8" in p.name or "ranges" in p.name]


# --- what is done again


def test_nothing_is_done_again_when_nothing_has_changed(again: Path, cli: Callable[..., Any]) -> None:
    ran = cli("engine", *options(again), "--out", again)
    assert ran.code == 0, ran.err
    assert stages_of(ran.err).made == ()
    assert {"calibrate-dense", "calibrate-sparse", "check-int8"} <= set(stages_of(ran.err).reused)
    for name in ("dense, INT8", "learned, recalibrated, FP16", "learned, recalibrated, INT8"):
        assert f" {name} " in ran.out
    assert "calibration  entropy on 512 images: 10 layers in INT8" in ran.out


def test_other_options_of_calibration_run_only_what_depends_on_them(again: Path, cli: Callable[..., Any]) -> None:
    before = digests(again, [*FILES, "sparse.onnx", "masks.safetensors"])
    (again.parent / "other.toml").write_text(QUICK.replace("entropy", "minmax") + "exclude = ['stem']\n")

    ran = cli("engine", *options(again, "other.toml"), "--out", again)

    assert ran.code == 0, ran.err
    assert stages_of(ran.err).made == CALIBRATED
    after = digests(again, list(before))
    assert {name for name in before if before[name] != after[name]} == set(FILES)
    told = read_json(again / "report.json")["calibration"]
    assert (told["method"], told["in_float"]) == ("minmax", [["stem", "excluded by 'stem'"]])
    assert read_json(again / "sparse.ranges.json")["options"]["method"] == "minmax"


@pytest.mark.slow
def test_a_budget_is_held_in_the_line(again: Path, cli: Callable[..., Any]) -> None:
    (again.parent / "other.toml").write_text(f"{QUICK}max_drop = 5.0\n")
    ran = cli("engine", *options(again, "other.toml"), "--out", again)
    assert ran.code == 0, ran.err
    told = read_json(again / "report.json")["calibration"]
    assert told["select_images"] == 143
    assert told["select_drop"] <= 5.0


@pytest.mark.parametrize("name", [*FILES, "engine.onnx"])
def test_a_file_that_is_gone_is_made_again_as_it_was(again: Path, cli: Callable[..., Any], name: str) -> None:
    before = digests(again, [*FILES, "engine.onnx"])
    (again / name).unlink()
    assert cli("engine", *options(again), "--out", again).code == 0
    assert digests(again, list(before)) == before


# --- what it refuses


def test_unknown_and_unusable_options_of_calibration_are_refused_together(
    tmp_path: Path, cli: Callable[..., Any]
) -> None:
    (tmp_path / "r.toml").write_text('[calibrate]\nmethods = "mse"\nmethod = "median"\nimages = 0\nmax_drop = "low"\n')
    ran = cli(
        "engine", "digits_resnet", "--precision", "int8", "--recipe", tmp_path / "r.toml", "--out", tmp_path / "o"
    )
    assert ran.code == 3
    assert "4 problems in the recipe" in ran.err
    for text in (
        "[calibrate] has no 'methods'; did you mean 'method'?",
        "expected one of minmax, percentile, entropy, mse, found 'median'",
        "images is 0",
    ):
        assert text in ran.err
    assert not (tmp_path / "o").exists()


def test_int8_without_images_is_refused(tiny_spec: str, tmp_path: Path, cli: Callable[..., Any]) -> None:
    out = tmp_path / "o"
    ran = cli("engine", tiny_spec, "--weights", "random", "--precision", "int8", "--out", out)
    assert ran.code == 3
    assert "INT8 needs images to calibrate on" in ran.err
    assert not list(out.glob("*.int8.*"))


def test_an_unknown_precision_is_refused(tmp_path: Path, cli: Callable[..., Any]) -> None:
    ran = cli("engine", "digits_resnet", "--precision", "int4", "--out", tmp_path / "o")
    assert ran.code == 3
    assert "choose one of fp32, fp16, int8" in ran.err


# --- with a second pass, on the stand-in for TensorRT

THREE = """
import torch
from torch import nn

PREPROCESSING = {"height": 16, "width": 16, "resize": 0, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.a, self.b, self.c = nn.Conv2d(8, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.a(torch.relu(self.stem(x))))))
        return self.head(self.c(x).mean((2, 3)))


def net():
    return Three()
"""


def shows_int8_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the stand-in's inspector look through DequantizeLinear, as TensorRT's does; it knows weights of floats only."""
    real = fake_tensorrt._layers

    def layers(model: onnx.ModelProto, *more: Any) -> Any:
        shown = onnx.ModelProto()
        shown.CopyFrom(model)
        source = {n.output[0]: n.input[0] for n in shown.graph.node if n.op_type == "DequantizeLinear"}
        for node in shown.graph.node:
            if node.op_type == "Conv":
                node.input[1] = source.get(node.input[1], node.input[1])
        for tensor in shown.graph.initializer:
            if tensor.data_type == onnx.TensorProto.INT8:
                integers = numpy_helper.to_array(tensor).astype(np.float16)
                tensor.CopyFrom(numpy_helper.from_array(integers, tensor.name))
        return real(shown, *more)

    monkeypatch.setattr(fake_tensorrt, "_layers", layers)


@pytest.mark.slow
def test_a_second_pass_is_calibrated_anew_and_kept_in_int8(
    toy_data: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    control = fake_tensorrt.install("10.13.3.9", fake_cuda.install(monkeypatch), monkeypatch)
    # PyTorch's exporter looks which packages are there.
    sys.modules["tensorrt"].__spec__ = ModuleSpec("tensorrt", None)
    control.dense.update(("a", "b"))
    shows_int8_layers(monkeypatch)
    (tmp_path / "three.py").write_text(THREE)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    namespace: dict[str, Any] = {}
    exec(THREE, namespace)
    torch.manual_seed(5)
    torch.save(namespace["net"]().state_dict(), tmp_path / "w.pth")
    what = (f"{tmp_path}/three.py:net", "--weights", tmp_path / "w.pth", "--data", toy_data, "--masks", "magnitude")
    how = ("--recipe", tmp_path / "recipe.toml", "--precision", "int8", "--backend", "tensorrt", "--refine")
    out = tmp_path / "out"

    ran = cli("engine", *what, *how, "--out", out)

    assert ran.code == 0, ran.err
    made = stages_of(ran.err).made
    assert {"calibrate-dense", "calibrate-sparse", "refined-calibrate-sparse", "refined-check-int8"} <= set(made)
    assert "refined-calibrate-dense" not in made
    report = read_json(out / "report.json")
    assert report["refine"]["restored"] == ["a.weight", "b.weight"]
    # TensorRT gets what stands beside FP16, in both passes.
    kept = read_engine(out / "engine.plan")
    prefix = {"first": "", "refined": "refined-"}[report["refine"]["kept"]]
    name = f"{prefix}sparse.int8.fp16.onnx"
    assert kept.onnx_sha256 == digests(out, [name])[name]
    integers = stored(out / "refined-sparse.int8.fp16.onnx")
    counts = {
        layer: np.count_nonzero(np.moveaxis(integers[f"{layer}.weight"], 1, -1).reshape(-1, 4), axis=1).max()
        for layer in "abc"
    }
    assert counts == {"a": 4, "b": 4, "c": 2}
    again = cli("engine", *what, *how, "--out", out)
    assert stages_of(again.err).made == ()
