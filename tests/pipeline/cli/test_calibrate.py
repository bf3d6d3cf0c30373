"""`maskplan calibrate`: INT8 from an ONNX file, its caches, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from PIL import Image

from maskplan.exporters.metadata import describe_onnx

CLASSES = ("a", "b")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sparse(finished_digits: Path, here: Path) -> Path:
    """The pruned digits model, to quantize."""
    return Path(shutil.copy(finished_digits / "sparse.onnx", here))


@pytest.fixture
def foreign(here: Path) -> Path:
    """A model of another tool, of two classes, and images for it in `data/`."""
    images(here / "data", train=6)
    return save(here / "foreign.onnx", net())


def images(folder: Path, train: int, classes: tuple[str, ...] = CLASSES) -> Path:
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("val", 2)):
        for name in classes:
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 255, (4, 4), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")
    return folder


def net(opset: int = 20, odd: str = "Relu", outputs: int = 2) -> onnx.ModelProto:
    model = parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": {opset}]> g (float[n, 1, 4, 4] x) => (float[n, {outputs}] y) {{
        [stem] a = Conv(x, stem_w)
        [odd] b = {odd}(a)
        [pool] c = GlobalAveragePool(b)
        [flat] d = Flatten(c)
        [head] y = Gemm(d, head_w) }}"""
    )
    generator = np.random.default_rng(0)
    for name, shape in (("stem_w", (8, 1, 3, 3)), ("head_w", (8, outputs))):
        values = generator.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def save(path: Path, model: onnx.ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def graph(path: Path) -> bytes:
    return onnx.load(path).graph.SerializeToString()


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- what it writes


def test_a_pruned_model_is_quantized_and_checked(sparse: Path, cli: Callable[..., Any], here: Path) -> None:
    ran = cli("calibrate", sparse, "--report", "r.json")

    assert ran.code == 0, ran.err
    assert re.match(r".*sparse\.int8\.onnx: 10 layers in INT8; ranges by mse on 512 images\n", ran.out)
    assert "conformance pass: 8 of 9 eligible weights" in ran.out
    assert cli("check", here / "sparse.int8.onnx").code == 0
    report = json.loads((here / "r.json").read_text())
    assert (report["method"], report["images"], report["quantized_layers"]) == ("mse", 512, 10)
    assert report["in_float"] == []


def test_options_reach_the_stage(sparse: Path, cli: Callable[..., Any], here: Path) -> None:
    options = (
        "--method",
        "percentile",
        "--percentile",
        "99.9",
        "--images",
        "100",
        "--batch",
        "30",
        "--float-dtype",
        "fp16",
    )
    more = ("--exclude", "head", "--exclude", "stem", "--quantize-outputs", "-o", "x.onnx", "--cache", "c.json")

    ran = cli("calibrate", sparse, *options, *more)

    assert ran.code == 0, ran.err
    assert "x.onnx: 8 layers in INT8, 2 in fp16; ranges by percentile on 100 images" in ran.out
    assert "  stem: excluded by 'stem'\n  head: excluded by 'head'\n" in ran.out
    key = json.loads((here / "c.json").read_text())["options"]
    assert (key["method"], key["percentile"]) == ("percentile", 99.9)
    stored = {t.name: t.data_type for t in onnx.load("x.onnx").graph.initializer}
    assert {t for name, t in stored.items() if name.endswith("_scale")} == {onnx.TensorProto.FLOAT16}
    plain = cli("calibrate", sparse, *options, "--exclude", "head", "--exclude", "stem", "-o", "plain.onnx")
    assert plain.code == 0
    pairs = [sum(n.op_type == "QuantizeLinear" for n in onnx.load(p).graph.node) for p in ("x.onnx", "plain.onnx")]
    assert pairs[0] > pairs[1]


def test_a_foreign_model_takes_a_folder_of_images_and_is_not_judged(
    foreign: Path, cli: Callable[..., Any], here: Path
) -> None:
    ran = cli("calibrate", foreign, "--data", "data", "--mean", "0.5", "--std", "0.25", "--method", "minmax")

    assert ran.code == 0, ran.err
    assert "2 layers in INT8" in ran.out
    assert "conformance" not in ran.out
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load("foreign.int8.onnx").graph.initializer}
    # Pixels reach almost 255: (1 - 0.5) / 0.25.
    assert stored["x_scale"] * 127 == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("place", ["weight", "zero point"])
def test_weights_that_are_not_2_to_4_end_with_exit_code_1(
    sparse: Path, cli: Callable[..., Any], here: Path, place: str
) -> None:
    """Either is a failed gate: the command judges what it wrote, and so does `check` on a copy that was spoiled."""
    name = "blocks.2.conv2.weight"
    if place == "weight":
        model = onnx.load(sparse)
        spoil(model, name, 0.5)
        save(sparse, model)
        ran = cli("calibrate", sparse, "--images", 32, "-o", "int8.onnx")
        assert ran.code == 1
        assert "conformance fail" in ran.out
        assert ran.err.startswith("failed: ") or "\nfailed: " in ran.err
    else:
        assert cli("calibrate", sparse, "--images", 32, "-o", "int8.onnx").code == 0
        assert cli("check", "int8.onnx").code == 0
        model = onnx.load("int8.onnx")
        spoil(model, f"{name}_zero_point", 1)
        save(here / "int8.onnx", model)
    assert cli("check", "int8.onnx").code == 1


def spoil(model: onnx.ModelProto, name: str, value: float) -> None:
    """Set the last zero to a value."""
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    values = numpy_helper.to_array(tensor).copy()
    values.reshape(-1)[np.flatnonzero(values == 0)[-1]] = value
    tensor.CopyFrom(numpy_helper.from_array(values, name))


def test_the_drop_under_a_budget_is_printed(sparse: Path, cli: Callable[..., Any]) -> None:
    ran = cli("calibrate", sparse, "--max-drop", "50")
    assert ran.code == 0, ran.err
    assert re.search(r"^drop of top-1: [+-]\d+\.\d\d points on 143 held-out training images$", ran.out, re.MULTILINE)


def test_images_of_one_class_cause_a_warning(cli: Callable[..., Any], here: Path) -> None:
    images(here / "one", train=4, classes=("a",))
    save(here / "m.onnx", net(outputs=1))
    ran = cli("calibrate", "m.onnx", "--data", "one")
    assert ran.code == 0, ran.err
    assert "warning: all calibration images are of one class" in ran.err


# --- caches


def test_a_cache_is_written_then_read(sparse: Path, cli: Callable[..., Any], here: Path) -> None:
    first = cli("calibrate", sparse, "--images", 32, "--cache", "c.json", "-o", "1.onnx")
    before = (here / "c.json").read_bytes()
    again = cli("calibrate", sparse, "--images", 32, "--cache", "c.json", "-o", "2.onnx")
    assert (first.code, again.code) == (0, 0)
    assert "ranges by mse on 32 images" in first.out
    assert "ranges by the cache" in again.out
    assert (here / "1.onnx").read_bytes() == (here / "2.onnx").read_bytes()
    assert (here / "c.json").read_bytes() == before


def test_tensorrts_cache_is_exported_and_imported(
    sparse: Path, foreign: Path, cli: Callable[..., Any], here: Path
) -> None:
    assert cli("calibrate", foreign, "--data", "data", "--export-trt-cache", "t.txt", "-o", "1.onnx").code == 0
    ran = cli("calibrate", foreign, "--import-trt-cache", "t.txt", "-o", "2.onnx")
    assert ran.code == 0, ran.err
    assert "ranges by TensorRT's cache" in ran.out
    assert (here / "t.txt").read_text().startswith("TRT-")
    assert (here / "1.onnx").read_bytes() == (here / "2.onnx").read_bytes()
    # In a maskplan model the record differs: it names the images that were used.
    assert cli("calibrate", sparse, "--images", 32, "--export-trt-cache", "s.txt", "-o", "3.onnx").code == 0
    assert cli("calibrate", sparse, "--import-trt-cache", "s.txt", "-o", "4.onnx").code == 0
    assert graph(here / "3.onnx") == graph(here / "4.onnx")


# --- what it refuses


@pytest.fixture
def refused(cli: Callable[..., Any], here: Path) -> Callable[..., str]:
    """Run a command that must be refused; its one message."""

    def run(*args: object) -> str:
        before = files(here)
        ran = cli("calibrate", *args)
        assert ran.code == 3, ran
        assert ran.out == ""
        assert "Traceback" not in ran.err
        assert sum(line.startswith("error:") for line in ran.err.splitlines()) == 1, ran.err
        assert files(here) == before
        return str(ran.err)

    return run


def test_a_model_without_images_is_refused(foreign: Path, refused: Callable[..., str]) -> None:
    message = refused(foreign)
    assert "no images to calibrate on" in message
    assert "--data DIR" in message


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--float-dtype", "banana"), "unknown --float-dtype 'banana'"),
        (("--method", "median"), "unknown calibration method"),
        (("--method", "percentile", "--percentile", "0"), "percentile is 0"),
        (("--max-drop", "nan"), "max_drop is nan"),
        (("--exclude", "nothing*"), "patterns of layers to exclude match no layer"),
        (("--exclude", "*"), "no layer can be quantized"),
        (("-o", "foreign.onnx"), "would overwrite the model"),
        (("-o", "data/../foreign.onnx"), "would overwrite the model"),
        (("--data", "nowhere"), "data folder not found"),
        (("--import-trt-cache", "gone.txt"), "file not found"),
        (("--import-trt-cache", "foreign.onnx"), "not a calibration cache of TensorRT"),
        (("--import-trt-cache", "some.txt"), "tensors to quantize have no range"),
        (("--import-trt-cache", "whole.txt", "--max-drop", "1"), "a budget needs labeled images"),
        (("--import-trt-cache", "whole.txt", "--cache", "c.json"), "both give ranges"),
        (("--cache", "some.txt"), "not a range cache"),
        (("--std", "0"), "invalid standard deviation"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_options_that_cannot_be_used_are_refused(
    foreign: Path, refused: Callable[..., str], here: Path, options: tuple[str, ...], says: str
) -> None:
    (here / "some.txt").write_text("TRT-101600-EntropyCalibration2\nx: 3c000000\n")
    (here / "whole.txt").write_text(
        "TRT-101600-EntropyCalibration2\n" + "".join(f"{name}: 3c000000\n" for name in "xbcd")
    )
    assert says in refused(foreign, *(() if "--data" in options else ("--data", "data")), *options)


def test_a_budget_without_held_out_images_is_refused(foreign: Path, refused: Callable[..., str], here: Path) -> None:
    images(here / "single", train=1)
    assert "no images in `select`" in refused(foreign, "--data", "single", "--max-drop", "5", "--cache", "c.json")


def test_activations_that_are_not_finite_are_refused(foreign: Path, refused: Callable[..., str], here: Path) -> None:
    save(here / "m.onnx", net(odd="Log"))
    assert "tensor b, output of Log odd, of m.onnx" in refused("m.onnx", "--data", "data", "--cache", "c.json")


@pytest.mark.parametrize(("opset", "more", "needed"), [(12, (), 13), (18, ("--float-dtype", "fp16"), 19)])
def test_an_opset_that_is_too_old_is_raised_with_a_note(
    foreign: Path, cli: Callable[..., Any], here: Path, opset: int, more: tuple[str, ...], needed: int
) -> None:
    save(here / "m.onnx", net(opset))
    ran = cli("calibrate", "m.onnx", "--data", "data", *more, "-o", "raised.onnx")
    assert ran.code == 0, ran.err
    assert f"m.onnx: opset {opset}, which is too old, is raised to {needed}" in ran.err
    assert onnx.load(here / "raised.onnx").opset_import[0].version == needed


def test_what_is_int8_or_fp16_already_is_refused(
    sparse: Path, finished_digits: Path, refused: Callable[..., str], cli: Callable[..., Any]
) -> None:
    assert cli("calibrate", sparse, "--images", 32).code == 0
    assert "already quantized" in refused("sparse.int8.onnx")
    assert "its weight is float16" in refused(finished_digits / "sparse.fp16.onnx", "-o", "x.onnx")


def test_a_cache_of_another_model_is_refused_with_both_digests(
    sparse: Path, finished_digits: Path, refused: Callable[..., str], cli: Callable[..., Any]
) -> None:
    assert cli("calibrate", sparse, "--images", 32, "--cache", "c.json").code == 0
    dense = finished_digits / "dense.onnx"
    message = refused(dense, "--cache", "c.json", "-o", "x.onnx")
    assert "the range cache belongs to another model" in message
    assert describe_onnx(sparse).sha256 in message
    assert describe_onnx(dense).sha256 in message


def test_the_help_names_the_methods_and_the_budget(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = re.sub(r"\s+", " ", cli("calibrate", "--help").out)
    for text in ("minmax, percentile, entropy or mse", "--max-drop", "--quantize-outputs", "--import-trt-cache"):
        assert text in shown
