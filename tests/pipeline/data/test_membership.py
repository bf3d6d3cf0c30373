"""Shared images are found at any ratio of sizes; disjoint sets never match beyond chance."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import pytest

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.membership import (
    Members,
    _by_chance,
    decode_members,
    encode_members,
    members_of,
    overlap_of,
)


def digests(start: int, stop: int) -> list[str]:
    return [hashlib.blake2b(i.to_bytes(8, "little"), digest_size=8).hexdigest() for i in range(start, stop)]


def sampled(values: npt.NDArray[np.uint64], bits: int) -> Members:
    return Members(bits, np.unique(values >> np.uint64(64 - bits)))


@pytest.mark.parametrize("images", [0, 1, 50, 4096, 4097, 45_000])
def test_a_set_is_read_back_from_its_text(images: int) -> None:
    members = members_of(digests(0, images))
    again = decode_members(encode_members(members))
    assert again.bits == members.bits
    assert np.array_equal(again.prefixes, members.prefixes)


def test_sizes_are_bounded() -> None:
    generator = np.random.default_rng(0)
    values = generator.integers(0, 2**64, 1_280_000, dtype=np.uint64)
    large = sampled(values, 31)
    assert len(encode_members(large)) < 3_500_000
    assert len(encode_members(members_of(digests(0, 45_000)))) < 220_000


@pytest.mark.parametrize(
    ("shaping", "evaluated", "shared"),
    [
        (50_000, 50, 50),
        (50_000, 50, 1),
        (50_000, 10_000, 10_000),
        (50_000, 10_000, 2),
        (100, 10_000, 1),
        (3, 3, 1),
        (1, 1, 1),
        (200_000, 5_000, 5),
    ],
)
def test_an_overlap_is_found_at_any_ratio_of_sizes(shaping: int, evaluated: int, shared: int) -> None:
    train = members_of(digests(0, shaping))
    val = members_of(digests(shaping - shared, shaping - shared + evaluated))
    found = overlap_of(val, train)
    assert found.certain
    assert found.matches >= shared
    assert overlap_of(train, val).certain


@pytest.mark.parametrize(
    ("shaping", "evaluated"), [(50_000, 50), (50_000, 10_000), (100, 10_000), (1, 1), (0, 5), (5, 0)]
)
def test_disjoint_sets_share_nothing(shaping: int, evaluated: int) -> None:
    train, val = members_of(digests(0, shaping)), members_of(digests(shaping, shaping + evaluated))
    assert not overlap_of(val, train).certain


def test_total_containment_of_a_thousand_images_in_a_million_is_found_and_chance_is_not() -> None:
    """At 10 bits beyond the size one image in about a thousand matches by chance."""
    generator = np.random.default_rng(1)
    values = generator.integers(0, 2**64, 2_000_000, dtype=np.uint64)
    train = sampled(values[:1_280_000], 31)
    for count in (50, 1_000):
        inside, outside = (Members(64, np.sort(v)) for v in (values[:count], values[-count:]))
        assert overlap_of(inside, train).certain
        assert not overlap_of(outside, train).certain
    by_chance = overlap_of(Members(64, np.sort(values[-20_000:])), train)
    assert by_chance.matches > 0
    assert not by_chance.certain


def test_chance_is_bounded_as_stated() -> None:
    """Against the exact binomial tail."""
    binom = pytest.importorskip("scipy.stats").binom
    for trials, probability in ((50, 1e-3), (1_000, 1e-3), (50_000, 5e-4), (10_000, 0.05)):
        limit = _by_chance(trials, probability)
        assert binom.sf(limit, trials, probability) <= 1e-5
        assert limit <= trials * probability + 12 * (trials * probability) ** 0.5 + 25


@pytest.mark.parametrize("text", ["", "64", "64:", "x:eJw=", "64:!!!", "0:eJwDAAAAAAE=", "99:eJwDAAAAAAE="])
def test_damaged_text_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="damaged"):
        decode_members(text)


@pytest.mark.parametrize("digest", ["", "a40f0afeb7efrf19", "-1", "f" * 17, "\x00"])
def test_a_damaged_digest_is_refused(digest: str) -> None:
    """Of an artifact of an earlier version, which lists digests."""
    with pytest.raises(InputError, match="damaged"):
        members_of(["0" * 16, digest])
