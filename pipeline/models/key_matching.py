"""Matches the keys of a weights file to a model's own keys, whatever wrapped the model when they were saved."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.models.state_selection import AVERAGE_COUNTER, is_averaged, missing_kind

if TYPE_CHECKING:
    import torch

_CONTAINERS = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
)
"""Attributes under which DataParallel, `torch.compile`, FSDP and other wrappers hold a module, at any depth."""
_USUAL_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
_PROFILER_BUFFERS = (AVERAGE_COUNTER, "total_ops", "total_params")
"""Buffers that averaging and profilers (thop) add to a module."""


@dataclass(frozen=True)
class Match:
    """A model's keys found in a file.

    Attributes:
        tensors: By the model's own keys; keys that the model lacks keep their name without the prefix.
        left_out: Keys of the file that do not belong to the model, such as weights of a loss.
        averaged: Whether the prefix names averaged weights.
        others: Prefixes under which the file has the model's keys, too.
    """

    tensors: dict[str, torch.Tensor]
    left_out: tuple[str, ...]
    averaged: bool
    others: tuple[str, ...]


def match_keys(
    state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], *, where: object, ema: bool | None = None
) -> Match | None:
    """Find all of a model's keys in a file under one prefix; None if there is no such prefix.

    Keys are tried as they are, then behind a prefix (`model.` of a LightningModule), then without the names of wrappers
    (`features.module.0.weight` of a DataParallel part). Of tied tensors one key suffices.

    Args:
        state: Tensors by the file's keys.
        own: The model's state dict.
        where: The file, for messages.
        ema: Take averaged weights (True) or raw ones (False), where prefixes tell them apart; None prefers raw ones.

    Raises:
        InputError: Several prefixes fit equally, or the requested kind of weights is missing.
    """
    required = _required(own)
    if not required:
        return Match(dict(state), (), averaged=False, others=())
    found = _candidates(state, own, required)
    if not found:
        return None
    prefix, others, averaged = _choose(found, own, state, where, ema)
    elsewhere = tuple(p for p in found if p.startswith(prefix) and p != prefix)
    tensors = {
        k: v
        for k, v in _with_tied(found[prefix], required).items()
        if k in own or not (_is_extra(k) or any((prefix + k).startswith(p) for p in elsewhere))
    }
    used = {id(v) for v in tensors.values()}
    left_out = tuple(k for k, v in state.items() if id(v) not in used and not _is_extra(k))
    return Match(tensors, left_out, averaged, others)


def without_wrappers(state: Mapping[str, torch.Tensor], own: Collection[str]) -> dict[str, torch.Tensor]:
    """The file's tensors for a message about keys that do not fit: a prefix that all of them share is removed.

    Only if more keys are the model's own without it.
    """
    best = dict(state)
    stripped = dict(state)
    for _ in range(4):
        prefix = next((p for p in _USUAL_PREFIXES if stripped and all(k.startswith(p) for k in stripped)), None)
        if prefix is None:
            break
        stripped = {k.removeprefix(prefix): v for k, v in stripped.items()}
        if len(stripped.keys() & set(own)) > len(best.keys() & set(own)):
            best = stripped
    return best


def match_names(names: Iterable[str], own: Collection[str]) -> dict[str, str]:
    """The model's name for each name of a file that has only some of the model's tensors; empty if there is no match."""
    given = list(names)
    normalized = {".".join(s for s in name.split(".") if s not in _CONTAINERS): name for name in own}
    if len(normalized) < len(own):
        normalized = {name: name for name in own}
    for short in (dict(zip(given, given, strict=True)), {n: _short(n) for n in given}):
        first = short[given[0]]
        starts = [i + 1 for i, character in enumerate(first) if character == "."]
        for start in (0, *starts):
            prefix = first[:start]
            if all(v.startswith(prefix) and v[start:] in normalized for v in short.values()):
                return {name: normalized[v[start:]] for name, v in short.items()}
            if all(v.startswith(prefix) and v[start:] in own for v in short.values()):
                return {name: v[start:] for name, v in short.items()}
    return {}


def _required(own: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """The keys that a file must have, as groups of tied keys of which one suffices.

    Old checkpoints have no batch counter, which inference does not use.
    """
    groups: dict[object, list[str]] = {}
    for name, tensor in own.items():
        if not name.endswith("num_batches_tracked"):
            is_empty = tensor.numel() == 0
            key = name if is_empty else (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            groups.setdefault(key, []).append(name)
    return list(groups.values())


def _candidates(
    state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], required: list[list[str]]
) -> dict[str, dict[str, torch.Tensor]]:
    """For each prefix under which the file has all required keys: the tensors under it, by the model's keys."""
    exact = _by_prefix(state, required)
    short_own, short_state = _normalized(own), _normalized(state)
    if exact or short_own is None or short_state is None:
        return exact
    names = {short: name for name, short in short_own.items()}
    found = _by_prefix(
        {short_state[k]: v for k, v in state.items()}, [[short_own[k] for k in group] for group in required]
    )
    return {p: {names.get(k, k): v for k, v in tensors.items()} for p, tensors in found.items()}


def _by_prefix(state: Mapping[str, torch.Tensor], required: list[list[str]]) -> dict[str, dict[str, torch.Tensor]]:
    starts = {
        name[: len(name) - len(key)] for key in required[0] for name in state if name == key or name.endswith(f".{key}")
    }
    fitting = sorted(p for p in starts if all(any(p + key in state for key in group) for group in required))
    return {p: {k.removeprefix(p): v for k, v in state.items() if k.startswith(p)} for p in fitting}


def _choose(
    found: Mapping[str, Mapping[str, torch.Tensor]],
    own: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    where: object,
    ema: bool | None,
) -> tuple[str, tuple[str, ...], bool]:
    averaged = {p for p in found if is_averaged(p) or f"{p.removesuffix('module.')}{AVERAGE_COUNTER}" in state}
    raw = [p for p in found if p not in averaged]
    pool = sorted(averaged) if ema or (ema is None and not raw) else raw
    if not pool:
        raise missing_kind(found, where, bool(ema))
    others = tuple(p or "no prefix" for p in found if p not in pool)
    same_shapes = [p for p in pool if all(found[p][k].shape == own[k].shape for k in own if k in found[p])]
    pool = same_shapes or pool
    usual = [p for p in ("", *_USUAL_PREFIXES) if p in pool]
    if len(pool) > 1 and not usual:
        raise InputError(
            "several networks in the checkpoint fit the model",
            where=where,
            found=f"the prefixes {listed(pool)}",
            fix="save the state dict of one of them",
        )
    chosen = usual[0] if usual else pool[0]
    return chosen, others, chosen in averaged


def _with_tied(tensors: Mapping[str, torch.Tensor], required: list[list[str]]) -> dict[str, torch.Tensor]:
    """Add tied keys that the file leaves out because another key has the same tensor."""
    complete = dict(tensors)
    for group in required:
        present = next((k for k in group if k in tensors), None)
        if present is not None:
            complete |= {k: tensors[present] for k in group if k not in tensors}
    return complete


def _is_extra(name: str) -> bool:
    return name.rpartition(".")[2] in _PROFILER_BUFFERS


def _short(name: str) -> str:
    return ".".join(segment for segment in name.split(".") if segment not in _CONTAINERS)


def _normalized(names: Iterable[str]) -> dict[str, str] | None:
    """Keys without the names of wrappers; None if two keys become one."""
    short = {name: _short(name) for name in names}
    return short if len(set(short.values())) == len(short) else None
