"""Replaces convolutions that compute their weight from parameters, such as standardized ones, by plain convolutions.

In evaluation mode the computed weight is a constant. A mask on the parameter would be lost when the weight is computed from
it; on the plain weight it holds.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.models.layers import sample_input

if TYPE_CHECKING:
    import torch
    from torch import nn

    from maskplan.pipeline.models.weight_uses import WeightUse

log = logging.getLogger(__name__)

_TOLERANCE = 1e-4


@dataclass
class _Calls:
    """Inputs and outputs of one module in the sample's forward pass."""

    inputs: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)


def fold_computed_weights(
    module: nn.Module, preprocessing: Preprocessing, only: Collection[str] | None = None
) -> tuple[str, ...]:
    """Replace such convolutions, in place, by modules of torch.nn that hold the computed weight.

    A convolution is replaced if it is a module without children, computes its weight from its own parameters and buffers
    only, returns the convolution's result, and the plain module reproduces it. Others stay; they cannot be masked.

    Args:
        module: The network, in evaluation mode, with the weights to use.
        preprocessing: Gives the size of an image.
        only: Names of the weights to replace, for a checkpoint that already contains them; all that can be, by default.

    Returns:
        The names of the new weights, in the order of the module.

    Raises:
        InputError: The forward pass fails, or a layer in `only` cannot be replaced.
    """
    import torch

    from maskplan.pipeline.models.layers import forward_error
    from maskplan.pipeline.models.weight_uses import run_recorded

    images = sample_input(preprocessing, 1)
    uses: Sequence[WeightUse]
    try:
        _, uses = run_recorded(module, images)
        candidates = _candidates(module, uses)
        if only is not None:
            candidates = [path for path in candidates if _weight_name(path) in only]
        if candidates:
            calls, uses = _run_with_calls(module, images, candidates)
    except Exception as error:  # the model's own code may raise anything
        raise forward_error(module, preprocessing, error) from error
    plain = {}
    for path in candidates:
        own = [u for u in uses if u.inside == path and u.operator == "convolution"]
        with torch.no_grad():
            layer = _plain_convolution(calls[path], own)
        if layer is not None:
            plain[path] = layer
    _replace(module, plain)
    names = tuple(_weight_name(path) for path in plain)
    missing = [name for name in only or () if name not in names]
    if missing:
        raise InputError(
            "the checkpoint stores computed weights that the model does not compute",
            found=f"{len(missing)}: {listed(missing)}",
            fix="give the model that the checkpoint was made from",
        )
    return names


def fold_computed_with_note(module: nn.Module, preprocessing: Preprocessing, name: str) -> tuple[str, ...]:
    """As `fold_computed_weights`, with a line in the log."""
    names = fold_computed_weights(module, preprocessing)
    if names:
        log.info(
            "%s: %d convolutions compute their weights (as weight standardization does): folded into plain weights: %s",
            name,
            len(names),
            listed(names),
        )
    return names


def _weight_name(path: str) -> str:
    return f"{path}.weight"


def _candidates(module: nn.Module, uses: Sequence[WeightUse]) -> list[str]:
    """Paths of the modules without children that use computed weights of their own, which nothing else uses."""
    modules = dict(module.named_modules())
    # All names of a tensor: a tied parameter is not a module's own.
    owners: dict[str, set[str | None]] = {}
    for use in uses:
        for name in use.names:
            owners.setdefault(name, set()).add(use.inside)
    candidates = []
    for path in dict.fromkeys(u.inside for u in uses if not u.is_stored and u.operator == "convolution"):
        if not path:
            continue
        own = {f"{path}.{n}" for n, _ in modules[path].named_parameters()}
        inside = [u for u in uses if u.inside == path]
        reads_own = all(u.names <= own for u in inside)
        if reads_own and all(owners[n] == {path} for u in inside for n in u.names):
            candidates.append(path)
    return candidates


def _run_with_calls(
    module: nn.Module, images: torch.Tensor, paths: Collection[str]
) -> tuple[dict[str, _Calls], Sequence[WeightUse]]:
    import torch

    from maskplan.pipeline.models.weight_uses import run_recorded

    calls: dict[str, _Calls] = {path: _Calls() for path in paths}

    def record(path: str) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            if len(inputs) == 1 and isinstance(inputs[0], torch.Tensor) and isinstance(output, torch.Tensor):
                # Copies: activations may be changed in place afterwards.
                calls[path].inputs.append(inputs[0].clone())
                calls[path].outputs.append(output.clone())

        return hook

    hooks = [m.register_forward_hook(record(path)) for path, m in module.named_modules() if path in calls]
    try:
        _, uses = run_recorded(module, images, keep_tensors=True)
    finally:
        for hook in hooks:
            hook.remove()
    return calls, uses


def _plain_convolution(calls: _Calls, uses: Sequence[WeightUse]) -> nn.Module | None:
    """A convolution of torch.nn with the same result for every call; None if there is none."""
    import torch
    from torch import nn

    if not uses or len(uses) != len(calls.inputs):
        return None
    x, weight, bias, stride, padding, dilation, transposed, _, groups = uses[0].arguments
    if transposed or any(not torch.equal(weight, use.arguments[1]) for use in uses[1:]):
        return None
    kinds: dict[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
    filters, channels = weight.shape[0], weight.shape[1] * groups
    layer: Any = kinds[weight.ndim](
        channels,
        filters,
        tuple(weight.shape[2:]),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        bias is not None,
    )
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    added = _padding_before(calls.inputs[0], x)
    if added is None:
        return None
    if any(added):
        # Explicit zeros around the input, which may differ between the sides.
        layer.padding_mode = "constant"
        own = [p for p in reversed(padding) for _ in range(2)]
        layer._reversed_padding_repeated_twice = [a + b for a, b in zip(added, own, strict=True)]
    layer.eval()
    for inputs, outputs in zip(calls.inputs, calls.outputs, strict=True):
        result = layer(inputs)
        if result.shape != outputs.shape or not torch.allclose(result, outputs, _TOLERANCE, _TOLERANCE):
            return None
    return layer  # type: ignore[no-any-return]


def _padding_before(inputs: torch.Tensor, padded: torch.Tensor) -> list[int] | None:
    """Zeros that a module adds around its input before it convolves, as `torch.nn.functional.pad` takes them."""
    import torch

    if inputs.shape[:2] != padded.shape[:2] or inputs.ndim != padded.ndim:
        return None
    extra = [b - a for a, b in zip(inputs.shape[2:], padded.shape[2:], strict=True)]
    if any(e < 0 for e in extra):
        return None
    # TensorFlow's "same" padding puts the odd pixel at the end.
    sides = [(e // 2, e - e // 2) for e in extra]
    pads = [p for pair in reversed(sides) for p in pair]
    return pads if torch.equal(torch.nn.functional.pad(inputs, pads), padded) else None


def _replace(module: nn.Module, plain: dict[str, nn.Module]) -> None:
    modules = dict(module.named_modules(remove_duplicate=False))
    replaced = {id(modules[path]): layer for path, layer in plain.items()}
    for path, old in modules.items():
        if path and id(old) in replaced:
            parent, _, name = path.rpartition(".")
            setattr(modules[parent], name, replaced[id(old)])
