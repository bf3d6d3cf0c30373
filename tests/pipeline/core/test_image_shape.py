"""The size of one image where a graph leaves it open."""

from __future__ import annotations

import pytest

from maskplan.pipeline.core.artifacts import TensorSpec
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.image_shape import image_shape

OPEN = (None, 3, None, None)


@pytest.mark.parametrize(
    ("shape", "given", "found"),
    [
        ((None, 3, 8, 8), None, (3, 8, 8)),
        (OPEN, (64, 32), (3, 64, 32)),
        (OPEN, (3, 64, 32), (3, 64, 32)),
        ((1, 3, 8, None), (16,), (3, 8, 16)),
        ((None, None, None, 4), (64, 32), (64, 32, 4)),
    ],
)
def test_open_sizes_are_filled_in(shape: tuple[int | None, ...], given: tuple[int, ...] | None, found: object) -> None:
    assert image_shape(TensorSpec("x", "float32", shape), given, "net") == found


@pytest.mark.parametrize("given", [None, (4, 64, 32), (64,), (1, 3, 64, 32)])
def test_it_asks_rather_than_guesses(given: tuple[int, ...] | None) -> None:
    with pytest.raises(InputError, match="3x224x224"):
        image_shape(TensorSpec("x", "float32", OPEN), given, "net")
