"""Use no more than a number of images of a data set, for every choice and statistic."""

from __future__ import annotations

from dataclasses import replace

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.dataset import Dataset

# Of the images that may be used, those that choices are measured on.
_SELECT_SHARE = 8
_MIN_IMAGES = 16


def limit_images(data: Dataset, count: int, seed: int) -> Dataset:
    """The data set with at most `count` images in `train` and `select` together; `val` stays whole.

    Args:
        data: All images.
        count: How many may be used, at least 16.
        seed: Of the draw.

    Raises:
        InputError: `count` is too small.
    """
    if count < _MIN_IMAGES:
        raise InputError("too few images", found=f"--images {count}", fix=f"give at least {_MIN_IMAGES}")
    if len(data.train) + len(data.select) <= count:
        return data
    select = data.select.sample(count // _SELECT_SHARE, seed)
    return replace(data, train=data.train.sample(count - len(select), seed), select=select)
