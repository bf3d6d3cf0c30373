"""Which method makes the masks: the names a user may give, and what `auto` resolves to."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast, get_args

from maskplan.pipeline.core.choices import AUTO, DANHOFER2024, LAYERWISE, LEARNED, MAGNITUDE, MaskMethod
from maskplan.pipeline.core.errors import InputError

log = logging.getLogger(__name__)

METHODS: tuple[MaskMethod, ...] = get_args(MaskMethod)
DEPLOYABLE = tuple(method for method in METHODS if method != DANHOFER2024)
NEED_IMAGES = (LEARNED, LAYERWISE, DANHOFER2024)


def resolve_method(name: str, *, has_images: bool, synthetic: bool = False) -> MaskMethod:
    """The method to run: `auto` is learned masks where there are images to learn from, else magnitude masks.

    Args:
        name: `auto` or one of `METHODS`.
        has_images: Whether a dataset is given.
        synthetic: The images were made from the network: they are right for each layer alone, so `auto` is layer-wise.

    Raises:
        InputError: The method is unknown, or needs images and there are none.
    """
    require_known_method(name)
    if name == AUTO:
        if not has_images:
            log.warning(
                "no images: magnitude masks; give --data DIR for learned ones, or --synthetic-images N for layer-wise ones"
            )
            return MAGNITUDE
        return LAYERWISE if synthetic else LEARNED
    if name in NEED_IMAGES and not has_images:
        raise InputError(
            f"{name} masks need images", fix="give --data DIR with train/ and val/, or choose --masks magnitude"
        )
    return cast(MaskMethod, name)


def method_or_file(text: str) -> str | Path:
    """What `--masks` names: a method that can be deployed (or `auto`), else the path of a mask file.

    Raises:
        InputError: Neither a method nor a file, judged by its missing suffix.
    """
    known = (AUTO, *DEPLOYABLE)
    if text in known:
        return text
    path = Path(text)
    if not path.suffix and not path.exists():
        raise InputError(f"unknown mask method {text!r}", fix=f"choose one of {', '.join(known)}, or give a mask file")
    return path


def require_known_method(name: str) -> None:
    """Raise unless the name is `auto` or one of `METHODS`.

    Raises:
        InputError: Otherwise.
    """
    if name not in (AUTO, *METHODS):
        raise InputError(
            f"unknown mask method {name!r}", fix=f"choose one of {', '.join((AUTO, *METHODS))}, or give a mask file"
        )
