"""Records of a permutation, and the file from which it can be applied to other weights of the same architecture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError

from maskplan.pipeline.core.artifacts import Checkpoint
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.files import sha256_of, write_atomically
from maskplan.pipeline.core.serialization import decode, encode
from maskplan.pipeline.models.state_dict import METADATA_KEY, read_metadata
from maskplan.pipeline.permutation.apply import Move
from maskplan.pipeline.permutation.groups import Group, Place

MOVED, AS_GIVEN, UNREAD, FIXED = "moved", "as_given", "unread", "fixed"
"""State of a group: reordered; no better order found; not searched, as no masked layer reads it; unable to move."""

_ORDER = "order"


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that move together, and the result of their search.

    Attributes:
        name: Name of the layer that produces them (for fixed ones possibly the layer that reads them).
        channels: Number of channels.
        state: `moved`, `as_given`, `unread` or `fixed`.
        reason: Why they did not move; None if they moved.
        tensors: Number of tensor axes that they run along.
        readers: Masked layers that read them.
        kept_before: Magnitude that N:M keeps in the readers' quadruples (groups of M) that contain them, in the given order.
        kept_after: The same in the new order.
        efficacy: Gain in percent of the gain of a free choice in each row; None where other channels share the quadruples.
    """

    name: str
    channels: int
    state: str
    reason: str | None = None
    tensors: int = 0
    readers: tuple[str, ...] = ()
    kept_before: float = 0.0
    kept_after: float = 0.0
    efficacy: float | None = None


@dataclass(frozen=True)
class Permutation:
    """A safetensors file with the order and the places of each moved group.

    Attributes:
        path: Path of the file.
        sha256: Digest of the file.
        model: Name of the model, as in the checkpoint's record.
        pattern: N:M.
        weights_sha256: Digest of the tensors that the search was run on.
        groups: All groups of the network, in the order of the modules; their figures are for these tensors.
    """

    path: Path
    sha256: str
    model: str
    pattern: str
    weights_sha256: str
    groups: tuple[ChannelGroup, ...]


@dataclass(frozen=True)
class Permuted:
    """A permuted checkpoint and its permutation.

    Attributes:
        checkpoint: The same function, with channels in another order.
        permutation: The file to apply it again.
        kept_before: Magnitude that N:M keeps of all masked layers, before.
        kept_after: The same after the permutation.
        kept_bound: The same if each row of a layer could choose among all its channels; no order keeps more.
    """

    checkpoint: Checkpoint
    permutation: Permutation
    kept_before: float
    kept_after: float
    kept_bound: float

    @property
    def efficacy(self) -> float:
        """Gain in percent of the gain of a free choice in each row; 0 where there is nothing to gain."""
        room = self.kept_bound - self.kept_before
        return 100 * (self.kept_after - self.kept_before) / room if room > 0 else 0.0


def write_permutation(permutation: Permutation, moves: Sequence[Move]) -> Permutation:
    """Write the file that the record names: `GROUP/order` and, for each axis, `GROUP/TENSOR/AXIS` with (channels, copies).

    Returns:
        The record with the file's digest.
    """
    tensors: dict[str, npt.NDArray[Any]] = {}
    for move in moves:
        tensors[f"{move.group.name}/{_ORDER}"] = move.order
        for place in move.group.places:
            tensors[f"{move.group.name}/{place.tensor}/{place.axis}"] = place.positions.astype(np.int32)
    header = encode(replace(permutation, path=Path(), sha256=""))
    data = safetensors.numpy.save(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
        {METADATA_KEY: json.dumps(header, sort_keys=True)},
    )
    return replace(permutation, sha256=write_atomically(permutation.path, data))


def read_permutation(path: Path) -> tuple[Permutation, list[Move]]:
    """Read the record and the moves of a permutation file.

    Raises:
        InputError: The file is missing, damaged, or not a permutation file.
    """
    if not path.is_file():
        raise InputError("permutation file not found", where=path, fix="check the path given to --permutation")
    header = read_metadata(path)
    try:
        permutation = decode(Permutation, header)
        tensors = safetensors.numpy.load_file(path)
        moves = _moves(tensors, [g.name for g in permutation.groups if g.state == MOVED])
    except (ValueError, KeyError, SafetensorError, OSError) as error:
        raise InputError(
            "not a permutation file",
            where=path,
            found=error,
            fix="pass the file that `maskplan permute` wrote next to the checkpoint",
        ) from error
    return replace(permutation, path=path, sha256=sha256_of(path)), moves


def require_fit(moves: Sequence[Move], shapes: Mapping[str, tuple[int, ...]], *, where: object) -> None:
    """Require that every axis that moves exists and contains the positions that move, each once.

    Raises:
        InputError: Otherwise; all axes that do not fit are counted.
    """
    wrong = []
    taken: dict[tuple[str, int], list[npt.NDArray[np.int64]]] = {}
    for move in moves:
        for place in move.group.places:
            shape = shapes.get(place.tensor)
            if shape is None:
                wrong.append(f"no tensor {place.tensor}")
            elif not 0 <= place.axis < len(shape) or place.positions.max() >= shape[place.axis]:
                wrong.append(f"{place.tensor} {shape} is too small")
            else:
                taken.setdefault((place.tensor, place.axis), []).append(place.positions.ravel())
    for (tensor, _), parts in taken.items():
        positions = np.concatenate(parts)
        if len(np.unique(positions)) < len(positions):
            wrong.append(f"positions of {tensor} move twice")
    if wrong:
        raise InputError(
            "the permutation is of another model",
            where=where,
            found=f"{len(wrong)} axes do not fit: {listed(wrong, 3)}",
            fix="pass the permutation that was made for this model",
        )


def _moves(tensors: Mapping[str, npt.NDArray[Any]], names: Sequence[str]) -> list[Move]:
    moves = []
    for name in names:
        order = tensors[f"{name}/{_ORDER}"].astype(np.int64)
        places = []
        for key, positions in tensors.items():
            if key.startswith(f"{name}/") and key != f"{name}/{_ORDER}":
                tensor, _, axis = key.removeprefix(f"{name}/").rpartition("/")
                if positions.ndim != 2 or len(positions) != len(order) or not positions.size or positions.min() < 0:
                    raise ValueError(f"{key}: positions of shape {positions.shape} for {len(order)} channels")
                places.append(Place(tensor, int(axis), positions.astype(np.int64)))
        if order.ndim != 1 or not places or not np.array_equal(np.sort(order), np.arange(len(order))):
            raise ValueError(f"{name}: not an order of channels")
        moves.append(Move(Group(name, tuple(places)), order))
    return moves
