"""The implicit INT8 mode of TensorRT 10: TensorRT asks for batches or a cache, and 11 has no such mode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fake_cuda
import fake_tensorrt
import numpy as np
import numpy.typing as npt
import pytest
from fake_tensorrt import Control
from small_net import small_net

from maskplan.calibration.batches import choose_images
from maskplan.calibration.calibrate import CalibrateOptions
from maskplan.engines.build import BuildOptions, build_engine
from maskplan.engines.sidecar import read_engine
from maskplan.engines.trt.calibrator import ImplicitInt8
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.cli.app import main
from maskplan.pipeline.cli.calibrate import calibration_images
from maskplan.pipeline.core.artifacts import EngineFile
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.dataset import batches as pipeline_batches

IMAGES = np.random.default_rng(0).random((11, 3, 8, 8), np.float32)


def batches() -> Iterator[npt.NDArray[np.float32]]:
    """Four, four and three images."""
    yield from (IMAGES[i : i + 4] for i in range(0, len(IMAGES), 4))


@pytest.fixture
def older(monkeypatch: pytest.MonkeyPatch) -> Control:
    return fake_tensorrt.install("10.13.3.9", fake_cuda.install(monkeypatch), monkeypatch)


def build(folder: Path, source: ImplicitInt8) -> EngineFile:
    model = describe_onnx(small_net(folder / "net.onnx"))
    return build_engine(model, BuildOptions("tensorrt", implicit=source), folder / "engine.plan")


def test_whole_batches_are_fed_as_they_are(tmp_path: Path, older: Control) -> None:
    record = build(tmp_path, ImplicitInt8(batches, 4, tmp_path / "cache"))
    assert [b.shape for b in older.calibrated] == [(4, 3, 8, 8)] * 2
    assert np.array_equal(np.concatenate(older.calibrated), IMAGES[:8])
    assert {"INT8", "FP16", "SPARSE_WEIGHTS"} <= older.flags
    assert (record.precision, record.typing) == ("int8", "weak")
    # The FP32 graph runs in INT8: nothing to warn of.
    assert not any("FP32" in note for note in record.notes)
    assert (tmp_path / "cache").read_bytes().startswith(b"TRT-100000-EntropyCalibration2\n")


def test_a_cache_is_taken_in_place_of_images_and_left_as_it_is(tmp_path: Path, older: Control) -> None:
    cache = tmp_path / "cache"
    cache.write_bytes(b"TRT-101303-EntropyCalibration2\ninput: 3c010a14\n")
    before = cache.read_bytes()

    def none() -> Iterator[npt.NDArray[np.float32]]:
        raise AssertionError("no image is looked at")
        yield

    build(tmp_path, ImplicitInt8(none, 4, cache))
    assert older.calibrated == []
    assert cache.read_bytes() == before


def test_memory_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = fake_cuda.install(monkeypatch)
    fake_tensorrt.install("10.3.0", world, monkeypatch)
    build(tmp_path, ImplicitInt8(batches, 4))
    assert world.memory == {}


def test_what_fails_while_images_are_read_is_what_is_told(tmp_path: Path, older: Control) -> None:
    def broken() -> Iterator[npt.NDArray[np.float32]]:
        yield IMAGES[:4]
        raise InputError("image 5 cannot be decoded")

    with pytest.raises(InputError, match="image 5"):
        build(tmp_path, ImplicitInt8(broken, 4))
    assert not (tmp_path / "engine.plan").exists()


def test_too_few_images_are_told_by_tensorrt(tmp_path: Path, older: Control) -> None:
    with pytest.raises(InputError, match="cannot build the model") as caught:
        build(tmp_path, ImplicitInt8(batches, 16))
    assert "no scaling factors" in str(caught.value)
    assert not (tmp_path / "engine.plan").exists()


def test_shapes_that_cannot_be_calibrated_on(tmp_path: Path, older: Control) -> None:
    older.failures.add("calibration_profile")
    with pytest.raises(InputError, match="rejects the calibration shapes"):
        build(tmp_path, ImplicitInt8(batches, 4))


def test_tensorrt_11_names_the_explicit_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tensorrt.install("11.4.0.106", fake_cuda.install(monkeypatch), monkeypatch)
    with pytest.raises(InputError, match="no implicit INT8 mode") as caught:
        build(tmp_path, ImplicitInt8(batches, 4))
    assert "maskplan calibrate" in str(caught.value)
    assert not (tmp_path / "engine.plan").exists()


@pytest.fixture(scope="session")
def digits_onnx(finished_digits: Path) -> Path:
    return finished_digits / "sparse.onnx"


def test_the_command_feeds_the_images_that_calibrate_would_take(
    tmp_path: Path, older: Control, digits_onnx: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, out = tmp_path / "cache", tmp_path / "engine.plan"
    command = ["build", str(digits_onnx), "--backend", "tensorrt", "--int8-mode", "implicit", "-o", str(out)]
    assert main([*command, "--calibration-cache", str(cache)]) == 0
    assert "int8 on tensorrt" in capsys.readouterr().out
    source = calibration_images(digits_onnx, None, None, None, 0)
    chosen = choose_images(source.train, CalibrateOptions().images, 0)
    expected = np.concatenate([x for x, _ in pipeline_batches(chosen, source.preprocessing, CalibrateOptions().batch)])
    assert np.array_equal(np.concatenate(older.calibrated), expected)
    assert read_engine(out).typing == "weak"
    # The second time the cache serves, and no image is fed.
    older.calibrated.clear()
    assert main([*command, "--calibration-cache", str(cache)]) == 0
    assert older.calibrated == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--int8-mode", "banana"], "unknown --int8-mode"),
        (["--calibration-cache", "c"], "without --int8-mode implicit"),
        (["--int8-mode", "implicit", "--backend", "onnxruntime"], "only for TensorRT"),
        (["--int8-mode", "implicit", "--data", "missing", "--print-trtexec", "10"], "implicit with --print-trtexec"),
        (["--int8-mode", "implicit", "--three-way", "dense.onnx"], "implicit with --three-way"),
        (["--int8-mode", "implicit", "--import", "engine.plan"], "implicit with --import"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: list[str], told: str, digits_onnx: Path, older: Control, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(digits_onnx), "--backend", "tensorrt", *options]) == 3
    assert told in capsys.readouterr().err


def test_a_graph_in_half_precision_is_not_for_the_implicit_mode(
    finished_digits: Path, older: Control, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(finished_digits / "sparse.fp16.onnx")
    assert main(["build", model, "--backend", "tensorrt", "--int8-mode", "implicit"]) == 3
    assert "takes FP32 graphs" in capsys.readouterr().err
