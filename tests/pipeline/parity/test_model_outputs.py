"""Each model runs once: top-1 predictions and hits over a stream, and the logits of the fixed images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from maskplan.engines.base import Arrays, Classifier
from maskplan.pipeline.core.artifacts import Preprocessing, TensorSpec
from maskplan.pipeline.data.dataset import Split
from maskplan.pipeline.parity.model_outputs import (
    UNLABELED,
    Batches,
    compute_logits,
    fixed_image_positions,
    in_top_k,
    load_fixed_images,
    run_models,
    run_on_batches,
)

Array = npt.NDArray[Any]

HOW = Preprocessing(3, 4, 4, 0, "nearest", (0.25,) * 3, (0.5,) * 3)


class Weighing:
    """An engine in NumPy whose logits are weighted mean colors; it counts the images that it is shown."""

    inputs = (TensorSpec("x", "float32", (None, 3, 4, 4)),)
    last_timing = None

    def __init__(self, classes: int, seed: int, bias: float = 0.0) -> None:
        self.outputs = (TensorSpec("y", "float32", (None, classes)),)
        self.weights = np.random.default_rng(seed).normal(size=(3, classes)).astype(np.float32)
        self.bias, self.shown = bias, 0

    def infer(self, feeds: Arrays) -> dict[str, Array]:
        self.shown += len(feeds["x"])
        return {"y": feeds["x"].mean((2, 3)) @ self.weights + np.float32(self.bias)}

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Pictures:
    """PPM files of one color, all different."""

    labels: npt.NDArray[np.int64]

    def name(self, index: int) -> str:
        return f"picture {index}"

    def read(self, index: int) -> bytes:
        color = np.random.default_rng(index).integers(0, 256, 3, dtype=np.uint8)
        return b"P6 4 4 255\n" + np.broadcast_to(color, (4, 4, 3)).tobytes()


def pictures(count: int, classes: int = 3) -> Split:
    return Split("val", Pictures(np.arange(count) % classes), np.arange(count))


def pixels(images: Split) -> Array:
    """By hand: bytes after the header, scaled and normalized."""
    raw = [np.frombuffer(images.images.read(int(i))[11:], np.uint8) for i in images.indices]
    return ((np.stack(raw).reshape(-1, 4, 4, 3).transpose(0, 3, 1, 2) / 255 - 0.25) / 0.5).astype(np.float32)


@pytest.mark.parametrize("count", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("fixed", [1, 7, 64, 1000])
def test_every_image_runs_once_and_in_order(count: int, fixed: int) -> None:
    images = pictures(count)
    engines = {"dense": Weighing(7, 1), "sparse": Weighing(7, 2)}
    said = run_models({n: Classifier(e, n) for n, e in engines.items()}, HOW, images, fixed)
    for name, engine in engines.items():
        logits = pixels(images).mean((2, 3)) @ engine.weights
        assert engine.shown == count
        assert np.array_equal(said[name].top1, logits.argmax(1))
        ranks = (logits > logits[np.arange(count), images.labels][:, None]).sum(1)
        assert np.array_equal(said[name].in_top5, ranks < 5)
        positions = fixed_image_positions(images, fixed)
        assert len(positions) == min(fixed, count)
        assert np.allclose(said[name].fixed_logits, logits[positions], atol=1e-5)
        assert said[name].finite


def test_fixed_images_are_those_whose_logits_were_kept() -> None:
    images = pictures(90)
    model = Classifier(Weighing(5, 3), "net")
    kept = run_models({"net": model}, HOW, images, 40)["net"].fixed_logits
    assert np.allclose(compute_logits(model, load_fixed_images(HOW, images, 40)), kept, atol=1e-6)


def test_the_draw_of_fixed_images_follows_the_images_and_not_their_place() -> None:
    """A split that holds the odd images only, the last one first."""
    images = pictures(90)
    odd = Split("val", images.images, np.arange(1, 90, 2)[::-1])
    drawn = odd.sample(10, 20240229).indices
    assert sorted(odd.indices[fixed_image_positions(odd, 10)]) == sorted(drawn)


def test_without_images_models_run_on_noise_and_nothing_is_counted() -> None:
    engine = Weighing(4, 1)
    said = run_models({"net": Classifier(engine, "net")}, HOW, None, 70)["net"]
    assert (said.fixed_logits.shape, said.top1.shape, said.in_top5.shape, engine.shown) == ((70, 4), (0,), (0,), 70)
    assert np.allclose(said.fixed_logits, load_fixed_images(HOW, None, 70).mean((2, 3)) @ engine.weights, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("after", [32, 64, 70])
def test_one_number_that_is_not_finite_is_seen_wherever_it_is(bad: float, after: int) -> None:
    """In the first batch, the second, and the last."""

    class Spoiling(Weighing):
        def infer(self, feeds: Arrays) -> dict[str, Array]:
            found = super().infer(feeds)
            if self.shown == after:
                found["y"][-1, 2] = bad
            return found

    models = {"good": Classifier(Weighing(4, 1), "good"), "bad": Classifier(Spoiling(4, 1), "bad")}
    said = run_models(models, HOW, pictures(70), 1)
    assert (said["good"].finite, said["bad"].finite) == (True, False)


def stream(count: int, size: int) -> Batches:
    labels = np.full(count, UNLABELED)
    for start in range(0, count, size):
        yield np.ones((min(size, count - start), 3, 4, 4), np.float32), labels[start : start + size]


def test_images_without_a_label_are_in_no_top_five() -> None:
    said = run_on_batches({"net": Classifier(Weighing(3, 1), "net")}, stream(10, 4), 10, np.arange(2))["net"]
    assert not said.in_top5.any()
    assert len(set(said.top1.tolist())) == 1


# The top five.


def brute_in_top(row: Array, label: int, k: int) -> bool:
    """By ranks: how many classes come before the label when NaN comes first; where its own score is NaN, all do."""
    own = float(row[label])
    before = [score for score in row.tolist() if math.isnan(score) or math.isnan(own) or score > own]
    return len(before) < k


logit_tables = st.tuples(st.integers(1, 6), st.integers(1, 8)).flatmap(
    lambda shape: hnp.arrays(
        np.float32,
        shape,
        elements=st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0, math.nan, math.inf, -math.inf]),
    )
)


@settings(max_examples=100, deadline=None)
@given(logits=logit_tables, k=st.integers(1, 6), data=st.data())
def test_in_top_is_what_ranks_say(logits: Array, k: int, data: st.DataObject) -> None:
    labels = data.draw(hnp.arrays(np.int64, len(logits), elements=st.integers(0, logits.shape[1] - 1)))
    expected = [brute_in_top(row, int(label), k) for row, label in zip(logits, labels, strict=True)]
    assert in_top_k(logits, labels, k).tolist() == expected
