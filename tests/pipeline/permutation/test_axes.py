"""Tests of pipeline/permutation/axes.py: which channels are one, which are held, which can change places."""

from __future__ import annotations

import numpy as np
import pytest

from maskplan.pipeline.permutation.axes import Channels, Places, Value


def flattened(places: Places, positions: int) -> Places:
    """(N, C, 1) with each channel's positions as copies, as (N, C * positions)."""
    return Places(
        np.repeat(places.channels.ravel(), positions)[None],
        np.tile(np.arange(positions), places.channels.size)[None],
    )


def same(channels: Channels, a: Places, b: Places) -> bool:
    one, other = channels.resolved(a), channels.resolved(b)
    return np.array_equal(one.channels, other.channels) and np.array_equal(one.copies, other.copies)


def test_tied_channels_are_one_whatever_the_order_of_the_ties() -> None:
    channels = Channels()
    a, b, c, d = (channels.fresh((4,), 0) for _ in range(4))
    for one, other in ((a, b), (c, d), (b, d)):
        channels.tie(one, other)
    assert all(same(channels, a, other) for other in (b, c, d))
    assert not same(channels, a, channels.fresh((4,), 0))


def test_a_tie_in_another_order_pins_what_has_no_counterpart() -> None:
    """Channels 0 and 1 are one, with a place each; 2 and 3 have no second place to follow them with."""
    channels = Channels()
    a = channels.fresh((4,), 0)
    channels.tie(a, a.rearranged(lambda x: x[[1, 0, 2, 3]]))
    one, two, *others = channels.resolved(a).channels
    assert one == two
    assert len({one, *others}) == 3
    assert list(channels.pinned()) == [one]


def test_tied_parts_of_one_axis_are_copies_of_each_other() -> None:
    channels = Channels()
    a = channels.fresh((6,), 0)
    channels.tie(*(a.rearranged(lambda x, p=part: x[p]) for part in (slice(3), slice(3, 6))))
    owned = channels.resolved(a)
    np.testing.assert_array_equal(owned.channels, [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(owned.copies, [0, 0, 0, 1, 1, 1])
    # Meeting once more, also through another tensor, changes nothing.
    b = channels.fresh((3,), 0)
    channels.tie(b, a.rearranged(lambda x: x[3:]))
    channels.tie(a.rearranged(lambda x: x[:3]), b)
    signatures = channels.signatures([Value((6,), (a,)), Value((3,), (b,))])
    assert not channels.pinned()
    assert len(set(signatures[:3])) == 1


@pytest.mark.parametrize("first", [True, False])
def test_a_flattened_channel_owns_its_columns(first: bool) -> None:
    channels = Channels()
    made, columns = channels.fresh((1, 3), 1), channels.fresh((5, 6), 1)
    channels.tie(*(flattened(made, 2), columns)[:: 1 if first else -1])
    owned = channels.resolved(columns)
    np.testing.assert_array_equal(owned.copies.ravel(), [0, 1, 0, 1, 0, 1])
    np.testing.assert_array_equal(owned.channels.ravel(), np.repeat(channels.resolved(made).channels.ravel(), 2))
    assert not channels.pinned()


def test_copies_in_another_order_are_pinned() -> None:
    channels = Channels()
    a, b = channels.fresh((1, 2), 1), channels.fresh((1, 2), 1)
    channels.tie(flattened(a, 2), flattened(b, 2).rearranged(lambda x: x[:, [1, 0, 3, 2]]))
    assert set(channels.pinned()) >= set(channels.resolved(a).channels.ravel().tolist())


def test_a_channel_tied_to_two_makes_them_one() -> None:
    channels = Channels()
    a, b = channels.fresh((2,), 0), channels.fresh((2,), 0)
    channels.tie(a, b.rearranged(lambda x: x[[0, 0]]))
    one, other = channels.resolved(a).channels
    assert one == other == channels.resolved(b).channels[0]


def test_a_copy_tied_to_another_copy_is_pinned() -> None:
    channels = Channels()
    a, b = (flattened(channels.fresh((1, 2), 1), 3) for _ in range(2))
    channels.tie(a.rearranged(lambda x: x[:, 1::3]), b.rearranged(lambda x: x[:, 2::3]))
    assert len(channels.pinned()) == 4


def test_copies_that_correspond_in_one_channel_only_are_pinned() -> None:
    """The second channel's place meets a copy of it where the first one's meets itself."""
    channels = Channels()
    a = channels.fresh((2,), 0)
    channels.tie(a, Places(a.channels, np.array([0, 1])))
    assert list(channels.pinned()) == [1]


def test_a_tied_copy_of_a_copy_is_pinned() -> None:
    channels = Channels()
    a, b, c = channels.fresh((1, 2), 1), channels.fresh((1, 4), 1), channels.fresh((1, 12), 1)
    channels.tie(flattened(a, 2), b)
    channels.tie(c, flattened(b, 3))
    assert set(channels.pinned()) >= {0, 1}


def test_positions_with_the_same_copy_number_pin_the_channel() -> None:
    channels = Channels()
    a = channels.fresh((3,), 0)
    channels.signatures([Value((4,), (a.rearranged(lambda x: x[[0, 0, 1, 2]]),))])
    assert channels.pinned() == {0: "two of its positions in a tensor cannot be distinguished"}


def test_a_copy_of_a_copy_is_pinned() -> None:
    channels = Channels()
    a, b = channels.fresh((1, 2), 1), channels.fresh((1, 4), 1)
    channels.tie(flattened(a, 2), b)
    channels.resolved(flattened(b, 3))
    assert len(channels.pinned()) == 2


def test_the_first_reason_is_reported_for_all_tied_channels() -> None:
    channels = Channels()
    a, b = channels.fresh((3,), 0), channels.fresh((3,), 0)
    channels.pin(a, "first")
    channels.pin(a, "second")
    channels.tie(b, a)
    assert set(channels.pinned().values()) == {"first"}
    assert set(channels.pinned()) == set(channels.resolved(b).channels.tolist())


@pytest.mark.parametrize("count", [2, 700])
def test_signatures_are_equal_for_channels_in_the_same_tensors_only(count: int) -> None:
    channels = Channels()
    whole = channels.fresh((2 * count,), 0)
    half = whole.rearranged(lambda x: x[:count])
    values = [Value((2 * count,), (whole,)), Value((count,), (half,))]
    signatures = channels.signatures(values)
    assert len(set(signatures[:count])) == len(set(signatures[count:])) == 1
    assert signatures[0] != signatures[-1]


def test_signatures_distinguish_copies() -> None:
    """A tensor that holds one half of two channels and the other half of a third."""
    channels = Channels()
    a = channels.fresh((6,), 0)
    channels.tie(*(a.rearranged(lambda x, p=part: x[p]) for part in (slice(3), slice(3, 6))))
    part = a.rearranged(lambda x: x[[0, 1, 5]])
    signatures = channels.signatures([Value((6,), (a,)), Value((3,), (part,))])
    assert signatures[0] == signatures[1] != signatures[2]


def test_numbers_distinguish_channels() -> None:
    channels = Channels()
    a = channels.fresh((6,), 0)
    channels.distinguish(a, np.arange(6) // 2)
    signatures = channels.signatures([Value((6,), (a,))])
    assert [len(set(signatures[i : i + 2])) for i in (0, 2, 4)] == [1, 1, 1]
    assert len(set(signatures)) == 3
