"""Apply orders of channel groups to a state dict."""

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
    """A new order of a group: channel `order[i]` becomes channel `i`, in all of the group's places."""

    group: Group
    order: Integers


def permuted_state(state: Mapping[str, torch.Tensor], moves: Sequence[Move]) -> dict[str, torch.Tensor]:
    """A state dict with moved channels. Values are moved, never changed; tensors that do not move are returned as given.

    Args:
        state: Contains every tensor that the moves name.
        moves: Of different groups, so that no channel moves twice.
    """
    import torch

    moved = dict(state)
    for (name, axis), index in indices(moves, {name: tuple(tensor.shape) for name, tensor in state.items()}).items():
        moved[name] = moved[name].index_select(axis, torch.from_numpy(index).to(moved[name].device))
    return moved


def indices(moves: Sequence[Move], shapes: Mapping[str, tuple[int, ...]]) -> dict[tuple[str, int], Integers]:
    """For each axis along which something moves, the old position of each new position, int64."""
    by_axis: dict[tuple[str, int], Integers] = {}
    for move in moves:
        for place in move.group.places:
            key = (place.tensor, place.axis)
            index = by_axis.setdefault(key, np.arange(shapes[place.tensor][place.axis]))
            index[place.positions] = place.positions[move.order]
    return by_axis
