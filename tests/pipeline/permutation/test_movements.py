"""Tests of pipeline/permutation/movements.py: what becomes of places that no short network leads to."""

from __future__ import annotations

import numpy as np
import pytest

from maskplan.pipeline.permutation.axes import Channels, Places, Value
from maskplan.pipeline.permutation.calls import Call
from maskplan.pipeline.permutation.movements import view


@pytest.mark.parametrize(
    ("copies", "dims"),
    [
        # The second row is another copy of each channel: rows are free of channels.
        ([0, 0, 1, 1], (1,)),
        ([0, 1, 1, 2], (1,)),
        # The rows hold the copies in another order.
        ([0, 1, 1, 0], (0, 1)),
    ],
)
def test_copies_split_into_a_separate_dimension_if_all_channels_agree(copies: list[int], dims: tuple[int, ...]) -> None:
    channels = Channels()
    made = channels.fresh((2,), 0)
    places = Places(made.channels[[0, 1, 0, 1]], np.array(copies))
    found = view(channels, Call("view", {"self": Value((4,), (places,))}, (2, 2), frozenset(), False))
    assert isinstance(found, Value)
    assert [p.dims for p in found.places] == [dims]
