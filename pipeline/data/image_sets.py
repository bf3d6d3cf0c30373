"""Digests of image sets: what they hold, in which order and with which labels, and whether two sets share images."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from maskplan.pipeline.core.artifacts import ImageSet
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.data.dataset import ImageFiles, Split
from maskplan.pipeline.data.membership import Members, decode_members, encode_members, members_of, overlap_of
from maskplan.pipeline.data.preprocessing import inspect_image

log = logging.getLogger(__name__)

_WORKERS = 4


def identify(split: Split, classes: Sequence[str] = ()) -> ImageSet:
    """Read every image of a split once: digests of the files, and whether all of them decode.

    Args:
        split: Images to read.
        classes: Names of the classes in the order of the labels.

    Raises:
        InputError: Some images are corrupt; the first few are named and all are counted.
    """

    def digest_and_inspect(index: int) -> tuple[str, bool, bool]:
        data = split.images.read(index)
        image = inspect_image(data)
        return hashlib.blake2b(data, digest_size=8).hexdigest(), image is not None, image == "16-bit"

    with ThreadPoolExecutor(_WORKERS) as pool:
        results = list(pool.map(digest_and_inspect, split.indices.tolist(), chunksize=64))
    names = [split.images.name(int(i)) for i in split.indices]
    corrupt = [name for name, (_, complete, _) in zip(names, results, strict=True) if not complete]
    if corrupt:
        raise InputError(
            f"{len(corrupt)} of {len(split)} {split.role} images cannot be decoded",
            found=listed(corrupt),
            fix="replace or remove these files",
        )
    deep = [name for name, (_, _, is_16_bit) in zip(names, results, strict=True) if is_16_bit]
    if deep:
        log.warning(
            "%d %s images have 16 bits a channel; values above 255 become white, as in torchvision: %s",
            len(deep),
            split.role,
            listed(deep),
        )
    in_order = [digest for digest, _, _ in results]
    digests = sorted(in_order)
    labeled = [f"{digest} {label}" for digest, label in zip(in_order, split.labels.tolist(), strict=True)]
    return ImageSet(
        role=split.role,
        images=len(digests),
        sha256=_sha256(digests),
        members=encode_members(members_of(digests)),
        labeled_sha256=_sha256([*map(repr, classes), *labeled]),
    )


def listing_sha256(images: ImageFiles) -> str:
    """Digest of names, sizes and modification times: whether a folder has changed, without reading its images."""
    digest = hashlib.sha256()
    for name in images.names:
        stat = (images.folder / name).stat()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def require_disjoint(evaluated: ImageSet, used: Sequence[ImageSet]) -> None:
    """Refuse to evaluate a model on images that its masks or statistics were made from.

    Shared images are found whatever the sizes of the two sets (`data/membership.py`): all of them in sets of up to 4096
    images, in larger ones as soon as there are more than chance explains, which is one or two for 50,000 training images.

    Args:
        evaluated: Images to evaluate on.
        used: Image sets of the model's provenance.

    Raises:
        InputError: Images are shared.
    """
    ours = _members(evaluated)
    for other in used:
        overlap = overlap_of(ours, _members(other))
        if overlap.certain:
            raise InputError(
                f"{evaluated.role} images were also used to make the model",
                found=f"about {overlap.matches} of {evaluated.images} are among its {other.images} {other.role} images",
                fix="compare on images that were used neither for masks nor for statistics",
            )


def _members(images: ImageSet) -> Members:
    # Artifacts of earlier versions kept the smallest digests only.
    return decode_members(images.members) if images.members else members_of(images.sketch)


def _sha256(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
