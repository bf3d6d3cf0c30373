"""Image sets: digests of content, labels and order; overlaps; images that cannot be used."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from image_collections import encoded, in_memory, whole
from PIL import Image

from maskplan.pipeline.core.artifacts import ImageSet
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.dataset import ImageFiles, Split, open_folder, open_val
from maskplan.pipeline.data.image_sets import identify, listing_sha256, require_disjoint
from maskplan.pipeline.data.membership import decode_members


@pytest.fixture
def copied(toy_data: Path, tmp_path: Path) -> Path:
    """A copy of the toy data, to modify."""
    return Path(shutil.copytree(toy_data, tmp_path / "toy"))


def test_an_image_set_is_the_digests_of_its_files(toy_data: Path) -> None:
    val = open_val(toy_data, (), 3)
    digests = sorted(
        hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest() for path in (toy_data / "val").rglob("*.png")
    )
    found = identify(val)
    assert (found.role, found.images) == ("val", 24)
    assert [f"{prefix:016x}" for prefix in decode_members(found.members).prefixes] == digests
    assert found.sha256 == hashlib.sha256("\n".join(digests).encode()).hexdigest()


def test_the_digest_of_a_set_depends_only_on_the_images(copied: Path, toy_data: Path) -> None:
    """Neither on names nor on order; one pixel matters."""
    for i, path in enumerate(sorted((copied / "val" / "red").iterdir(), reverse=True)):
        path.rename(path.with_name(f"renamed{i}.png"))
    before = identify(open_val(toy_data, (), 3))
    after = identify(open_val(copied, (), 3))
    assert (after.sha256, after.members) == (before.sha256, before.members)
    (copied / "val" / "red" / "renamed0.png").write_bytes(encoded(77))
    assert identify(open_val(copied, (), 3)).sha256 != before.sha256


def test_the_key_of_a_set_depends_on_labels_order_and_class_names(copied: Path, toy_data: Path) -> None:
    before = identify(open_val(toy_data, (), 3), ("blue", "green", "red"))
    assert identify(open_val(copied, (), 3), ("blue", "green", "red")).key == before.key
    assert identify(open_val(copied, (), 3), ("green", "blue", "red")).key != before.key
    swap = copied / "swap"
    (copied / "val" / "red").rename(swap)
    (copied / "val" / "blue").rename(copied / "val" / "red")
    swap.rename(copied / "val" / "blue")
    swapped = identify(open_val(copied, (), 3), ("blue", "green", "red"))
    assert swapped.sha256 == before.sha256
    assert swapped.key != before.key
    (copied / "val" / "green" / "00.png").rename(copied / "val" / "green" / "zz.png")
    assert identify(open_val(copied, (), 3), ("blue", "green", "red")).key != swapped.key


def test_the_key_of_a_set_depends_on_labels_alone_too(copied: Path) -> None:
    """The last image of one class becomes the first one of the next: the order stays."""
    split = open_val(copied, (), 3)
    before, in_order = identify(split), [split.images.read(i) for i in split.indices]
    (copied / "val" / "blue" / "07.png").rename(copied / "val" / "green" / "0.png")
    after = open_val(copied, (), 3)
    assert [after.images.read(i) for i in after.indices] == in_order
    assert identify(after).key != before.key


def test_images_of_16_bits_are_named_in_a_warning(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    deep = np.full((20, 20), 40_000, np.uint16)
    Image.fromarray(deep).save(copied / "val" / "red" / "deep.png")
    with caplog.at_level("WARNING", logger="maskplan"):
        identify(open_val(copied, (), 3))
    assert "1 val images have 16 bits a channel" in caplog.text
    assert "red/deep.png" in caplog.text


def test_a_decompression_bomb_is_named_as_corrupt(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskplan.pipeline.data.preprocessing.MAX_PIXELS", 500)
    Image.new("RGB", (30, 20)).save(copied / "val" / "red" / "bomb.png")
    with pytest.raises(InputError, match="1 of 25 val images cannot be decoded") as raised:
        identify(open_val(copied, (), 3))
    assert raised.value.found == "red/bomb.png"


def test_corrupt_images_are_counted_and_the_first_named(copied: Path) -> None:
    folder = copied / "val" / "blue"
    (folder / "00.png").write_bytes(encoded(5, "JPEG", (64, 64))[:-900])
    (folder / "01.png").write_bytes(encoded(5)[:300])
    (folder / "02.png").write_bytes(b"<html>404</html>")
    (folder / "03.png").write_bytes(b"")
    for i in range(4, 8):
        (folder / f"{i:02}.png").write_bytes(b"\0" * 500)
    with pytest.raises(InputError, match="8 of 24 val images cannot be decoded") as raised:
        identify(open_val(copied, (), 3))
    assert raised.value.found == "blue/00.png, blue/01.png, blue/02.png, blue/03.png, blue/04.png and 3 more"


def test_corrupt_images_outside_the_split_are_ignored(copied: Path) -> None:
    for path in (copied / "train").rglob("*.png"):
        path.write_bytes(b"corrupt")
    assert identify(open_folder(copied, (), 3, seed=0).val).images == 24


def test_the_listing_changes_with_names_sizes_and_times(copied: Path) -> None:
    def now() -> str:
        images = open_val(copied, (), 3).images
        assert isinstance(images, ImageFiles)
        return listing_sha256(images)

    seen = [now()]
    assert now() == seen[0]
    first = copied / "val" / "blue" / "00.png"
    os.utime(first, ns=(1, 1))
    seen.append(now())
    first.write_bytes(first.read_bytes() + b"\0")
    os.utime(first, ns=(1, 1))
    seen.append(now())
    first.rename(first.with_name("zz.png"))
    seen.append(now())
    assert len(set(seen)) == 4


def test_disjoint_sets_are_accepted(toy_data: Path) -> None:
    data = open_folder(toy_data, (), 3, seed=0)
    require_disjoint(identify(data.val), [identify(data.train), identify(data.select)])
    require_disjoint(identify(data.val), [])


def test_one_shared_image_is_found(copied: Path) -> None:
    shutil.copy(copied / "train" / "red" / "00.png", copied / "val" / "red" / "renamed.png")
    data = open_folder(copied, (), 3, seed=0)
    shaped = [identify(data.train), identify(data.select)]
    with pytest.raises(InputError, match="val images were also used to make the model") as raised:
        require_disjoint(identify(data.val), shaped)
    assert "about 1 of 25" in str(raised.value.found)


def test_every_image_set_of_the_model_is_compared() -> None:
    judged = identify(whole(in_memory(5), "val"))
    strangers = identify(whole(in_memory(5, first=100)))
    require_disjoint(judged, [strangers])
    with pytest.raises(InputError, match="also used"):
        require_disjoint(judged, [strangers, dataclasses.replace(judged, role="select")])


@pytest.mark.parametrize(("train", "val", "shared"), [(1000, 1000, 500), (1500, 5, 5), (6000, 20, 20), (6000, 20, 1)])
def test_an_overlap_is_found_at_any_ratio_of_sizes(train: int, val: int, shared: int) -> None:
    images = in_memory(train + val)
    used = identify(Split("train", images, np.arange(train)))
    evaluated = identify(Split("val", images, np.arange(train - shared, train - shared + val)))
    with pytest.raises(InputError, match="also used"):
        require_disjoint(evaluated, [used])
    apart = identify(Split("val", images, np.arange(train, train + val)))
    require_disjoint(apart, [used])


def test_artifacts_of_earlier_versions_are_compared_by_their_smallest_digests() -> None:
    evaluated = identify(whole(in_memory(5), "val"))
    old = tuple(f"{prefix:016x}" for prefix in decode_members(evaluated.members).prefixes[:2])
    with pytest.raises(InputError, match="also used"):
        require_disjoint(evaluated, [ImageSet("train", 9, "1" * 64, old)])
    require_disjoint(evaluated, [ImageSet("train", 9, "1" * 64, ("0" * 16,))])


def test_an_empty_set_overlaps_nothing() -> None:
    require_disjoint(ImageSet("val", 0, "", ()), [ImageSet("train", 0, "", ())])
