"""Any network in any number of samples."""

from __future__ import annotations

import numpy as np
import pytest
from any_network import FunctionEngine

from maskplan.engines.batch_runner import BatchRunner
from maskplan.pipeline.core.artifacts import Profile, TensorSpec

VALUES = np.arange(22, dtype=np.float32).reshape(11, 2)


def engine(shape: tuple[int | None, ...], dtype: str = "float32") -> FunctionEngine:
    return FunctionEngine(
        [TensorSpec("x", dtype, shape)],
        [TensorSpec("y", dtype, shape), TensorSpec("z", "float32", ())],
        lambda feeds: [2 * feeds["x"], feeds["x"].astype(np.float32).sum(axis=1)],
    )


@pytest.mark.parametrize(
    ("first", "profiles", "sizes"),
    [
        (None, (), [11]),
        (4, (), [4, 4, 4]),
        (1, (), [1] * 11),
        (None, (Profile(1, 4, 4),), [4, 4, 3]),
        (None, (Profile(4, 4, 4), Profile(8, 8, 8)), [8, 4]),
    ],
)
def test_padding_leaves_no_trace(first: int | None, profiles: tuple[Profile, ...], sizes: list[int]) -> None:
    inner = engine((first, 2))
    outputs = BatchRunner(inner, "net", profiles).run({"x": VALUES})
    np.testing.assert_array_equal(outputs["y"], 2 * VALUES)
    np.testing.assert_array_equal(outputs["z"], VALUES.sum(axis=1))
    assert [call["x"][0] for call in inner.calls] == sizes


def test_floats_take_the_type_of_the_input() -> None:
    outputs = BatchRunner(engine((None, 2), "float16"), "net").run({"x": VALUES})
    assert outputs["y"].dtype == np.float16


def test_inputs_without_a_batch_are_given_as_they_are() -> None:
    specs = [
        TensorSpec("x", "float32", (None, 2)),
        TensorSpec("state", "float32", (2, 3)),
        TensorSpec("n", "int64", ()),
    ]
    inner = FunctionEngine(specs, [TensorSpec("y", "float32", ())], lambda f: [f["x"] * f["n"]])
    runner = BatchRunner(inner, "net")
    assert runner.has_no_batch
    assert runner.fixed_batch == 1
    feeds = {"x": VALUES[:3], "state": np.zeros((2, 3), np.float32), "n": np.array(3)}
    np.testing.assert_array_equal(runner.run(feeds)["y"], 3 * VALUES[:3])
    assert inner.calls == [{"x": (3, 2), "state": (2, 3), "n": ()}]
