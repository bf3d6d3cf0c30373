"""Orders of groups of channels, applied to a state dict: every tensor along whose axes they run is rearranged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from maskplan.pipeline.permutation.axes import Integers
from maskplan.pipeline.permutation.groups import Group

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Move:
    """A new order of a group: what was channel `order[i]` becomes channel `i`, at all of the group's places."""

    group: Group
    order: Integers


def permuted_state(state: Mapping[str, torch.Tensor], moves: Sequence[Move]) -> dict[str, torch.Tensor]:
    """A state dict with moved channels; values are moved, never changed, and tensors that stay are the given ones.

    Args:
        state: With every tensor that the moves name.
        moves: Of different groups, so that no channel moves twice.
    """
    import torch

    found = dict(state)
    for (name, axis), index in indices(moves, {name: tuple(tensor.shape) for name, tensor in state.items()}).items():
        found[name] = found[name].index_select(axis, torch.from_numpy(index).to(found[name].device))
    return found


def indices(moves: Sequence[Move], shapes: Mapping[str, tuple[int, ...]]) -> dict[tuple[str, int], Integers]:
    """For each tensor's axis along which something moves, the old position of what comes to each position."""
    found: dict[tuple[str, int], Integers] = {}
    for move in moves:
        for place in move.group.places:
            key = (place.tensor, place.axis)
            index = found.setdefault(key, np.arange(shapes[place.tensor][place.axis]))
            index[place.positions] = place.positions[move.order]
    return found
