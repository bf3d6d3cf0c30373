"""Whether the profiles of a build and the shapes of its graph go together."""

from __future__ import annotations

from collections.abc import Sequence

from maskplan.pipeline.core.artifacts import OnnxModel, Profile, TensorSpec
from maskplan.pipeline.core.errors import InputError, listed


def require_compatible_shapes(onnx_model: OnnxModel, profiles: Sequence[Profile]) -> None:
    """Raise unless the profiles fix every dynamic dimension of the graph and match its static ones.

    Raises:
        InputError: A dimension other than the batch is dynamic, or a profile has batches that the graph rejects.
    """
    problems = []
    has_batch = _has_dynamic_batch(onnx_model)
    for spec in onnx_model.inputs:
        if any(d is None for d in spec.shape[1:]):
            problems.append(f"{spec.name} is {spec.shape}: only the batch may be dynamic")
        # Beside an input with a dynamic batch, a fixed first dimension is no batch.
        batch = spec.shape[0] if spec.shape and not has_batch else None
        if batch is not None and (wrong := [p for p in profiles if p != Profile(batch, batch, batch)]):
            problems.append(f"{spec.name} has a fixed batch of {batch}, not {listed(wrong)}")
    if problems:
        raise InputError(
            "the graph cannot be built for these shapes",
            where=onnx_model.path,
            found="; ".join(problems),
            fix="export with fixed image sizes; omit --profile if the batch is fixed",
        )


def shape_of(onnx_model: OnnxModel, spec: TensorSpec, batch: int) -> tuple[int | None, ...]:
    """The shape of an input for a batch size of a profile; scalars and first dimensions that are no batch stay."""
    if not spec.shape or (spec.shape[0] is not None and _has_dynamic_batch(onnx_model)):
        return spec.shape
    return (batch, *spec.shape[1:])


def _has_dynamic_batch(onnx_model: OnnxModel) -> bool:
    return any(spec.shape[:1] == (None,) for spec in onnx_model.inputs)
