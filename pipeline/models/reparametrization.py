"""Folds reparametrized weights into plain ones: weight and spectral normalization, pruning masks, of modules and of files.

A plain weight is what the operators of a network in evaluation mode see; masks, permutations and exports work on it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from maskplan.pipeline.core.errors import InputError, listed

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)

WEIGHT_NORM, SPECTRAL_NORM, PRUNING, ASP = "weight_norm", "spectral_norm", "torch.nn.utils.prune", "ASP"


@dataclass
class FoldedState:
    """A file's tensors with plain weights.

    Attributes:
        tensors: By key.
        masks: The bool masks that were applied, by the weight's key, each shaped like its weight.
        folded: How many weights were folded, by kind.
    """

    tensors: dict[str, torch.Tensor]
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    folded: Counter[str] = field(default_factory=Counter)


def is_reparametrized(module: nn.Module) -> bool:
    """Whether a weight in the module is computed by a parametrization or a hook of PyTorch."""
    from torch.nn.utils.parametrize import is_parametrized

    return any(is_parametrized(m) or _weight_hooks(m) for m in module.modules())


def fold_module(module: nn.Module) -> Counter[str]:
    """Replace parametrizations, weight hooks and pruning of a module, in place, by the plain tensors that they compute.

    Returns:
        How many tensors were folded, by kind.

    Raises:
        InputError: A parametrization cannot be evaluated.
    """
    from torch.nn.utils import parametrize

    folded: Counter[str] = Counter()
    module.eval()
    for path, layer in module.named_modules():
        for hook, kind in _weight_hooks(layer):
            _remove_hook(layer, hook)
            folded[kind] += 1
        if parametrize.is_parametrized(layer):
            parametrizations = layer.parametrizations
            for name in list(parametrizations):
                kinds = [type(p).__name__.lstrip("_") for p in parametrizations[name]]
                try:
                    parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
                except Exception as error:  # a parametrization's own code may raise anything
                    raise InputError(
                        "a parametrized weight cannot be folded into a plain one",
                        where=f"{path}.{name}" if path else name,
                        found=f"{', '.join(kinds)}: {type(error).__name__}: {str(error).partition(chr(10))[0]}",
                        fix="remove the parametrization in the factory: torch.nn.utils.parametrize.remove_parametrizations",
                    ) from error
                folded[", ".join(_KIND_OF_CLASS.get(k, k) for k in kinds)] += 1
    _drop_asp_buffers(module, folded)
    return folded


_KIND_OF_CLASS = {"WeightNorm": WEIGHT_NORM, "SpectralNorm": SPECTRAL_NORM}


def _weight_hooks(layer: nn.Module) -> list[tuple[object, str]]:
    """Old-style hooks that compute a tensor before each forward pass."""
    from torch.nn.utils.prune import BasePruningMethod
    from torch.nn.utils.spectral_norm import SpectralNorm
    from torch.nn.utils.weight_norm import WeightNorm

    # Pruning first: the tensors that a normalization reads may be pruned.
    kinds = ((BasePruningMethod, PRUNING), (WeightNorm, WEIGHT_NORM), (SpectralNorm, SPECTRAL_NORM))
    return [(h, kind) for cls, kind in kinds for h in layer._forward_pre_hooks.values() if isinstance(h, cls)]


def _remove_hook(layer: nn.Module, hook: object) -> None:
    import torch
    from torch.nn.utils import remove_spectral_norm, remove_weight_norm
    from torch.nn.utils.prune import BasePruningMethod, remove
    from torch.nn.utils.spectral_norm import SpectralNormLoadStateDictPreHook
    from torch.nn.utils.weight_norm import WeightNorm

    if isinstance(hook, BasePruningMethod):
        name = hook._tensor_name
        mask, original = getattr(layer, f"{name}_mask").bool(), getattr(layer, f"{name}_orig").detach()
        remove(layer, name)  # type: ignore[no-untyped-call]
        # PyTorch multiplies, which turns negative weights into -0.0.
        getattr(layer, name).data = torch.where(mask, original, torch.zeros((), dtype=original.dtype))
    elif isinstance(hook, WeightNorm):
        remove_weight_norm(layer, hook.name)
    else:
        remove_spectral_norm(layer, hook.name)  # type: ignore[attr-defined]
        # PyTorch looks for its own hook on loading, but not for the object in which it wraps it.
        for key, wrapped in list(layer._load_state_dict_pre_hooks.items()):
            if isinstance(getattr(wrapped, "hook", wrapped), SpectralNormLoadStateDictPreHook):
                del layer._load_state_dict_pre_hooks[key]


def _drop_asp_buffers(module: nn.Module, folded: Counter[str]) -> None:
    """Apply and remove the mask buffers that Apex ASP adds to layers."""
    import torch

    for layer in module.modules():
        for buffer in [n for n in layer._buffers if n.startswith("__") and n.endswith(("_mma_mask", "_mma_pruned_p"))]:
            name = buffer.removeprefix("__").removesuffix("_mma_mask")
            mask, weight = layer._buffers.pop(buffer), layer._parameters.get(name)
            if mask is not None and weight is not None:
                with torch.no_grad():
                    weight.masked_fill_(~mask.bool(), 0.0)
                folded[ASP] += 1


def fold_state(state: Mapping[str, torch.Tensor]) -> FoldedState:
    """Replace the tensors of reparametrizations in a state dict by the plain weights that they describe.

    Tensors that belong to no known kind are kept. In evaluation mode the result is what the reparametrized module computes.
    """
    result = FoldedState(dict(state))
    for name in state:
        if name.endswith("_orig") and f"{name.removesuffix('_orig')}_mask" in state:
            _fold_pruned(result, name.removesuffix("_orig"))
    # After pruning: normalizations may have been pruned too, which then leaves their own keys.
    present = dict.fromkeys(result.tensors)
    for name in present:
        base, _, last = name.rpartition(".")
        dot = f"{base}." if base else ""
        if name.endswith("_g") and f"{name.removesuffix('_g')}_v" in present:
            plain = name.removesuffix("_g")
            _fold_weight_norm(result, plain, name, f"{plain}_v")
        elif last == "original0" and f"{dot}original1" in present:
            _fold_weight_norm(result, _plain_name(base), name, f"{dot}original1")
        elif name.endswith("_orig") and f"{name.removesuffix('_orig')}_u" in present:
            plain = name.removesuffix("_orig")
            _fold_spectral_norm(result, plain, name, f"{plain}_u", f"{plain}_v")
        elif last == "original" and f"{dot}0._u" in present and not any(k.startswith(f"{dot}1.") for k in present):
            _fold_spectral_norm(result, _plain_name(base), name, f"{dot}0._u", f"{dot}0._v")
        elif last.startswith("__") and last.endswith("_mma_mask"):
            _fold_asp(result, name, dot + last.removeprefix("__").removesuffix("_mma_mask"))
        elif last.startswith("__") and last.endswith("_mma_pruned_p"):
            result.tensors.pop(name)
    return result


def describe_folded(folded: Mapping[str, int]) -> str:
    """Counts for a log line."""
    return listed(f"{count} of {kind}" for kind, count in sorted(folded.items()))


def _plain_name(base: str) -> str:
    """`layer.parametrizations.weight` -> `layer.weight`."""
    path, _, name = base.rpartition(".")
    return f"{path.removesuffix('parametrizations')}{name}"


def _fold_pruned(result: FoldedState, name: str) -> None:
    import torch

    original, mask = result.tensors.pop(f"{name}_orig"), result.tensors.pop(f"{name}_mask").bool()
    result.tensors[name] = torch.where(mask, original, torch.zeros((), dtype=original.dtype))
    result.masks[name] = mask
    result.folded[PRUNING] += 1


def _fold_asp(result: FoldedState, buffer: str, name: str) -> None:
    import torch

    weight = result.tensors.get(name)
    mask = result.tensors.pop(buffer).bool()
    if weight is not None and weight.shape == mask.shape:
        result.tensors[name] = torch.where(mask, weight, torch.zeros((), dtype=weight.dtype))
        result.masks[name] = mask
        result.folded[ASP] += 1


def _fold_weight_norm(result: FoldedState, name: str, length: str, direction: str) -> None:
    """W = g * v / |v|, with one g for each index along the axis in which g has a length, or one for all."""
    import torch

    g, v = result.tensors[length], result.tensors[direction]
    if g.ndim not in (0, v.ndim):
        return
    axes = [axis for axis, size in enumerate(g.shape) if size != 1 or v.shape[axis] == 1]
    axis = -1 if g.ndim == 0 else max(axes, key=lambda a: g.shape[a], default=None)
    if axis is None or (g.ndim and g.shape[axis] != v.shape[axis]):
        return
    precise = torch.float32 if v.dtype in (torch.float16, torch.bfloat16) else v.dtype
    del result.tensors[length], result.tensors[direction]
    result.tensors[name] = torch._weight_norm(v.to(precise).contiguous(), g.to(precise), axis)
    result.folded[WEIGHT_NORM] += 1


def _fold_spectral_norm(result: FoldedState, name: str, original: str, left: str, right: str) -> None:
    """W / sigma, where u and v are the singular vectors for sigma = u^T W v that the checkpoint contains."""
    import torch
    from torch.nn import functional as F

    weight, u, v = result.tensors[original].float(), result.tensors[left].float(), result.tensors.get(right)
    sigmas = []
    for axis in range(weight.ndim):
        matrix = weight.movedim(axis, 0).flatten(1)
        if matrix.shape[0] == len(u) and (v is None or matrix.shape[1] == len(v)):
            # Very old checkpoints have no v.
            vector = F.normalize(matrix.T @ u, dim=0) if v is None else v.float()
            sigmas.append(torch.dot(u, matrix @ vector))
    if not sigmas:
        return
    for key in (original, left, right):
        result.tensors.pop(key, None)
    # A transposed convolution is normalized along its second axis; the right axis has the larger product.
    result.tensors[name] = weight / max(sigmas, key=lambda s: abs(float(s)))
    result.folded[SPECTRAL_NORM] += 1
