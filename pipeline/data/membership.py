"""Which images a set holds, in a few bits an image: enough to find a shared image whatever the sizes of two sets.

A set is stored as the sorted leading bits of its images' 64-bit digests, delta-coded and compressed. Small sets keep all 64
bits. Larger ones keep `log2(images) + p` bits, so that an image that is not in the set matches with a probability of about
2**-p; the number of matches that chance explains is known, and any overlap beyond it is found.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.errors import InputError

_DIGEST_BITS = 64
# Sets of at most this size keep whole digests: 32 KiB.
_EXACT = 4096
# Bits beyond log2(images): at most 24, and what keeps a set of millions near 2 MiB, but at least 4.
_MAX_EXTRA_BITS, _MIN_EXTRA_BITS, _SIZE_BITS = 24, 4, 8 << 21
# Chance alone exceeds the number of matches that is tolerated with this probability at most.
_FALSE_ALARM = 1e-5


@dataclass(frozen=True)
class Members:
    """The leading `bits` of the digests of a set's distinct images, sorted."""

    bits: int
    prefixes: npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Overlap:
    """Matches of one set in another.

    Attributes:
        matches: Images of the first set whose leading bits are in the second one; never fewer than the shared images.
        by_chance: More matches than this are shared images, up to a probability of 1e-5.
    """

    matches: int
    by_chance: int

    @property
    def certain(self) -> bool:
        """Whether images are shared beyond what chance explains."""
        return self.matches > self.by_chance


def members_of(digests: Iterable[str]) -> Members:
    """From digests of 16 hexadecimal digits.

    Raises:
        InputError: A digest is none: the record that it is from is damaged.
    """
    try:
        values = np.unique(np.fromiter((int(digest, 16) for digest in digests), np.uint64))
    except (ValueError, OverflowError) as error:
        raise InputError("the record of an image set is damaged", found=error, fix="make the artifact again") from error
    bits = _bits_for(len(values))
    return Members(bits, np.unique(values >> np.uint64(_DIGEST_BITS - bits)))


def encode_members(members: Members) -> str:
    """Text for a record: the number of bits, a colon, and the compressed differences in base64."""
    differences = np.diff(members.prefixes, prepend=np.uint64(0)).astype("<u8")
    # Bytes of equal weight together: the high ones are nearly all zero.
    planes = np.ascontiguousarray(differences.view(np.uint8).reshape(-1, 8).T)
    return f"{members.bits}:{base64.b64encode(zlib.compress(planes.tobytes(), 6)).decode()}"


def decode_members(text: str) -> Members:
    """The inverse of `encode_members`.

    Raises:
        InputError: The text is not one that `encode_members` writes.
    """
    try:
        bits, _, packed = text.partition(":")
        planes = np.frombuffer(zlib.decompress(base64.b64decode(packed, validate=True)), np.uint8)
        differences = np.ascontiguousarray(planes.reshape(8, -1).T).view("<u8").ravel()
        members = Members(int(bits), np.cumsum(differences, dtype=np.uint64))
    except (ValueError, zlib.error) as error:
        raise InputError("the record of an image set is damaged", found=error, fix="make the artifact again") from error
    if not 1 <= members.bits <= _DIGEST_BITS:
        raise InputError("the record of an image set is damaged", found=f"{bits} bits", fix="make the artifact again")
    return members


def overlap_of(evaluated: Members, shaping: Members) -> Overlap:
    """Count the images of one set that are in another, whatever their sizes.

    Args:
        evaluated: The set that a model is judged on.
        shaping: A set that shaped the model.
    """
    bits = min(evaluated.bits, shaping.bits)
    ours, theirs = (_shortened(members, bits) for members in (evaluated, shaping))
    places = np.searchsorted(theirs, ours)
    inside = places < len(theirs)
    matches = int((theirs[places[inside]] == ours[inside]).sum())
    return Overlap(matches, _by_chance(len(ours), -math.expm1(-len(theirs) / 2.0**bits)))


def _shortened(members: Members, bits: int) -> npt.NDArray[np.uint64]:
    """Distinct leading bits, fewer than are stored, still sorted."""
    prefixes = members.prefixes >> np.uint64(members.bits - bits)
    distinct: npt.NDArray[np.uint64] = prefixes[np.diff(prefixes, prepend=np.uint64(2**64 - 1)) != 0]
    return distinct


def _bits_for(images: int) -> int:
    if images <= _EXACT:
        return _DIGEST_BITS
    # Sorted prefixes take about 1.5 bits an image beyond the extra ones.
    extra = int(_SIZE_BITS / images - 1.5)
    return math.ceil(math.log2(images)) + max(_MIN_EXTRA_BITS, min(_MAX_EXTRA_BITS, extra))


def _by_chance(trials: int, probability: float) -> int:
    """The smallest count that a binomial variable exceeds with a probability of at most 1e-5, by Chernoff's bound."""
    if trials * probability < _FALSE_ALARM:
        return 0
    low, high = math.ceil(trials * probability), trials
    while low < high:
        middle = (low + high) // 2
        if _log_tail(trials, probability, middle + 1) <= math.log(_FALSE_ALARM):
            high = middle
        else:
            low = middle + 1
    return low


def _log_tail(trials: int, probability: float, count: int) -> float:
    """Chernoff's bound of log P(X >= count), for count above the mean."""
    share = count / trials
    if share >= 1:
        return trials * math.log(probability) if count == trials else -math.inf
    return -trials * (share * math.log(share / probability) + (1 - share) * math.log((1 - share) / (1 - probability)))
