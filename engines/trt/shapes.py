"""Whether the profiles of a build and the shapes of its graph go together."""

from __future__ import annotations

from collections.abc import Sequence

from maskplan.pipeline.core.artifacts import OnnxModel, Profile
from maskplan.pipeline.core.errors import InputError, listed


def require_compatible_shapes(onnx_model: OnnxModel, profiles: Sequence[Profile]) -> None:
    """Raise unless the profiles fix every dynamic dimension of the graph and match its static ones.

    Raises:
        InputError: A dimension other than the batch is dynamic, or a profile has batches that the graph rejects.
    """
    problems = []
    for spec in onnx_model.inputs:
        if any(d is None for d in spec.shape[1:]):
            problems.append(f"{spec.name} is {spec.shape}: only the batch may be dynamic")
        batch = spec.shape[0] if spec.shape else None
        if batch is not None and (wrong := [p for p in profiles if p != Profile(batch, batch, batch)]):
            problems.append(f"{spec.name} has a fixed batch of {batch}, not {listed(wrong)}")
    if problems:
        raise InputError(
            "TensorRT cannot build the graph for these shapes",
            where=onnx_model.path,
            found="; ".join(problems),
            fix="export with fixed image sizes; omit --profile if the batch is fixed",
        )
