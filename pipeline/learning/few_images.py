"""The learner's setting for few images, which replaces what was left at its default.

Few images say little through the network's outputs, and the same ones come again and again: the masks start from layer-wise
ones, are learned block by block first, then with the features inside matched besides the outputs, and every image is shifted
and mirrored anew each time.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.dataset import Dataset
from maskplan.pipeline.learning.options import LearnOptions

FEW_IMAGES = 8192
"""At most this many images are few."""

# Images that learning runs over in all, repetitions included, and evaluations on `select` during that time.
_SEEN, _EVALUATIONS = 120_000, 10
# A handful of images says nothing new after this many passes.
_MAX_EPOCHS = 400
# With a time budget, which then ends learning earlier.
_SEEN_IN_BUDGET = 200_000
_SETTING = {"match_features": 1.0, "match_blocks": 0.3, "augment": "shift+flip"}


def is_few(images: int | None) -> bool | None:
    """What `--images` says of the setting: None if it was not given, and for many images."""
    return True if images is not None and images <= FEW_IMAGES else None


def learns_from_few(few_images: bool | None, data: Dataset) -> bool:
    """Whether the setting applies: as asked, or by itself to few images."""
    return few_images if few_images is not None else len(data.train) + len(data.select) <= FEW_IMAGES


def require_images(data: Dataset) -> None:
    """Raise if there are too few images to learn from."""
    if len(data.train) < 2:
        raise InputError(
            "too few images to learn from",
            found=f"{len(data.train)} to learn from and {len(data.select)} to choose the masks by, besides those of val",
            fix="give at least two of the former, or choose layer-wise masks",
        )


def few_image_options(options: LearnOptions, images: int, set_in_recipe: Collection[str] = ()) -> LearnOptions:
    """The options for learning from few images.

    Args:
        options: The options otherwise; values that are not defaults stay.
        images: Number of training images.
        set_in_recipe: Names of options that stay too, though their values may be defaults.
    """
    default = LearnOptions()
    seen = _SEEN if options.budget_minutes is None else _SEEN_IN_BUDGET
    epochs = min(max(1, -(-seen // max(images, 1))), _MAX_EPOCHS)
    setting = {**_SETTING, "epochs": epochs, "judge_every": max(1, epochs // _EVALUATIONS)}
    changed = {
        k: v for k, v in setting.items() if k not in set_in_recipe and getattr(options, k) == getattr(default, k)
    }
    return replace(options, **changed)  # type: ignore[arg-type]
