"""The permute stage: reorder channels so that N:M keeps more, while the network computes the same function."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Layer, Pattern, Preprocessing, Provenance
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.progress import track
from maskplan.pipeline.core.validation import above, at_least
from maskplan.pipeline.masking.patterns import parse_pattern
from maskplan.pipeline.masking.policy import LayerPolicy, select_layers
from maskplan.pipeline.models.checkpoint import save_checkpoint
from maskplan.pipeline.models.layers import trace_layers
from maskplan.pipeline.models.state_dict import tensors_sha256
from maskplan.pipeline.permutation.apply import Move, permuted_state
from maskplan.pipeline.permutation.axes import Integers
from maskplan.pipeline.permutation.groups import Axes, Group, find_groups
from maskplan.pipeline.permutation.mixed import Reader, descend
from maskplan.pipeline.permutation.record import (
    AS_GIVEN,
    FIXED,
    MOVED,
    UNREAD,
    ChannelGroup,
    Permutation,
    Permuted,
    read_permutation,
    require_fit,
    write_permutation,
)
from maskplan.pipeline.permutation.search import SearchOptions, kept, search
from maskplan.pipeline.permutation.verify import OutputChange, output_change, shuffled_change

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)

_MISREAD = "continue without permuting it, and report the model: an operator was misread"

Floats = npt.NDArray[np.float32]
Scores = dict[str, Floats]


@dataclass(frozen=True)
class PermuteOptions:
    """How long to search.

    Attributes:
        effort: Multiplies the steps of the search, see `SearchOptions`.
        restarts: Searches for each group; the best result is used.
        seed: Seed of the search.
    """

    effort: float = 1.0
    restarts: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(0, seed=self.seed)
        at_least(1, restarts=self.restarts)
        above(0, effort=self.effort)


def permute(
    module: nn.Module,
    provenance: Provenance,
    pattern: Pattern,
    policy: LayerPolicy,
    options: PermuteOptions,
    out: Path,
    record: Path,
) -> Permuted:
    """Search an order for every group of channels that masked layers read, and write checkpoint and permutation.

    Args:
        module: The dense model; it does not change.
        provenance: Provenance of its weights.
        pattern: N:M of the masks to come.
        policy: Which layers will be masked; only their weights count.
        options: How long to search.
        out: The checkpoint to write.
        record: The permutation to write.

    Raises:
        UnexportableError: Its operators cannot be read; the caller may continue with the model as given.
        InputError: Weights that are pruned, NaN or infinite, or a model without a layer that can be masked.
    """
    state = module.state_dict()
    _require_usable(state, provenance)
    masked = _masked(module, provenance.preprocessing, pattern, policy)
    axes = find_groups(module, provenance.preprocessing)
    log.info("%d groups of channels can move, %d cannot", len(axes.movable), len(axes.fixed))
    # A misread operator shows here at the cost of two forward passes; the search may take minutes.
    _require_same_outputs(
        shuffled_change(module, axes.movable, provenance.preprocessing), where=provenance.model, fix=_MISREAD
    )
    scores = _scores(state, masked)
    groups, moves = _search_groups(axes, scores, pattern, options)
    searched = Permutation(record, "", provenance.model, str(pattern), tensors_sha256(state), groups)
    return _apply_and_write(module, provenance, searched, moves, masked, out, written=False)


def repermute(module: nn.Module, provenance: Provenance, permutation: Path, policy: LayerPolicy, out: Path) -> Permuted:
    """Apply a permutation from a file to other weights of the same architecture; nothing is searched or exported.

    The pattern is the permutation's; the policy only selects the layers that the figures cover.

    Raises:
        InputError: The permutation is damaged or of another model, or the weights cannot be used.
    """
    given, moves = read_permutation(permutation)
    if given.model != provenance.model:
        log.warning("the permutation was made for %s and is applied to %s", given.model, provenance.model)
    state = module.state_dict()
    _require_usable(state, provenance)
    require_fit(moves, {name: tuple(tensor.shape) for name, tensor in state.items()}, where=permutation)
    masked = _masked(module, provenance.preprocessing, parse_pattern(given.pattern), policy)
    return _apply_and_write(module, provenance, given, moves, masked, out, written=True)


def _apply_and_write(
    module: nn.Module,
    provenance: Provenance,
    permutation: Permutation,
    moves: Sequence[Move],
    masked: Sequence[Layer],
    out: Path,
    *,
    written: bool,
) -> Permuted:
    """Apply the moves, check that the function is unchanged, and write."""
    pattern = parse_pattern(permutation.pattern)
    state = module.state_dict()
    moved = permuted_state(state, moves)
    change = output_change(module, moved, provenance.preprocessing)
    if written:
        _require_same_outputs(change, where=permutation.path, fix="pass the permutation that was made for this model")
    else:
        _require_same_outputs(change, where=provenance.model, fix=_MISREAD)
    before, after = (_kept(_scores(each, masked), pattern) for each in (state, moved))
    bound = sum(kept(s, s.shape[1] // pattern.m * pattern.n, s.shape[1]) for s in _scores(state, masked).values())
    if not written:
        permutation = write_permutation(permutation, moves)
    digest = permutation.sha256 if moves else provenance.permutation
    checkpoint = save_checkpoint(moved, replace(provenance, permutation=digest), out)
    return Permuted(checkpoint, permutation, before, after, bound)


def _require_same_outputs(change: OutputChange, *, where: object, fix: str) -> None:
    if not change.is_rounding:
        raise InputError(
            "the permuted network computes another function",
            where=where,
            found=f"outputs differ by {change.difference:.2g} of the largest; rounding explains {change.tolerance:.2g}",
            fix=fix,
        )


def _require_usable(state: Mapping[str, torch.Tensor], provenance: Provenance) -> None:
    if provenance.masked:
        raise InputError(
            "the weights are pruned already, and reordering channels would break their groups",
            found=f"{len(provenance.masked)} masked layers, {provenance.pattern}",
            fix="permute the dense checkpoint, then mask it again",
        )
    special = [f"{name} ({kind})" for name, value in state.items() if (kind := _special(value))]
    if special:
        raise InputError(
            f"{len(special)} tensors have no channels that can be reordered",
            found=listed(special),
            fix="use a model with initialized, dense, unquantized tensors",
        )
    bad = [k for k, v in state.items() if v.is_floating_point() and not bool(v.isfinite().all())]
    if bad:
        raise InputError(
            f"{len(bad)} tensors hold NaN or infinity",
            found=listed(bad),
            fix="use a checkpoint from before training diverged",
        )


def _special(value: object) -> str | None:
    """What makes an entry of a state dict unusable, if anything."""
    import torch
    from torch.nn.parameter import is_lazy

    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    if is_lazy(value):
        return "not initialized"
    if value.is_meta:
        return "without values"
    if value.is_quantized:
        return "quantized"
    return None if value.layout == torch.strided else "sparse"


def _masked(
    module: nn.Module, preprocessing: Preprocessing, pattern: Pattern, policy: LayerPolicy
) -> tuple[Layer, ...]:
    """The layers that will be masked; only they count."""
    layers, _ = trace_layers(module, preprocessing)
    return select_layers(layers, pattern, policy).masked


def _scores(state: Mapping[str, torch.Tensor], masked: Sequence[Layer]) -> Scores:
    """Magnitudes of each masked layer as (rows, C) float32."""
    return {
        layer.name: state[layer.name].detach().float().abs().movedim(1, -1).flatten(0, -2).cpu().numpy()
        for layer in masked
    }


def _kept(scores: Scores, pattern: Pattern) -> float:
    return sum(kept(each, pattern.n, pattern.m) for each in scores.values())


def _search_groups(
    axes: Axes, scores: Scores, pattern: Pattern, options: PermuteOptions
) -> tuple[tuple[ChannelGroup, ...], list[Move]]:
    """Search group by group: in parallel where a group shares no quadruple with another, otherwise one after another."""
    readers = {group.name: _readers(group, scores) for group in axes.movable}
    alone = {name: _in_whole_quadruples(each, pattern.m) for name, each in readers.items()}
    shared = [group for group in axes.movable if readers[group.name] and alone[group.name] is None]
    single = [group for group in axes.movable if group not in shared]

    def search_one(group: Group) -> _GroupResult:
        return _search_group(group, readers[group.name], alone[group.name], pattern, options)

    results = dict(zip((g.name for g in single), _in_parallel(search_one, single), strict=True))
    for group in (*shared, *shared):
        best = search_one(group)
        for reader in readers[group.name]:
            reader.scores[:, reader.positions] = reader.scores[:, reader.positions[best.order]]
        results[group.name] = best if group.name not in results else _composed(results[group.name], best)
    groups = [results[group.name].record for group in axes.movable]
    fixed = [ChannelGroup(f.name, f.channels, FIXED, f.reason) for f in axes.fixed]
    moves = [Move(g, results[g.name].order) for g in axes.movable if results[g.name].record.state == MOVED]
    return (*groups, *fixed), moves


@dataclass(frozen=True, eq=False)
class _GroupResult:
    """A group's new order and its record."""

    record: ChannelGroup
    order: Integers


def _in_parallel(search_one: Callable[[Group], _GroupResult], groups: Sequence[Group]) -> list[_GroupResult]:
    """Run on all cores; compiled searches release the GIL."""
    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="permute") as pool:
        futures = [pool.submit(search_one, group) for group in groups]
        try:
            return [future.result() for future in track(futures, "groups of channels", len(futures))]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _composed(first: _GroupResult, second: _GroupResult) -> _GroupResult:
    """Compose two orders of a group; gains of other groups that moved in between are not counted."""
    order = first.order[second.order]
    gain = second.record.kept_after - second.record.kept_before
    record = replace(first.record, kept_after=first.record.kept_after + gain)
    if second.record.state == MOVED:
        record = replace(record, state=MOVED, reason=None)
    return _GroupResult(record, order)


def _search_group(
    group: Group, readers: Sequence[Reader], alone: Integers | None, pattern: Pattern, options: PermuteOptions
) -> _GroupResult:
    given = np.arange(group.size)
    n, m = pattern.n, pattern.m
    record = ChannelGroup(
        group.name, group.size, UNREAD, tensors=len(group.places), readers=tuple(r.name for r in readers)
    )
    if not readers:
        return _GroupResult(replace(record, reason="no masked layer reads them channel by channel"), given)
    efficacy = None
    if alone is not None:
        stacked = np.concatenate([reader.scores[:, reader.positions[alone]] for reader in readers])
        search_options = SearchOptions(effort=options.effort, seed=options.seed, restarts=options.restarts, m=m, n=n)
        best = search(stacked, search_options)
        order = given.copy()
        order[alone] = alone[best.order]
        before, after, efficacy = best.kept_before, best.kept, best.efficacy
    else:
        order = descend(readers, n, m) if n < m else given
        before, after = (sum(_kept_in_quadruples(r, o, pattern) for r in readers) for o in (given, order))
    record = replace(record, kept_before=before, kept_after=after, efficacy=efficacy)
    if not after > before:
        return _GroupResult(
            replace(record, state=AS_GIVEN, kept_after=before, reason="no better order was found"), given
        )
    return _GroupResult(replace(record, state=MOVED), order)


def _readers(group: Group, scores: Scores) -> list[Reader]:
    """Masked layers that read the group as input channels; not those that read it flattened."""
    return [
        Reader(place.tensor, scores[place.tensor], place.positions[:, 0])
        for place in group.places
        if place.axis == 1 and place.tensor in scores and place.positions.shape[1] == 1
    ]


def _in_whole_quadruples(readers: Sequence[Reader], m: int) -> Integers | None:
    """The channels in the order of their columns if they fill the same quadruples (groups of m) in all readers."""
    common: Integers | None = None
    partition: set[frozenset[int]] = set()
    for reader in readers:
        order = np.argsort(reader.positions)
        columns = reader.positions[order]
        if len(columns) % m or (columns[::m] % m).any() or (np.diff(columns.reshape(-1, m)) != 1).any():
            return None
        own = {frozenset(quadruple.tolist()) for quadruple in order.reshape(-1, m)}
        if common is None:
            common, partition = order, own
        elif own != partition:
            return None
    return common


def _kept_in_quadruples(reader: Reader, order: Integers, pattern: Pattern) -> float:
    """The magnitude kept in the quadruples that contain the group, for an order of its channels."""
    scores = reader.scores.copy()
    scores[:, reader.positions] = scores[:, reader.positions[order]]
    first = np.unique(reader.positions // pattern.m) * pattern.m
    columns = (first[:, None] + np.arange(pattern.m)).ravel()
    return kept(scores[:, columns], pattern.n, pattern.m)
