"""Images to tensors, against torchvision's transforms."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms.functional import InterpolationMode

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.data.preprocessing import (
    DECODE_ERRORS,
    IMAGENET,
    INTERPOLATIONS,
    decode,
    inspect_image,
    normalize,
    preprocessing_from_transforms,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(seed: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(pixels)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reference(data: bytes, preprocessing: Preprocessing) -> torch.Tensor:
    """The same with torchvision: (channels, H, W) float32."""
    image = Image.open(io.BytesIO(data)).convert("RGB" if preprocessing.channels == 3 else "L")
    mode = InterpolationMode(preprocessing.interpolation)
    steps: list[Any] = [T.Resize((preprocessing.height, preprocessing.width), mode)]
    if preprocessing.resize:
        steps = [T.Resize(preprocessing.resize, mode), T.CenterCrop((preprocessing.height, preprocessing.width))]
    return T.Compose([*steps, T.ToTensor(), T.Normalize(preprocessing.mean, preprocessing.std)])(image)


def ours(data: bytes, preprocessing: Preprocessing) -> np.ndarray[Any, np.dtype[np.float32]]:
    return normalize(decode(data, preprocessing)[None], preprocessing)[0]


def record(channels: int, height: int, width: int, resize: int, interpolation: str = "bilinear") -> Preprocessing:
    return Preprocessing(channels, height, width, resize, interpolation, MEAN[:channels], STD[:channels])


sizes = st.integers(3, 40)


@given(
    seed=st.integers(0, 99),
    size=st.tuples(sizes, sizes),
    mode=st.sampled_from(["RGB", "L", "RGBA", "P"]),
    channels=st.sampled_from([1, 3]),
    crop=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    resize=st.one_of(st.just(0), st.integers(0, 16)),
    interpolation=st.sampled_from(INTERPOLATIONS),
)
@settings(max_examples=150, deadline=None)
def test_an_image_becomes_what_torchvision_makes_of_it(
    seed: int,
    size: tuple[int, int],
    mode: str,
    channels: int,
    crop: tuple[int, int],
    resize: int,
    interpolation: str,
) -> None:
    how = record(channels, *crop, resize and max(crop) + resize, interpolation)
    data = file_of(picture(seed, *size, mode))
    assert np.array_equal(ours(data, how), reference(data, how).numpy())


@given(size=st.tuples(sizes, sizes), crop=st.tuples(st.integers(1, 30), st.integers(1, 30)), resize=st.integers(2, 20))
@settings(max_examples=100, deadline=None)
def test_a_crop_larger_than_the_image_is_filled_as_torchvision_fills_it(
    size: tuple[int, int], crop: tuple[int, int], resize: int
) -> None:
    how = record(3, *crop, resize)
    data = file_of(picture(0, *size))
    assert np.array_equal(ours(data, how), reference(data, how).numpy())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM"])
def test_common_formats_are_read(kind: str) -> None:
    data = file_of(picture(1, 30, 20), kind)
    how = record(3, 16, 16, 18)
    assert np.array_equal(ours(data, how), reference(data, how).numpy())


def test_every_torchvision_preset_is_reproduced() -> None:
    """Each classification model's own transforms, on one image that is neither square nor even."""
    data = file_of(picture(2, 301, 260))
    image = Image.open(io.BytesIO(data))
    seen = set()
    for name in torchvision.models.list_models(module=torchvision.models):
        preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        how = preprocessing_from_transforms(preset)
        if how in seen:
            continue
        seen.add(how)
        assert np.array_equal(ours(data, how), preset(image).numpy()), name
    assert len(seen) > 10


def test_a_palette_with_transparency_is_read_without_a_warning() -> None:
    """Pillow would have it converted to RGBA first; the colors are the same."""
    palette = picture(5, 12, 10, "RGBA").quantize(8)
    assert isinstance(Image.open(io.BytesIO(file_of(palette))).info["transparency"], bytes)
    expected = np.asarray(palette.convert("RGBA"))[..., :3]
    assert np.array_equal(decode(file_of(palette), record(3, 10, 12, 0)), expected)


def test_grey_input_of_a_color_image_has_one_channel() -> None:
    assert decode(file_of(picture(0, 9, 7)), record(1, 5, 6, 0)).shape == (5, 6, 1)


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    image = picture(3, 12, 10)
    assert np.array_equal(decode(file_of(image), record(3, 10, 12, 0, "bicubic")), np.asarray(image))


def test_normalizing_a_batch_is_normalizing_each_image() -> None:
    how = record(3, 4, 5, 0)
    batch = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    done = normalize(batch, how)
    assert done.shape == (3, 3, 4, 5)
    assert done.dtype == np.float32
    assert done.flags.c_contiguous
    for n, y, x, c in np.ndindex(*batch.shape):
        assert done[n, c, y, x] == pytest.approx((batch[n, y, x, c] / 255 - MEAN[c]) / STD[c], abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("BMP", {}), ("PPM", {}), ("WEBP", {})],
    ids=str,
)
def test_a_file_is_whole_only_if_it_decodes(kind: str, options: dict[str, Any]) -> None:
    data = file_of(picture(4, 33, 47), kind, **options)
    assert inspect_image(data) is not None
    for length in range(0, len(data), len(data) // 150):
        if inspect_image(data[:length]) is not None:
            decode(data[:length], IMAGENET)
    for share in (0.2, 0.5, 0.9):
        assert inspect_image(data[: int(share * len(data))]) is None


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"P6 4 4 255\n12"])
def test_what_is_no_image_is_not_whole_and_does_not_decode(data: bytes) -> None:
    assert inspect_image(data) is None
    with pytest.raises(DECODE_ERRORS):
        decode(data, IMAGENET)
