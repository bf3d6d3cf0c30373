"""The classifier in front of any engine, and the adapter to Polygraphy."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from maskplan.engines.base import Arrays, Classifier, polygraphy_runner, quiet_polygraphy
from maskplan.pipeline.core.artifacts import Profile, TensorSpec
from maskplan.pipeline.core.errors import InputError

Array = npt.NDArray[Any]


class Means:
    """An engine in NumPy: the logits are the channels' means. It remembers what it was fed."""

    last_timing = None

    def __init__(
        self,
        inputs: tuple[TensorSpec, ...] = (TensorSpec("image", "float32", (None, 3, 4, 4)),),
        outputs: tuple[TensorSpec, ...] = (TensorSpec("scores", "float32", (None, 3)),),
    ) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.fed: list[Array] = []
        self.closed = False

    def infer(self, feeds: Arrays) -> dict[str, Array]:
        (image,) = feeds.values()
        self.fed.append(image)
        kind = np.dtype(self.outputs[0].dtype)
        return {self.outputs[0].name: image.astype(np.float64).mean((2, 3)).astype(kind)}

    def close(self) -> None:
        self.closed = True


def image(name: str = "image", dtype: str = "float32", batch: int | None = None) -> TensorSpec:
    return TensorSpec(name, dtype, (batch, 3, 4, 4))


def scores(name: str = "scores", dtype: str = "float32", batch: int | None = None) -> TensorSpec:
    return TensorSpec(name, dtype, (batch, 3))


def pictures(count: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).random((count, 3, 4, 4), dtype=np.float32)


def test_logits_pass_through_whatever_the_names_are() -> None:
    x = pictures(5)
    assert np.allclose(Classifier(Means(), "net").logits(x), x.mean((2, 3)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_images_are_given_in_the_inputs_type_and_logits_come_in_float32(dtype: str) -> None:
    engine = Means((image(dtype=dtype),), (scores(dtype=dtype),))
    x = pictures(2)
    logits = Classifier(engine, "net").logits(x)
    assert (engine.fed[0].dtype, logits.dtype) == (np.dtype(dtype), np.float32)
    assert np.allclose(logits, x.mean((2, 3)), atol=1e-3)


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ((image(), image("second")), (scores(),)),
        ((image(),), (scores(), scores("second"))),
        ((), (scores(),)),
        ((image(),), ()),
        ((TensorSpec("x", "float32", (None, 8)),), (scores(),)),
        ((TensorSpec("x", "float32", (None, 3, 4, 4, 4)),), (scores(),)),
        ((image(dtype="uint8"),), (scores(),)),
        ((image(dtype="int64"),), (scores(),)),
        ((image(),), (scores(dtype="int64"),)),
        ((image(),), (TensorSpec("maps", "float32", (None, 3, 1, 1)),)),
        ((image(),), (TensorSpec("one", "float32", (None,)),)),
    ],
    ids=[
        "two inputs",
        "two outputs",
        "no input",
        "no output",
        "flat input",
        "volumes",
        "byte input",
        "integer input",
        "class numbers",
        "maps of scores",
        "one number",
    ],
)
def test_what_does_not_turn_images_into_logits_is_refused(
    inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> None:
    with pytest.raises(InputError, match="not an image classifier") as caught:
        Classifier(Means(inputs, outputs), "some net")
    assert "some net" in str(caught.value)


def test_the_fixed_batch_is_the_graphs_own() -> None:
    assert Classifier(Means(), "net").fixed_batch is None
    assert Classifier(Means((image(batch=4),), (scores(batch=4),)), "net").fixed_batch == 4


def test_the_largest_batch_is_the_largest_profiles() -> None:
    assert Classifier(Means(), "net", (Profile(1, 1, 1), Profile(2, 4, 16), Profile(1, 2, 8))).max_batch == 16
    assert Classifier(Means(), "net").max_batch == sys.maxsize


def test_leaving_the_block_closes_the_engine_also_on_an_error() -> None:
    engine = Means()
    with Classifier(engine, "net") as model:
        assert not engine.closed
        model.logits(pictures(1))
    assert engine.closed
    engine = Means()
    with pytest.raises(ZeroDivisionError), Classifier(engine, "net"):
        raise ZeroDivisionError
    assert engine.closed


def test_polygraphy_runs_two_engines() -> None:
    """Without closing what it was lent."""
    from polygraphy.comparator import Comparator

    quiet_polygraphy()
    engines = [Means(), Means()]
    runners = [polygraphy_runner(Classifier(e, f"net {i}"), f"runner {i}") for i, e in enumerate(engines)]
    feeds = [{"input": pictures(1)}, {"input": pictures(2)}]
    results = Comparator.run(runners, data_loader=feeds)
    for name, iterations in results.items():
        assert name.startswith("runner")
        for feed, outputs in zip(feeds, iterations, strict=True):
            assert np.allclose(outputs[engines[0].outputs[0].name], feed["input"].mean((2, 3)))
    assert len(results) == 2
    assert bool(Comparator.compare_accuracy(results))
    assert not any(e.closed for e in engines)


def test_polygraphy_sees_a_difference() -> None:
    from polygraphy.comparator import Comparator

    class Off(Means):
        def infer(self, feeds: Arrays) -> dict[str, Array]:
            return {name: value + 0.5 for name, value in super().infer(feeds).items()}

    quiet_polygraphy()
    runners = [polygraphy_runner(Classifier(engine, "net"), type(engine).__name__) for engine in (Means(), Off())]
    results = Comparator.run(runners, data_loader=[{"input": pictures(1)}])
    assert not bool(Comparator.compare_accuracy(results))


@pytest.mark.parametrize(
    ("profiles", "sizes"),
    [
        ((Profile(1, 1, 1), Profile(1, 8, 8)), {1: [1], 5: [5], 8: [8], 11: [8, 3]}),
        ((Profile(8, 8, 8),), {1: [8], 8: [8], 11: [8, 8]}),
        ((Profile(1, 1, 1), Profile(4, 8, 8)), {1: [1], 2: [4], 9: [8, 1], 10: [8, 4]}),
        ((Profile(8, 8, 8), Profile(4, 4, 4)), {2: [4], 4: [4], 5: [8], 10: [8, 4]}),
    ],
)
def test_parts_are_filled_up_to_a_batch_that_a_profile_takes(
    profiles: tuple[Profile, ...], sizes: dict[int, list[int]]
) -> None:
    for images, calls in sizes.items():
        engine, x = Means(), pictures(images)
        found = Classifier(engine, "means", profiles).logits(x)
        assert [len(fed) for fed in engine.fed] == calls
        assert np.allclose(found, x.mean((2, 3)))
