"""Which of the eligible layers get a mask: by default the convolutions except the stem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from maskplan.pipeline.core.artifacts import DenseLayer, Layer, Pattern
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.masking.eligibility import FEW_OUTPUTS, FIXED, MIN_OUTPUTS, ineligible_reason

STEM, LINEAR, UNUSED = "stem", "linear", "not_used_in_inference"
NARROW, NOT_NAMED, TOO_COSTLY = "fewer_channels_than_asked", "not_named", "costs_too_much_accuracy"
OUTPUTS, COMPUTED = "output_channels_not_in_tiles", "weight_is_computed"


@dataclass(frozen=True)
class LayerPolicy:
    """Which of the eligible layers to mask.

    Attributes:
        include_linear: Mask linear layers too, including the head.
        names: Name patterns (`layer3.*`) of weights or their modules; empty means all layers.
        min_channels: Leave convolutions with fewer input channels dense.
        transposable: Leave layers dense whose output channels are not a multiple of M.
    """

    include_linear: bool = False
    names: tuple[str, ...] = ()
    min_channels: int = 0
    transposable: bool = False


@dataclass(frozen=True)
class Selection:
    """The layers to mask and the layers that stay dense, each in the order of the forward pass."""

    masked: tuple[Layer, ...]
    dense: tuple[DenseLayer, ...]


_DEFAULT = LayerPolicy()


def select_layers(layers: Sequence[Layer], pattern: Pattern, policy: LayerPolicy = _DEFAULT) -> Selection:
    """Split a model's layers: every eligible convolution except the stem is masked.

    The stem (the first convolution) has few input channels and costs the most accuracy; linear layers are usually the
    head. The stem is never masked, linear layers only if the policy says so; ineligible layers stay dense by necessity, and
    so do layers whose operator reads a value that is computed from the weight: computing makes zeros dense. Convolutions
    with fewer than four outputs and weights that are tables stay dense too.

    Args:
        layers: All layers of the model, in any order.
        pattern: N:M; its M decides which layers are eligible.
        policy: Which eligible layers to mask.

    Raises:
        InputError: No layer is left to mask, or a name pattern matches no layer.
    """
    _require_matches(layers, policy.names)
    convolutions = [layer for layer in layers if layer.op == "Conv" and layer.position is not None]
    stem = min(convolutions, key=lambda layer: layer.position or 0, default=None)
    masked: list[Layer] = []
    dense: list[DenseLayer] = []
    for layer in sorted(layers, key=lambda layer: (layer.position is None, layer.position or 0)):
        reason = ineligible_reason(layer.op, layer.shape[1], layer.groups, pattern.m)
        if reason is None and layer.position is None:
            reason = UNUSED
        elif reason is None and layer.computed:
            reason = COMPUTED
        elif reason is None and layer.op == "Conv" and layer.shape[0] < MIN_OUTPUTS:
            reason = FEW_OUTPUTS
        elif reason is None and layer.fixed:
            reason = FIXED
        elif reason is None and layer.op != "Conv" and not policy.include_linear:
            reason = LINEAR
        elif reason is None and layer is stem:
            reason = STEM
        elif reason is None and policy.names and not any(_matches(layer, name) for name in policy.names):
            reason = NOT_NAMED
        elif reason is None and layer.shape[1] < policy.min_channels:
            reason = NARROW
        elif reason is None and policy.transposable and layer.shape[0] % pattern.m:
            reason = OUTPUTS
        if reason is None:
            masked.append(layer)
        else:
            dense.append(DenseLayer(layer.name, layer.shape, layer.macs, reason))
    if not masked:
        channels = "input and output channels" if policy.transposable else "input channels"
        raise InputError(
            f"no layer of the model can be masked {pattern}",
            found=listed(f"{d.name} {d.shape} ({d.reason})" for d in dense) or "no convolution and no linear layer",
            fix=f"masks need ungrouped convolutions after the first one, with {channels} in multiples of {pattern.m}",
        )
    return Selection(tuple(masked), tuple(dense))


def _matches(layer: Layer, pattern: str) -> bool:
    """Whether a pattern matches the weight's name, or that of its module."""
    return fnmatchcase(layer.name, pattern) or fnmatchcase(layer.name.rpartition(".")[0], pattern)


def _require_matches(layers: Sequence[Layer], patterns: Sequence[str]) -> None:
    unmatched = [p for p in patterns if not any(_matches(layer, p) for layer in layers)]
    if unmatched:
        raise InputError(
            "no layer has such a name",
            found=listed(unmatched),
            fix=f"choose from: {listed((layer.name for layer in layers), 10)}",
        )
