"""The calibrate stage on a small model: what it writes, where its ranges come from, and what it refuses."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper, parser
from PIL import Image

from maskplan.calibration.cache import read_tensorrt_cache, write_tensorrt_cache
from maskplan.calibration.calibrate import Calibrated, CalibrateOptions, CalibrationImages, calibrate
from maskplan.exporters.metadata import describe_onnx, write_provenance
from maskplan.pipeline.core.artifacts import Preprocessing, Provenance
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.dataset import Split
from maskplan.pipeline.data.image_sets import identify

HOW = Preprocessing(1, 4, 4, 0, "bilinear", (0.5,), (0.25,))
MADE = Provenance("net", True, "w.pth", "0" * 64, 2, ("dark", "bright"), HOW, ("wide_w",), "2:4", "channel", "made")
MINMAX = CalibrateOptions(method="minmax")

# Two classes by brightness. `{odd}` takes the place of an activation.
NET = """<ir_version: 10, opset_import: ["": {opset}]> g (float[n, 1, 4, 4] x) => (float[n, 2] y) {{
    [stem] a = Conv(x, stem_w)
    [odd] b = {odd}(a)
    [wide] c = Conv(b, wide_w)
    [relu] d = Relu(c)
    [pool] e = GlobalAveragePool(d)
    [flat] f = Flatten(e)
    [head] y = Gemm(f, head_w) }}"""


@dataclass(frozen=True)
class Gray:
    """Images of one gray value and a little noise each; counts how often each is read."""

    labels: npt.NDArray[np.int64]
    seed: int = 0
    reads: list[int] = field(default_factory=list)

    def name(self, index: int) -> str:
        return f"{index}.png"

    def read(self, index: int) -> bytes:
        self.reads.append(index)
        generator = np.random.default_rng([self.seed, index])
        pixels = generator.integers(0, 60, (4, 4), dtype=np.uint8) + np.uint8(180 * self.labels[index])
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        return file.getvalue()


def images_of(train: int = 20, select: int = 8, seed: int = 0) -> tuple[CalibrationImages, list[int]]:
    """Images of both classes in turn, and the list of those that were read since."""
    images = Gray(np.arange(train + select) % 2, seed)
    indices = np.arange(train + select)
    parts = Split("train", images, indices[:train]), Split("select", images, indices[train:])
    return CalibrationImages(*parts, HOW), images.reads


def net(opset: int = 20, odd: str = "Relu", scale: float = 1.0) -> onnx.ModelProto:
    model = parser.parse_model(NET.format(opset=opset, odd=odd))
    generator = np.random.default_rng(0)
    wide = generator.normal(size=(8, 8, 1, 1)).astype(np.float32)
    wide.reshape(8, 2, 4)[:, :, 1:3] = 0
    wide[3, 4, 0, 0] = 0  # of the two that may stay
    weights = {
        "stem_w": scale * np.array([1, -1] * 4, np.float32).reshape(8, 1, 1, 1),
        "wide_w": wide,
        "head_w": generator.normal(size=(8, 2)).astype(np.float32),
    }
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return model


@dataclass(frozen=True)
class Folder:
    """Where a model lies, and where what is made of it goes."""

    path: Path

    def save(self, model: onnx.ModelProto, name: str = "net.onnx", made: Provenance | None = MADE) -> Path:
        if made is not None:
            write_provenance(model, made)
        (self.path / name).write_bytes(model.SerializeToString())
        return self.path / name

    def run(
        self,
        source: CalibrationImages | Mapping[str, float],
        options: CalibrateOptions = MINMAX,
        *,
        model: str = "net.onnx",
        rest: tuple[str, ...] = ("fp32",),
        cache: str | None = None,
    ) -> Calibrated:
        paths = {r: self.path / f"int8.{r}.onnx" for r in rest}
        where = None if cache is None else self.path / cache
        return calibrate(describe_onnx(self.path / model), source, options, paths, where)

    @property
    def files(self) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in self.path.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    found = Folder(tmp_path)
    found.save(net())
    return found


def stored(path: Path) -> dict[str, npt.NDArray[Any]]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def prepared(split: Split) -> npt.NDArray[np.float32]:
    """What the model is fed, by Pillow and NumPy alone."""
    pixels = [np.asarray(Image.open(io.BytesIO(split.images.read(int(i))))) for i in split.indices]
    return ((np.stack(pixels)[:, None] / 255 - 0.5) / 0.25).astype(np.float32)


# --- what it writes


def test_ranges_are_of_the_training_images_and_of_no_others(folder: Folder, run: Callable[..., Any]) -> None:
    source, reads = images_of()
    folder.run(source, CalibrateOptions(method="minmax", images=12, batch=5))
    assert set(reads) <= set(range(20)), "those of select were looked at"
    assert len(set(reads)) == 12
    chosen = Split("train", source.train.images, np.array(sorted(set(reads))))
    x = prepared(chosen)
    seen = {"x": x, **run(net(), x, ["b", "f"])}
    found = stored(folder.path / "int8.fp32.onnx")
    for name in ("x", "b", "f"):
        assert found[f"{name}_scale"] == pytest.approx(np.abs(seen[name]).max() / 127, rel=1e-6)


def test_pruned_weights_are_exactly_the_zero_point_and_integers_do_not_depend_on_the_float_type(folder: Folder) -> None:
    done = folder.run(images_of()[0], rest=("fp16", "fp32"))
    assert [m.path.name for m in done.models] == ["int8.fp16.onnx", "int8.fp32.onnx"]
    assert [m.precision for m in done.models] == ["int8", "int8"]
    half, single = (stored(m.path) for m in done.models)
    floats = numpy_helper.to_array(net().graph.initializer[1])
    for found in (half, single):
        assert found["wide_w"].dtype == found["wide_w_zero_point"].dtype == np.int8
        assert not found["wide_w_zero_point"].any()
        assert not found["wide_w"][floats == 0].any()
        scales = found["wide_w_scale"].astype(np.float64).reshape(-1, 1, 1, 1)
        assert (np.abs(found["wide_w"] * scales - floats) <= 0.51 * scales).all()
    assert np.array_equal(half["wide_w"], single["wide_w"])
    assert (half["x_scale"].dtype, single["x_scale"].dtype) == (np.float16, np.float32)
    for model in done.models:
        onnx.checker.check_model(onnx.load(model.path), full_check=True)
        onnxruntime.InferenceSession(str(model.path), providers=["CPUExecutionProvider"])


def test_it_reports_what_it_did(folder: Folder) -> None:
    report = folder.run(images_of()[0], CalibrateOptions(method="mse", images=12, exclude=("head",))).report
    assert (report.method, report.images, report.ranges_from) == ("mse", 12, "images")
    assert report.quantized_layers == 2
    assert report.in_float == (("head", "excluded by 'head'"),)
    assert (report.select_drop, report.select_images) == (None, 0)


def test_the_same_arguments_give_the_same_bytes_and_another_seed_others(folder: Folder) -> None:
    written = []
    for seed in (0, 0, 1):
        folder.run(images_of()[0], CalibrateOptions(images=8, seed=seed))
        written.append((folder.path / "int8.fp32.onnx").read_bytes())
    assert written[0] == written[1] != written[2]


def test_provenance_gains_the_images_that_were_used(folder: Folder) -> None:
    source, _ = images_of()
    (plain,) = folder.run(source).models
    assert plain.provenance is not None
    assert plain.provenance.image_sets == (identify(source.train),)
    assert plain.provenance.masked == MADE.masked
    # `select` chose: whoever judges the model must know.
    (held,) = folder.run(source, CalibrateOptions(max_drop=100)).models
    assert held.provenance is not None
    assert source.select is not None
    assert held.provenance.image_sets == (identify(source.train), identify(source.select))


def test_a_foreign_file_gets_no_record(folder: Folder) -> None:
    folder.save(net(), "foreign.onnx", made=None)
    (done,) = folder.run(images_of()[0], model="foreign.onnx").models
    assert done.provenance is None


def test_tensors_that_overflow_fp16_are_named_and_the_model_still_gives_the_same(
    folder: Folder, caplog: pytest.LogCaptureFixture, run: Callable[..., Any]
) -> None:
    source, _ = images_of()
    folder.save(net(scale=3e4))
    with caplog.at_level(logging.WARNING):
        done = folder.run(source, rest=("fp32", "fp16"))
    assert "b up to 6e+04" in caplog.text
    single, half = (run(onnx.load(m.path), prepared(source.train))["y"] for m in done.models)
    assert np.isfinite(half).all()
    np.testing.assert_allclose(half, single, rtol=0.05, atol=0.02 * np.abs(single).max())


# --- the cache


def test_a_cache_is_written_then_taken_and_images_are_not_read_for_ranges_again(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    source, reads = images_of()
    first = folder.run(source, cache="ranges.json")
    written = folder.files
    once_for_digests_once_for_ranges = sorted(reads)
    assert once_for_digests_once_for_ranges == sorted([*range(20)] * 2)
    reads.clear()

    again = folder.run(source, cache="ranges.json")

    assert sorted(reads) == [*range(20)]
    assert (first.report.ranges_from, again.report.ranges_from) == ("images", "cache")
    assert again.report.images == 20
    assert again.amax == first.amax
    assert folder.files == written


def test_the_ranges_of_a_cache_are_those_that_are_used(folder: Folder) -> None:
    folder.run(images_of()[0], cache="ranges.json")
    content = json.loads((folder.path / "ranges.json").read_text())
    content["amax"]["x"] = 254.0
    (folder.path / "ranges.json").write_text(json.dumps(content))
    folder.run(images_of()[0], cache="ranges.json")
    assert stored(folder.path / "int8.fp32.onnx")["x_scale"] == 2.0


def test_a_cache_that_lacks_tensors_of_other_layers_is_measured_again(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder.run(images_of()[0], CalibrateOptions(method="minmax", exclude=("head",)), cache="ranges.json")
    found = folder.run(images_of()[0], cache="ranges.json")
    assert found.report.ranges_from == "images"
    assert "ranges.json lacks tensors that these options need" in caplog.text
    assert '"f"' in (folder.path / "ranges.json").read_text()


def test_a_cache_of_another_model_is_refused_with_both_digests(folder: Folder) -> None:
    folder.run(images_of()[0], cache="ranges.json")
    other = folder.save(net(scale=2.0), "other.onnx")
    before = folder.files
    with pytest.raises(InputError, match="range cache belongs to another model") as error:
        folder.run(images_of()[0], model="other.onnx", cache="ranges.json")
    for path in (folder.path / "net.onnx", other):
        assert describe_onnx(path).sha256 in str(error.value)
    assert folder.files == before


@pytest.mark.parametrize(
    ("seed", "options", "what"),
    [
        (1, MINMAX, "other images"),
        (0, CalibrateOptions(method="mse"), "other options"),
        (0, CalibrateOptions(method="minmax", images=4), "other images"),
    ],
)
def test_a_cache_of_other_images_or_options_is_refused(
    folder: Folder, seed: int, options: CalibrateOptions, what: str
) -> None:
    folder.run(images_of()[0], cache="ranges.json")
    with pytest.raises(InputError, match=f"range cache belongs to {what}$|range cache belongs to {what}\n"):
        folder.run(images_of(seed=seed)[0], options, cache="ranges.json")


@pytest.mark.parametrize("method", ["minmax", "entropy"])
def test_ranges_through_tensorrts_cache_give_the_same_file(folder: Folder, method: str) -> None:
    folder.save(net(), made=None)
    options = CalibrateOptions(method=method, quantize_outputs=True)
    done = folder.run(images_of()[0], options, rest=("fp32", "fp16"))
    before = [m.path.read_bytes() for m in done.models]
    write_tensorrt_cache(folder.path / "trt.txt", done.amax)
    for m in done.models:
        m.path.unlink()

    imported = folder.run(read_tensorrt_cache(folder.path / "trt.txt")[1], options, rest=("fp32", "fp16"))

    assert [m.path.read_bytes() for m in imported.models] == before
    assert (imported.report.ranges_from, imported.report.images) == ("imported", 0)


# --- a budget


def test_layers_excluded_by_the_budget_and_by_the_user_have_different_reasons(folder: Folder) -> None:
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["": 20]> g (float[n, 1, 4, 4] x) => (float[n, 2] y) {
        [stem] a = Conv(x, stem_w, stem_b)
        [wide] b = Conv(a, wide_w)
        [pool] c = GlobalAveragePool(b)
        [flat] d = Flatten(c)
        [head] y = Gemm(d, head_w) }"""
    )
    # A constant channel of 1000 beside the brightness ruins what reads it at a scale that reaches it.
    weights = {
        "stem_w": np.array([1, 0], np.float32).reshape(2, 1, 1, 1),
        "stem_b": np.array([0, 1000], np.float32),
        "wide_w": np.array([1, 0], np.float32).reshape(1, 2, 1, 1),
        "head_w": np.array([[-1, 1]], np.float32),
    }
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    folder.save(model)

    done = folder.run(images_of()[0], CalibrateOptions(method="minmax", max_drop=5, exclude=("stem",)))

    assert dict(done.report.in_float) == {
        "stem": "excluded by 'stem'",
        "wide": "among the most sensitive layers, excluded to keep the budget",
    }
    assert (done.report.quantized_layers, done.report.select_images) == (1, 8)
    assert done.report.select_drop == 0
    assert stored(done.models[0].path)["wide_w"].dtype == np.float32
    assert set(done.amax) == {"c", "d"}


# --- what it refuses, leaving nothing


def refused(folder: Folder, match: str, *args: Any, **more: Any) -> InputError:
    before = folder.files
    with pytest.raises(InputError, match=match) as error:
        folder.run(*args, **more)
    assert folder.files == before
    return error.value


def test_no_images_are_refused(folder: Folder) -> None:
    refused(folder, "no images to calibrate on", images_of(train=0)[0], cache="ranges.json")


@pytest.mark.parametrize("odd", ["Log", "Sqrt"])
def test_activations_that_are_nan_are_refused_with_the_layer_and_the_file(folder: Folder, odd: str) -> None:
    folder.save(net(odd=odd))
    error = refused(folder, "activation is NaN or infinite", images_of()[0], cache="ranges.json")
    assert f"tensor b, output of {odd} odd, of {folder.path / 'net.onnx'}" in str(error.where)
    assert "NaN" in str(error.found)


def test_a_model_that_is_quantized_already_is_refused(folder: Folder) -> None:
    folder.run(images_of()[0])
    refused(folder, "already quantized", images_of()[0], model="int8.fp32.onnx", cache="ranges.json")


@pytest.mark.parametrize(("opset", "rest", "needed"), [(12, "fp32", 13), (12, "fp16", 19), (18, "fp16", 19)])
def test_an_opset_that_is_too_old_is_raised(folder: Folder, opset: int, rest: str, needed: int) -> None:
    """The file is that of the same graph in the newer opset."""
    files = []
    for number in (opset, needed):
        folder.save(net(number))
        folder.run(images_of()[0], rest=(rest,))
        files.append(onnx.load(folder.path / f"int8.{rest}.onnx"))
    assert [f.opset_import[0].version for f in files] == [needed, needed]
    tensors = [{t.name: numpy_helper.to_array(t) for t in f.graph.initializer} for f in files]
    assert tensors[0].keys() == tensors[1].keys()
    for name, values in tensors[0].items():
        np.testing.assert_allclose(values, tensors[1][name], rtol=1e-5)
    assert [n.op_type for n in files[0].graph.node] == [n.op_type for n in files[1].graph.node]


def test_an_opset_that_cannot_be_raised_is_refused(folder: Folder) -> None:
    model = net(12)
    model.graph.node[1].op_type = "Wobble"
    folder.save(model)
    error = refused(folder, "opset is too old, and ONNX's converter cannot raise it", images_of()[0])
    assert str(error.found).startswith("opset 12: ")
    assert "opset 13" in str(error.fix)


def test_opset_13_will_do_for_fp32(folder: Folder) -> None:
    folder.save(net(13))
    assert folder.run(images_of()[0]).report.quantized_layers == 3


@pytest.mark.parametrize("source", ["nothing set aside", "no select", "ranges"])
def test_a_budget_without_labeled_images_is_refused_before_images_are_run(folder: Folder, source: str) -> None:
    images, reads = images_of(select=0)
    if source == "no select":
        images = CalibrationImages(images.train, None, HOW)
    given = dict.fromkeys("xbef", 1.0) if source == "ranges" else images
    refused(folder, "a budget needs labeled images", given, CalibrateOptions(max_drop=1), cache="ranges.json")
    assert reads == []


def test_ranges_that_lack_tensors_are_refused_with_all_of_them_named(folder: Folder) -> None:
    error = refused(folder, "tensors to quantize have no range", {"b": 1.0, "other": 1.0})
    assert error.found == "x, e, f"


def test_files_are_written_together_or_not_at_all(folder: Folder) -> None:
    """A pattern that matches nothing, which only the FP16 file uses: the FP32 file alone is not left behind."""
    options = CalibrateOptions(exclude=("head",), keep_fp32=("layer9",))
    refused(folder, "match no node and no tensor", images_of()[0], options, rest=("fp32", "fp16"))


def test_a_layer_that_fp16_cannot_hold_stays_fp32(folder: Folder) -> None:
    model = net()
    model.graph.initializer[2].CopyFrom(numpy_helper.from_array(np.full((8, 2), 1e5, np.float32), "head_w"))
    folder.save(model)
    (half,) = folder.run(images_of()[0], CalibrateOptions(exclude=("head",)), rest=("fp16",)).models
    stored = {t.name: t.data_type for t in onnx.load(half.path).graph.initializer}
    assert stored["head_w"] == onnx.TensorProto.FLOAT
    assert onnx.TensorProto.FLOAT16 in stored.values()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "median"}, "unknown calibration method"),
        ({"images": 0}, "images is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"percentile": 101.0}, "percentile is 101"),
        ({"percentile": 0.0}, "percentile is 0"),
        ({"max_drop": float("nan")}, "max_drop is nan"),
    ],
)
def test_options_out_of_range_are_refused_when_they_are_made(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        CalibrateOptions(**options)
