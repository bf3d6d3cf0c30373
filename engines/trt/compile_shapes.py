"""The shapes that a file of any tool is compiled for: the batches of its profiles, and all other sizes fixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from maskplan.pipeline.core.artifacts import OnnxModel, Profile, TensorSpec
from maskplan.pipeline.core.errors import InputError, listed

DEFAULT_PROFILE = Profile(1, 8, 8)
"""For a dynamic batch, where no other is asked for."""


def fix_shapes(
    onnx_model: OnnxModel, profiles: Sequence[Profile], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[OnnxModel, tuple[Profile, ...]]:
    """The graph with only those inputs that need a profile, all their sizes fixed but the batch; and the profiles.

    Args:
        onnx_model: The graph.
        profiles: Ranges of batch sizes; by default that of `shapes`, or else `DEFAULT_PROFILE`.
        shapes: Whole shapes of inputs, by name; for those that are dynamic in more than the batch.

    Raises:
        InputError: Shapes are missing or do not fit, or the batch is fixed to another size than that of a profile.
    """
    names = {spec.name for spec in onnx_model.inputs}
    problems = [f"no input is called {name!r}" for name in shapes if name not in names]
    inputs = []
    for spec in onnx_model.inputs:
        shape = spec.shape
        given = shapes.get(spec.name)
        if given is not None and not _fits(shape, given):
            problems.append(f"{spec.name} is {_text(spec)}, which --shape {spec.name}:{_joined(given)} does not fit")
        elif given is not None:
            shape = (shape[0], *given[1:])
        elif None in shape[1:]:
            problems.append(f"{spec.name} is {_text(spec)}, and more than its batch is dynamic")
        inputs.append(replace(spec, shape=shape))
    if problems:
        raise InputError(
            "the graph cannot be compiled for these shapes",
            where=onnx_model.path,
            found=listed(problems),
            fix=f"give a shape that fits, such as --shape {_example(onnx_model)}",
        )
    dynamic = tuple(spec for spec in inputs if spec.shape and spec.shape[0] is None)
    if dynamic:
        batches = dict.fromkeys(shapes[spec.name][0] for spec in dynamic if spec.name in shapes)
        chosen = tuple(profiles) or tuple(Profile(b, b, b) for b in batches) or (DEFAULT_PROFILE,)
    else:
        chosen = ()
        _require_fixed_batch(onnx_model, profiles)
    return replace(onnx_model, inputs=dynamic), chosen


def _require_fixed_batch(onnx_model: OnnxModel, profiles: Sequence[Profile]) -> None:
    batches = {spec.shape[0] for spec in onnx_model.inputs if spec.shape and spec.shape[0] is not None}
    wrong = [p for p in profiles if not any(p == Profile(b, b, b) for b in batches)]
    if wrong:
        raise InputError(
            "the profile does not fit the graph",
            where=onnx_model.path,
            found=f"a fixed batch of {listed(sorted(batches)) or 'none'}, not {listed(wrong)}",
            fix="omit --profile, or export the graph with a dynamic batch",
        )


def _fits(shape: tuple[int | None, ...], given: tuple[int, ...]) -> bool:
    return len(shape) == len(given) and all(d in (None, size) for d, size in zip(shape, given, strict=True))


def _text(spec: TensorSpec) -> str:
    return "x".join("?" if d is None else str(d) for d in spec.shape) or "a scalar"


def _joined(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _example(onnx_model: OnnxModel) -> str:
    """A shape that fits the first input with dynamic sizes."""
    dynamic = (spec for spec in onnx_model.inputs if None in spec.shape)
    spec = next(iter(sorted(dynamic, key=lambda s: None not in s.shape[1:])), None)
    if spec is None:
        return "NAME:1x3x224x224"
    return f"{spec.name}:{_joined([d if d is not None else 224 if i else 1 for i, d in enumerate(spec.shape)])}"
