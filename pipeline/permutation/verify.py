"""Check that a permuted network computes the same function, judged well below any error that a misread operator causes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.models.layers import sample_input
from maskplan.pipeline.models.module_outputs import named_tensors
from maskplan.pipeline.permutation.apply import Move, permuted_state
from maskplan.pipeline.permutation.groups import Group

if TYPE_CHECKING:
    import torch
    from torch import nn

# Differences of outputs that another order of summation explains, as a share of how far the outputs of two images differ and
# of the largest output. Ill-conditioned networks, such as EfficientNetV2 with wide statistics, multiply the rounding of
# float64 (1e-16) by up to 1e6.
_OF_SPREAD, _OF_LARGEST = 1e-6, 1e-10
# The same for networks that compute in a shorter type whatever their weights' type is: a share of the largest output, and
# rounding steps of the type.
_SHORT_TYPE, _ROUNDINGS = 1e-3, 16


@dataclass(frozen=True)
class OutputChange:
    """How far a permutation moves the outputs on noise.

    Attributes:
        difference: Largest difference, as a share of the largest output.
        tolerance: The largest difference that rounding explains, in the same unit.
    """

    difference: float
    tolerance: float

    @property
    def is_rounding(self) -> bool:
        """Whether rounding explains the difference; False for NaN."""
        return self.difference <= self.tolerance


def shuffled_change(
    module: nn.Module, groups: Sequence[Group], preprocessing: Preprocessing, seed: int = 0
) -> OutputChange:
    """The change of the outputs when all groups are shuffled at random, which finds misread operators before a search."""
    rng = np.random.default_rng(seed)
    moves = [Move(group, rng.permutation(group.size)) for group in groups]
    return output_change(module, permuted_state(module.state_dict(), moves), preprocessing)


def output_change(module: nn.Module, state: Mapping[str, torch.Tensor], preprocessing: Preprocessing) -> OutputChange:
    """Compare a module's outputs with those for another state dict, in float64 where the module allows it.

    Args:
        module: It does not change, but for evaluation mode.
        state: A full state dict of the module.
        preprocessing: Gives the size of an image.
    """
    import torch

    sample = sample_input(preprocessing, 2)
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    if first is not None:
        sample = sample.to(first)
    module.eval()
    if isinstance(module, torch.nn.DataParallel):  # which functional_call refuses
        module, state = module.module, {name.removeprefix("module."): tensor for name, tensor in state.items()}
    own = module.state_dict()
    with torch.no_grad():
        try:
            with _result_types() as types:
                before, after = (_outputs(module, each, sample, torch.float64) for each in (own, state))
        except RuntimeError:  # a type that the module's code insists on
            types = {sample.dtype}
            before, after = (_outputs(module, each, sample, None) for each in (own, state))
    types |= {each.dtype for each in before.values() if each.is_floating_point()}
    step = max((torch.finfo(each).eps for each in types), default=0.0)
    changes = [_change(values, after[name], step) for name, values in before.items()]
    return max(changes, key=lambda change: (math.isnan(change.difference), change.difference / change.tolerance))


def _change(before: torch.Tensor, after: torch.Tensor, step: float) -> OutputChange:
    """The change of one output; `step` is the longest rounding step of the types that the network computes in."""
    import torch

    before, after = _real(before), _real(after)
    if not before.numel():
        return OutputChange(0.0, _OF_LARGEST)
    largest = before.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    if step > torch.finfo(torch.float64).eps:
        tolerance = max(_SHORT_TYPE, _ROUNDINGS * step)
    else:
        # An output that has no axis of images has no spread.
        spread = (before[:1] - before[1:]).abs().max() if before.ndim and len(before) > 1 else torch.zeros(())
        tolerance = max(float(_OF_SPREAD * spread / largest), _OF_LARGEST)
    return OutputChange(float((before - after).abs().max() / largest), tolerance)


def _real(outputs: torch.Tensor) -> torch.Tensor:
    import torch

    return (torch.view_as_real(outputs) if outputs.is_complex() else outputs).double()


def _outputs(
    module: nn.Module, state: Mapping[str, torch.Tensor], sample: torch.Tensor, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    import torch

    def converted(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    tensors = {name: converted(state.get(name, tensor)) for name, tensor in _tensors(module).items()}
    return named_tensors(torch.func.functional_call(module, tensors, (converted(sample),), tie_weights=False))


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, with one name for each layer: `functional_call` restores one with two names wrongly."""
    return {
        f"{path}.{name}" if path else name: tensor
        for path, layer in module.named_modules()
        for kind in (layer.named_parameters, layer.named_buffers)
        for name, tensor in kind(recurse=False, remove_duplicate=False)
    }


@contextlib.contextmanager
def _result_types() -> Iterator[set[torch.dtype]]:
    """Collect the floating-point types of all results that operators compute, such as of a cast to float32 in a forward."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    types: set[torch.dtype] = set()

    class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            results = function(*args, **(kwargs or {}))
            for each in results if isinstance(results, tuple | list) else (results,):
                if isinstance(each, torch.Tensor) and each.is_floating_point() and each.numel() > 1:
                    types.add(each.dtype)
            return results

    with Recorder():  # type: ignore[no-untyped-call]
        yield types
