"""Toy datasets in the format of the real ones, and the benchmarks' folders on the import path."""

from __future__ import annotations

import io
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

ACCURACY, PERFORMANCE = (Path(__file__).parents[2] / "benchmarks" / folder for folder in ("accuracy", "performance"))
# Tests import modules of the benchmarks by name; appended, so that these names hide no others.
sys.path += [str(ACCURACY), str(PERFORMANCE)]


def jpegs(labels: npt.NDArray[np.int64], size: int, seed: int) -> list[bytes]:
    """Noise with a bright band whose position gives the class."""
    rng = np.random.default_rng(seed)
    files = []
    for label in labels.tolist():
        pixels = rng.integers(0, 60, (size, size, 3)).astype(np.uint8)
        pixels[label * size // 10 : (label + 1) * size // 10] += 150
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    return files


@pytest.fixture(scope="session")
def toy_cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar")
    for seed, (name, count) in enumerate((("train", 150), ("test", 50))):
        labels = np.arange(count) % 10
        blobs = jpegs(labels, 32, seed)
        np.savez(
            folder / f"cifar10_{name}.npz",
            jpeg=np.frombuffer(b"".join(blobs), np.uint8),
            offset=np.cumsum([0, *map(len, blobs)]),
            label=labels,
            classes=np.array([f"class {i}" for i in range(10)]),
        )
    return folder


@pytest.fixture(scope="session")
def toy_imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagenet")
    for role, count in (("train", 60), ("val", 30)):
        labels = np.arange(count) % 6
        for i, blob in enumerate(jpegs(labels, 64, count)):
            path = folder / role / f"class{labels[i]}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(blob)
    return folder


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Run a script of `benchmarks/accuracy` with these arguments; its temporary files go to the test's folder."""
    monkeypatch.syspath_prepend(str(ACCURACY))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def run(script: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(ACCURACY / script), run_name="__main__")

    return run
