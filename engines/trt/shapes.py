"""Whether the profiles of a build and the shapes of its graph go together, and the shapes of each profile."""

from __future__ import annotations

from collections.abc import Sequence

from maskplan.pipeline.core.artifacts import OnnxModel, Profile, ShapeRange, TensorSpec
from maskplan.pipeline.core.errors import InputError, listed

Shape = tuple[int | None, ...]


def require_compatible_shapes(onnx_model: OnnxModel, profiles: Sequence[Profile]) -> None:
    """Raise unless the profiles fix every dynamic dimension of the graph and match its static ones.

    Raises:
        InputError: A profile lacks the size of an input, or has shapes or batches that the graph rejects.
    """
    problems = []
    has_batch = _has_dynamic_batch(onnx_model)
    names = {spec.name for spec in onnx_model.inputs}
    problems += [f"no input is called {r.name!r}" for p in profiles for r in p.shapes if r.name not in names]
    for spec in onnx_model.inputs:
        ranges = [_range_of(profile, spec) for profile in profiles]
        if any(d is None for d in spec.shape[1:]) and (not ranges or None in ranges):
            problems.append(
                f"{spec.name} is {spec.shape}: only the batch may be dynamic where no profile has its shapes"
            )
        for found in ranges:
            if found is not None and not all(_fits(spec.shape, s) for s in (found.min, found.opt, found.max)):
                problems.append(f"{spec.name} is {spec.shape}, which {found} does not fit")
        # Beside an input with a dynamic batch, a fixed first dimension is no batch.
        batch = spec.shape[0] if spec.shape and not has_batch else None
        wrong = [p for p in profiles if not p.shapes and p != Profile(batch or 0, batch or 0, batch or 0)]
        if batch is not None and wrong:
            problems.append(f"{spec.name} has a fixed batch of {batch}, not {listed(wrong)}")
    if problems:
        raise InputError(
            "the graph cannot be built for these shapes",
            where=onnx_model.path,
            found="; ".join(problems),
            fix=_fix(onnx_model),
        )


def shapes_of(onnx_model: OnnxModel, spec: TensorSpec, profile: Profile) -> tuple[Shape, Shape, Shape]:
    """The smallest, tuned and largest shape of an input; scalars and first dimensions that are no batch stay."""
    found = _range_of(profile, spec)
    if found is not None:
        return found.min, found.opt, found.max
    if not spec.shape or (spec.shape[0] is not None and _has_dynamic_batch(onnx_model)):
        return spec.shape, spec.shape, spec.shape
    rest = spec.shape[1:]
    return (profile.min, *rest), (profile.opt, *rest), (profile.max, *rest)


def dynamic_inputs(onnx_model: OnnxModel) -> list[TensorSpec]:
    """The inputs that need shapes in a profile."""
    return [spec for spec in onnx_model.inputs if None in spec.shape]


def _range_of(profile: Profile, spec: TensorSpec) -> ShapeRange | None:
    return next((r for r in profile.shapes if r.name == spec.name), None)


def _fits(shape: Shape, given: tuple[int, ...]) -> bool:
    return len(shape) == len(given) and all(d in (None, size) for d, size in zip(shape, given, strict=True))


def _fix(onnx_model: OnnxModel) -> str:
    spec = next((s for s in onnx_model.inputs if None in s.shape[1:]), None)
    if spec is None:
        return "omit --profile if the batch is fixed"
    shape = "x".join(str(d or (224 if i else 1)) for i, d in enumerate(spec.shape))
    example = f"--profile {spec.name}:{shape}:{shape}:{shape}"
    return f"give the smallest, tuned and largest shape, such as {example}, or export with fixed sizes"


def _has_dynamic_batch(onnx_model: OnnxModel) -> bool:
    return any(spec.shape[:1] == (None,) for spec in onnx_model.inputs)
