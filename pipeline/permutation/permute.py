"""The permute stage: channels in an order that keeps more under N:M, while the network computes what it did."""

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
from maskplan.pipeline.models.layers import sample_input, trace_layers
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

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
Scores = dict[str, Floats]

# Differences of outputs, beside the largest of them, that another order of summation explains: in float32, and in steps
# of rounding in shorter types.
_TOLERANCE = 1e-3
_ROUNDINGS = 16


@dataclass(frozen=True)
class PermuteOptions:
    """How long to search.

    Attributes:
        effort: Multiplies the steps of the search, see `SearchOptions`.
        restarts: Searches for each group, of which the best counts.
        seed: Of the search.
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
        module: The dense model; it stays as it is.
        provenance: Of its weights.
        pattern: N:M that masks will have.
        policy: Which layers will be masked; their weights alone count.
        options: How long to search.
        out: The checkpoint to write.
        record: The permutation to write.

    Raises:
        UnexportableError: Its operators cannot be read off; the caller may go on with the model as it is.
        InputError: Weights that are pruned, NaN or infinite, or a model without a layer that can be masked.
    """
    state = module.state_dict()
    _require_usable(state, provenance)
    masked = _masked(module, provenance.preprocessing, pattern, policy)
    axes = find_groups(module, provenance.preprocessing)
    log.info("%d groups of channels can move, %d cannot", len(axes.movable), len(axes.fixed))
    scores = _scores(state, masked)
    groups, moves = _ordered(axes, scores, pattern, options)
    found = Permutation(record, "", provenance.model, str(pattern), tensors_sha256(state), groups)
    return _done(module, provenance, found, moves, masked, out, written=False)


def repermute(module: nn.Module, provenance: Provenance, permutation: Path, policy: LayerPolicy, out: Path) -> Permuted:
    """Apply a written permutation to other weights of the same architecture; nothing is searched or exported.

    The pattern is the permutation's; the policy only tells which layers the figures are of.

    Raises:
        InputError: The permutation is damaged or of another model, or weights that cannot be used.
    """
    found, moves = read_permutation(permutation)
    if found.model != provenance.model:
        log.warning("the permutation was made for %s, and is applied to %s", found.model, provenance.model)
    state = module.state_dict()
    _require_usable(state, provenance)
    require_fit(moves, {name: tuple(tensor.shape) for name, tensor in state.items()}, where=permutation)
    masked = _masked(module, provenance.preprocessing, parse_pattern(found.pattern), policy)
    return _done(module, provenance, found, moves, masked, out, written=True)


def _done(
    module: nn.Module,
    provenance: Provenance,
    found: Permutation,
    moves: Sequence[Move],
    masked: Sequence[Layer],
    out: Path,
    *,
    written: bool,
) -> Permuted:
    """Apply, see that the function is the same, and write."""
    pattern = parse_pattern(found.pattern)
    state = module.state_dict()
    moved = permuted_state(state, moves)
    difference, tolerance = _difference(module, moved, provenance.preprocessing)
    if not difference <= tolerance:
        raise InputError(
            "the permuted network computes something else",
            where=found.path if written else provenance.model,
            found=f"outputs differ by {difference:.2g} of the largest",
            fix="give the permutation that was made for this model"
            if written
            else "go on without permuting it, and report the model: it uses channels in a way that was not understood",
        )
    before, after = (_kept(_scores(each, masked), pattern) for each in (state, moved))
    bound = sum(kept(s, s.shape[1] // pattern.m * pattern.n, s.shape[1]) for s in _scores(state, masked).values())
    permutation = found if written else write_permutation(found, moves)
    digest = permutation.sha256 if moves else provenance.permutation
    checkpoint = save_checkpoint(moved, replace(provenance, permutation=digest), out)
    return Permuted(checkpoint, permutation, before, after, bound)


def _require_usable(state: Mapping[str, torch.Tensor], provenance: Provenance) -> None:
    if provenance.masked:
        raise InputError(
            "the weights are pruned already, and another order of channels would break their groups",
            found=f"{len(provenance.masked)} masked layers, {provenance.pattern}",
            fix="permute the dense checkpoint, then mask it anew",
        )
    bad = [k for k, v in state.items() if v.is_floating_point() and not bool(v.isfinite().all())]
    if bad:
        raise InputError(
            f"{len(bad)} tensors hold NaN or infinity",
            found=listed(bad),
            fix="use a checkpoint from before training diverged",
        )


def _masked(
    module: nn.Module, preprocessing: Preprocessing, pattern: Pattern, policy: LayerPolicy
) -> tuple[Layer, ...]:
    """The layers that masks are for, which alone count."""
    layers, _ = trace_layers(module, preprocessing)
    return select_layers(layers, pattern, policy).masked


def _scores(state: Mapping[str, torch.Tensor], masked: Sequence[Layer]) -> Scores:
    """Magnitudes as (rows, C), for each masked layer."""
    return {
        layer.name: state[layer.name].detach().float().abs().movedim(1, -1).flatten(0, -2).cpu().numpy()
        for layer in masked
    }


def _kept(scores: Scores, pattern: Pattern) -> float:
    return sum(kept(each, pattern.n, pattern.m) for each in scores.values())


def _ordered(
    axes: Axes, scores: Scores, pattern: Pattern, options: PermuteOptions
) -> tuple[tuple[ChannelGroup, ...], list[Move]]:
    """Search group by group: those that have their quadruples to themselves side by side, others one after another."""
    readers = {group.name: _readers(group, scores) for group in axes.movable}
    alone = {name: _in_whole_quadruples(each, pattern.m) for name, each in readers.items()}
    shared = [group for group in axes.movable if readers[group.name] and alone[group.name] is None]
    single = [group for group in axes.movable if group not in shared]

    def one(group: Group) -> _Ordered:
        return _one_group(group, readers[group.name], alone[group.name], pattern, options)

    found = dict(zip((g.name for g in single), _side_by_side(one, single), strict=True))
    for group in (*shared, *shared):
        best = one(group)
        for reader in readers[group.name]:
            reader.scores[:, reader.positions] = reader.scores[:, reader.positions[best.order]]
        found[group.name] = best if group.name not in found else _after(found[group.name], best)
    groups = [found[group.name].about for group in axes.movable]
    fixed = [ChannelGroup(f.name, f.channels, FIXED, f.reason) for f in axes.fixed]
    moves = [Move(g, found[g.name].order) for g in axes.movable if found[g.name].about.state == MOVED]
    return (*groups, *fixed), moves


@dataclass(frozen=True, eq=False)
class _Ordered:
    """A group's new order and what is told of it."""

    about: ChannelGroup
    order: Integers


def _side_by_side(one: Callable[[Group], _Ordered], groups: Sequence[Group]) -> list[_Ordered]:
    """On all cores; compiled searches leave Python to others."""
    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="permute") as pool:
        futures = [pool.submit(one, group) for group in groups]
        try:
            return [future.result() for future in track(futures, "groups of channels", len(futures))]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _after(first: _Ordered, second: _Ordered) -> _Ordered:
    """Two orders of a group, one after the other; between them others moved, whose gains are not its own."""
    order = first.order[second.order]
    gain = second.about.kept_after - second.about.kept_before
    about = replace(first.about, kept_after=first.about.kept_after + gain)
    if second.about.state == MOVED:
        about = replace(about, state=MOVED, reason=None)
    return _Ordered(about, order)


def _one_group(
    group: Group, readers: Sequence[Reader], alone: Integers | None, pattern: Pattern, options: PermuteOptions
) -> _Ordered:
    given = np.arange(group.size)
    n, m = pattern.n, pattern.m
    about = ChannelGroup(
        group.name, group.size, UNREAD, tensors=len(group.places), readers=tuple(r.name for r in readers)
    )
    if not readers:
        return _Ordered(replace(about, reason="no masked layer reads them channel by channel"), given)
    efficacy = None
    if alone is not None:
        stacked = np.concatenate([reader.scores[:, reader.positions[alone]] for reader in readers])
        how = SearchOptions(effort=options.effort, seed=options.seed, restarts=options.restarts, m=m, n=n)
        best = search(stacked, how)
        order = given.copy()
        order[alone] = alone[best.order]
        before, after, efficacy = best.kept_before, best.kept, best.efficacy
    else:
        order = descend(readers, n, m) if n < m else given
        before, after = (sum(_kept_near(r, o, pattern) for r in readers) for o in (given, order))
    about = replace(about, kept_before=before, kept_after=after, efficacy=efficacy)
    if not after > before:
        return _Ordered(replace(about, state=AS_GIVEN, kept_after=before, reason="no better order was found"), given)
    return _Ordered(replace(about, state=MOVED), order)


def _readers(group: Group, scores: Scores) -> list[Reader]:
    """Masked layers whose input channels they are; one that reads them flattened has no whole channels in a quadruple."""
    return [
        Reader(place.tensor, scores[place.tensor], place.positions[:, 0])
        for place in group.places
        if place.axis == 1 and place.tensor in scores and place.positions.shape[1] == 1
    ]


def _in_whole_quadruples(readers: Sequence[Reader], m: int) -> Integers | None:
    """The channels in the order of their columns, if they fill the same quadruples (groups of m) in all readers."""
    found: Integers | None = None
    partition: set[frozenset[int]] = set()
    for reader in readers:
        order = np.argsort(reader.positions)
        columns = reader.positions[order]
        if len(columns) % m or (columns[::m] % m).any() or (np.diff(columns.reshape(-1, m)) != 1).any():
            return None
        own = {frozenset(quadruple.tolist()) for quadruple in order.reshape(-1, m)}
        if found is None:
            found, partition = order, own
        elif own != partition:
            return None
    return found


def _kept_near(reader: Reader, order: Integers, pattern: Pattern) -> float:
    """What is kept of the quadruples that a group is part of, in an order of its channels."""
    scores = reader.scores.copy()
    scores[:, reader.positions] = scores[:, reader.positions[order]]
    first = np.unique(reader.positions // pattern.m) * pattern.m
    columns = (first[:, None] + np.arange(pattern.m)).ravel()
    return kept(scores[:, columns], pattern.n, pattern.m)


def _difference(
    module: nn.Module, moved: Mapping[str, torch.Tensor], preprocessing: Preprocessing
) -> tuple[float, float]:
    """The largest difference of the outputs on noise, beside the largest output; and how much of it may be rounding."""
    import torch

    sample = sample_input(preprocessing, 2)
    for parameter in module.parameters():
        sample = sample.to(parameter)
        break
    with torch.no_grad():
        before = module.eval()(sample)
        after = torch.func.functional_call(module, _each_once(module, moved), (sample,), tie_weights=False)
    # Half-precision weights round within the network, whatever type comes out.
    steps = torch.finfo(sample.dtype), torch.finfo(before.dtype)
    difference = (before - after).abs().max() / before.abs().max().clamp(min=steps[1].tiny)
    return float(difference), max(_TOLERANCE, _ROUNDINGS * max(step.eps for step in steps))


def _each_once(module: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A layer under two names must be exchanged by one of them, for torch puts back what it found by the second."""
    names = [
        f"{path}.{name}" if path else name
        for path, layer in module.named_modules()
        for kind in (layer.named_parameters, layer.named_buffers)
        for name, _ in kind(recurse=False, remove_duplicate=False)
    ]
    return {name: state[name] for name in names if name in state}
