"""Samples of any network: arrays and images against the inputs of a graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskplan.pipeline.core.artifacts import TensorSpec
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.samples import ImageOptions, TensorSamples, noise_samples, open_samples

X = TensorSpec("x", "float32", (None, 3, 4, 5))
GAIN = TensorSpec("gain", "float32", ())


def opened(folder: Path, *inputs: TensorSpec, role: str = "val", options: ImageOptions | None = None):
    return open_samples(folder, role, inputs, options or ImageOptions(), "net")


def saved(folder: Path, name: str = "data.npz", **arrays: np.ndarray) -> Path:
    np.savez(folder / name, **arrays)
    return folder / name


def rows(count: int = 5) -> np.ndarray:
    return np.arange(count * 60, dtype=np.float32).reshape(count, 3, 4, 5)


def write_images(folder: Path, count: int = 3, size: tuple[int, int] = (5, 4)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", size, (10 * number, 100, 255)).save(folder / f"{number}.png")


def test_batches_hold_the_rows_in_order_and_targets_follow_a_draw(tmp_path: Path) -> None:
    samples = opened(saved(tmp_path, x=rows(), labels=np.arange(5), note=np.array(3)), X)
    assert [feeds["x"].shape[0] for feeds in samples.batches(2)] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate([feeds["x"] for feeds in samples.batches(2)]), rows())
    assert samples.targets.keys() == {"labels"}
    drawn = samples.sample(3, seed=1)
    np.testing.assert_array_equal(drawn.arrays["x"], rows()[drawn.targets["labels"]])


def test_roles_take_their_own_part(tmp_path: Path) -> None:
    saved(tmp_path, "train.npz", x=rows(4))
    saved(tmp_path, "val.npz", x=rows(2))
    assert [len(opened(tmp_path, X, role=role)) for role in ("train", "val")] == [4, 2]


def test_npy_files_are_inputs_by_their_names(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows(3))
    np.save(tmp_path / "gain.npy", np.ones(3, np.float32))
    spec = TensorSpec("gain", "float32", (None,))
    assert len(opened(tmp_path, X, spec)) == 3
    assert len(opened(tmp_path / "x.npy", TensorSpec("other", "float32", (None, 3, 4, 5)))) == 3


def test_scalars_stay_scalars_in_whole_runs(tmp_path: Path) -> None:
    path = saved(tmp_path, x=rows(4).reshape(2, 2, 3, 4, 5), gain=np.array([1.0, 2.0], np.float32))
    samples = opened(path, X, GAIN)
    feeds = list(samples.batches(8))
    assert [f["gain"].shape for f in feeds] == [(), ()]
    assert [float(f["gain"]) for f in feeds] == [1.0, 2.0]
    assert feeds[0]["x"].shape == (2, 3, 4, 5)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": rows()}, "no array for the input 'x'"),
        ({"x": rows()[:, :2]}, "x is (5, 2, 4, 5)"),
        ({"x": rows()[0, 0]}, "x is (4, 5)"),
        ({"x": np.full((5, 3, 4, 5), "a")}, "x holds <U1"),
        ({"x": np.zeros((5, 3, 4, 5), np.uint8)}, "x holds uint8"),
        ({"x": rows(), "labels": np.arange(4)}, "different numbers of samples"),
        ({"x": rows()[:0]}, "no samples"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError) as error:
        opened(saved(tmp_path, **arrays), X)
    assert message in str(error.value)


def test_integers_out_of_range_do_not_wrap(tmp_path: Path) -> None:
    spec = TensorSpec("x", "uint8", (None, 2))
    assert next(iter(opened(saved(tmp_path, x=np.array([[0, 255]])), spec).batches(1)))["x"].dtype == np.uint8
    with pytest.raises(InputError, match="exceeds the range of uint8"):
        opened(saved(tmp_path, x=np.array([[0, 256]])), spec)


@pytest.mark.parametrize("damage", ["text", "truncated", "flipped", "empty", "pickled"])
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "data.npz"
    if damage == "pickled":
        np.savez(path, x=np.array([{}, None], object))
    else:
        np.savez_compressed(path, x=rows(50))
        whole = path.read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes(255 - b for b in whole[middle : middle + 40]) + whole[middle + 40 :]
        path.write_bytes({"text": b"not arrays", "truncated": whole[:middle], "flipped": flipped, "empty": b""}[damage])
    with pytest.raises(InputError, match=r"not a \.npz file"):
        opened(path, X)


def test_targets_and_shapes_are_part_of_the_digest(tmp_path: Path) -> None:
    def key(**arrays: np.ndarray) -> tuple[str, str]:
        found = opened(saved(tmp_path, **arrays), TensorSpec("x", "float32", (None, None, None))).identify()
        return found.sha256, found.key

    values = np.arange(24, dtype=np.float32)
    first = key(x=values.reshape(2, 3, 4), labels=np.array([0, 1]))
    assert first == key(x=values.reshape(2, 3, 4), labels=np.array([0, 1]))
    other_targets = key(x=values.reshape(2, 3, 4), labels=np.array([1, 1]))
    assert other_targets[0] == first[0]
    assert other_targets[1] != first[1]
    assert key(x=values.reshape(2, 4, 3), labels=np.array([0, 1]))[0] != first[0]


def test_images_of_every_layout_hold_the_same_pixels(tmp_path: Path) -> None:
    write_images(tmp_path, size=(9, 8))
    pixels = np.array([[10 * n, 100, 255] for n in range(3)])
    specs = {
        "NCHW": (TensorSpec("x", "float32", (None, 3, 8, 9)), pixels[:, :, None, None] / 255),
        "NHWC": (TensorSpec("x", "float32", (None, 8, 9, 3)), pixels[:, None, None, :] / 255),
        "uint8": (TensorSpec("x", "uint8", (None, 8, 9, 3)), pixels[:, None, None, :]),
    }
    for spec, expected in specs.values():
        (feeds,) = opened(tmp_path, spec).batches(4)
        assert feeds["x"].dtype == spec.dtype
        assert feeds["x"].shape[1:] == spec.shape[1:]
        np.testing.assert_allclose(feeds["x"], np.broadcast_to(expected, feeds["x"].shape), atol=1e-6)


def test_mean_and_std_are_applied_and_checked(tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    options = ImageOptions(mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 2.0))
    (feeds,) = opened(tmp_path, X, options=options).batches(1)
    np.testing.assert_allclose(feeds["x"][0, :, 0, 0], [0, (100 / 255 - 0.5) / 0.5, 0], atol=1e-6)
    for wrong in (ImageOptions(mean=(0.5,)), ImageOptions(std=(1.0, 0.0, 1.0))):
        with pytest.raises(InputError, match="do not fit the channels"):
            opened(tmp_path, X, options=wrong)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data folder not found"):
        opened(tmp_path / "none", X)
    with pytest.raises(InputError, match="no images"):
        opened(tmp_path, X)
    write_images(tmp_path)
    with pytest.raises(InputError, match="one image input only"):
        opened(tmp_path, X, GAIN)
    with pytest.raises(InputError, match="4 channels"):
        opened(tmp_path, TensorSpec("x", "float32", (None, 4, 8, 8)))


def test_a_network_without_inputs_cannot_be_run_on_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the network has no inputs"):
        noise_samples([], 1, None, "net")
    np.savez(tmp_path / "val.npz", x=np.zeros((2, 3)))
    with pytest.raises(InputError, match="the network has no inputs"):
        open_samples(tmp_path, "val", [], ImageOptions(), "net")


def test_noise_fits_the_inputs() -> None:
    samples = noise_samples([X, TensorSpec("i", "int64", (None, 7))], 6, None, "net")
    (feeds,) = samples.batches(6)
    assert feeds["x"].shape == (6, 3, 4, 5)
    assert set(np.unique(feeds["i"])) <= {0, 1}
    whole = noise_samples([X, GAIN], 2, None, "net")
    assert isinstance(whole, TensorSamples)
    assert [f["x"].shape for f in whole.batches(2)] == [(1, 3, 4, 5)] * 2
    assert [f["gain"].shape for f in whole.batches(2)] == [()] * 2
    with pytest.raises(InputError, match="--shape"):
        noise_samples([TensorSpec("x", "float32", (None, 3, None, None))], 1, None, "net")
