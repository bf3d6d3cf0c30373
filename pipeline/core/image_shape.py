"""The shape of one image of a model, where the graph leaves sizes open."""

from __future__ import annotations

from maskplan.pipeline.core.artifacts import TensorSpec
from maskplan.pipeline.core.errors import InputError


def image_shape(spec: TensorSpec, given: tuple[int, ...] | None, where: str) -> tuple[int, ...]:
    """The shape of one image: the graph's own, with the given sizes where it is dynamic.

    Args:
        spec: The input, batch first.
        given: All sizes without the batch, or only those that are dynamic; None if none are given.
        where: Name of the model in messages.

    Raises:
        InputError: Sizes are dynamic and none are given, or the given ones do not fit.
    """
    own = spec.shape[1:]
    found = f"{spec.name} {spec.shape}"
    if given is None:
        known = tuple(d for d in own if d is not None)
        if len(known) < len(own):
            raise InputError(
                "only the batch may be dynamic without a size",
                where=where,
                found=found,
                fix="give the size to run with --shape, for example --shape 3x224x224, or export with fixed image sizes",
            )
        return known
    if len(given) == sum(d is None for d in own):
        left = iter(given)
        given = tuple(next(left) if d is None else d for d in own)
    if len(given) != len(own) or any(d not in (None, size) for d, size in zip(own, given, strict=True)):
        raise InputError(
            f"--shape {'x'.join(map(str, given))} does not fit the model",
            where=where,
            found=found,
            fix="give the size of one input without the batch, such as 3x224x224",
        )
    return given
