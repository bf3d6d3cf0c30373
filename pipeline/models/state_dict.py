"""Reads weight files into state dicts and modules, and writes them. Code in a file is never executed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.serialization import parse_json
from maskplan.pipeline.models.key_matching import match_keys, without_wrappers
from maskplan.pipeline.models.older_formats import load_older_format
from maskplan.pipeline.models.reparametrization import describe_folded, fold_module, fold_state, is_reparametrized
from maskplan.pipeline.models.state_selection import StateDict, missing_kind, select_state
from maskplan.pipeline.models.weight_files import read_content, unreadable

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    import torch
    from torch import nn

METADATA_KEY = "maskplan"


def read_weights(path: Path, *, ema: bool | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a weights file, under the file's own keys; see `read_state`."""
    return read_state(path, ema=ema).tensors


def read_state(path: Path, *, ema: bool | None = None) -> StateDict:
    """Read a `.safetensors` file, a PyTorch file with `weights_only=True`, or the index of a sharded checkpoint.

    A state dict inside a training checkpoint is found. Sparse and quantized tensors become dense ones.

    Args:
        path: The file.
        ema: Take averaged weights (True) or raw ones (False); None prefers raw ones and names the others in the log.

    Raises:
        InputError: The file is missing, truncated, without tensors, or a pickle that would run code.
    """
    return select_state(read_content(path), path, ema)


def read_metadata(path: Path) -> dict[str, Any] | None:
    """The metadata that maskplan wrote into a safetensors header, or None for a file of another tool.

    Raises:
        InputError: Not a safetensors file, or a header that is not JSON.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error
    if text is None:
        return None
    try:
        value = parse_json(text)
    except ValueError as error:
        raise unreadable(path, error) from error
    if not isinstance(value, dict):
        raise unreadable(path, "metadata that is not a table")
    return value


def serialize(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> bytes:
    """The bytes of a safetensors file, identical for identical content.

    All metadata is under one key, because safetensors writes several keys in an order that differs between runs.
    """
    import safetensors.torch

    text = json.dumps(metadata, sort_keys=True)
    owners: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        # A layer under two names shares its memory, which safetensors rejects.
        shared = tensor.untyped_storage().data_ptr() in owners
        # Contiguous first: a clone keeps strides such as those of channels-last.
        separate[name] = tensor.contiguous().clone() if shared else tensor.contiguous()
        owners.add(tensor.untyped_storage().data_ptr())
    return safetensors.torch.save(separate, {METADATA_KEY: text})


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest of names, types, shapes and values, independent of the file format."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fit_weights(
    module: nn.Module, state: Mapping[str, torch.Tensor] | StateDict, *, where: object, ema: bool | None = None
) -> None:
    """Load weights into a module, in place, and fold reparametrized weights of module and file into plain ones.

    Keys are matched to the model's own: prefixes and names of wrappers are removed where the model lacks them.

    Args:
        module: The model. A reparametrized one (weight normalization, pruning) is plain afterwards.
        state: Tensors by the file's keys.
        where: The file, for messages.
        ema: As for `read_state`, for files that tell averaged weights by prefixes.

    Raises:
        InputError: Keys or shapes do not fit, or weights are NaN or infinite; the first few are named, all are counted.
    """
    if not isinstance(state, StateDict):
        state = StateDict(dict(state))
    if is_reparametrized(module):
        match = match_keys(state.tensors, module.state_dict(), where=where, ema=_prefix_kind(state, ema))
        if match is not None:
            _load(module, match.tensors, state.versions, where)
            fold_with_note(module, where)
            return
        fold_with_note(module, where)
    folded = fold_state(state.tensors)
    if folded.folded:
        log.info("%s: folded into plain weights: %s", _name(where), describe_folded(folded.folded))
    if folded.masks:
        log.info(
            "%s: the pruning masks of %d weights are applied; `maskplan mask --init` takes them from this file",
            _name(where),
            len(folded.masks),
        )
    match = match_keys(folded.tensors, module.state_dict(), where=where, ema=_prefix_kind(state, ema))
    if match is None:
        if ema and not state.averaged:
            raise missing_kind(["no averaged weights that fit the model"], where, ema=True)
        _load(module, without_wrappers(folded.tensors, module.state_dict()), state.versions, where)
        return
    if match.averaged:
        others = "; --no-ema uses the raw ones" if match.others else ""
        log.info("%s: averaged weights (EMA or SWA) are used%s", _name(where), others)
    elif match.others:
        log.info("%s: raw weights are used; --ema uses the averaged ones (%s)", _name(where), listed(match.others))
    left_out = [k for k in match.left_out if not any(k.startswith(p) for p in match.others)]
    if left_out:
        log.info("%s: %d tensors do not belong to the model: %s", _name(where), len(left_out), listed(left_out))
    _load(module, match.tensors, state.versions, where)


def fold_with_note(module: nn.Module, where: object) -> None:
    """Fold a module's reparametrized weights and log what was folded."""
    folded = fold_module(module)
    if folded:
        log.info("%s: folded into plain weights: %s", _name(where), describe_folded(folded))


def stored_masks(path: Path) -> dict[str, npt.NDArray[np.bool_]]:
    """The pruning masks in a checkpoint of `torch.nn.utils.prune` or Apex ASP, by the weight's key; empty without any.

    Raises:
        InputError: The file cannot be read.
    """
    return {name: mask.cpu().numpy() for name, mask in fold_state(read_weights(path)).masks.items()}


def _prefix_kind(state: StateDict, ema: bool | None) -> bool | None:
    """The kind of weights to look for behind prefixes; a state dict that was chosen as averaged has no prefix for it."""
    return None if state.averaged else ema


def _name(where: object) -> object:
    return where.name if isinstance(where, Path) else where


def _load(
    module: nn.Module, state: Mapping[str, torch.Tensor], versions: Mapping[str, Any] | None, where: object
) -> None:
    """Load tensors by the model's own keys, in place, after checking keys, shapes and values."""
    own = module.state_dict()
    # Old checkpoints have no batch counter, which inference does not use.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    reshaped = [
        f"{k} is {tuple(state[k].shape)}, the model has {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    problems = [
        f"{len(keys)} {kind}: {listed(keys)}"
        for kind, keys in (
            ("missing", missing),
            ("not in the model", unexpected),
            ("with another shape", reshaped),
            ("complex, where the model is real", [k for k in own if k in state and _loses_imaginary(state[k], own[k])]),
        )
        if keys
    ]
    if problems and (upgraded := load_older_format(module, state, versions)) is not None:
        log.info("%s: %s", _name(where), upgraded)
        _require_finite({k: v for k, v in module.state_dict().items() if k in state}, where)
        return
    if problems:
        raise InputError(
            "the checkpoint does not fit the model",
            where=where,
            found="; ".join(problems),
            fix="build the model with its parametrizations, so that they can be evaluated"
            if any(".parametrizations." in f".{k}" for k in unexpected)
            else "give the model that it was saved from; if the number of classes differs, add --classes N",
        )
    # Checked in the model's type: a value that is finite in float64 may be infinite in float32.
    typed = OrderedDict((k, state[k].to(v.dtype)) for k, v in own.items() if k in state)
    _require_finite(typed, where)
    # The format versions of the installed libraries: the values above are already in their format, and MNASNet rejects
    # a state dict without versions.
    typed._metadata = own._metadata  # type: ignore[attr-defined]
    module.load_state_dict(typed, strict=False)


def _loses_imaginary(given: torch.Tensor, own: torch.Tensor) -> bool:
    return given.is_complex() and not own.is_complex()


def _require_finite(state: Mapping[str, torch.Tensor], where: object) -> None:
    bad = [k for k, v in state.items() if v.is_floating_point() and not bool(v.isfinite().all())]
    if bad:
        raise InputError(
            f"{len(bad)} tensors contain NaN or infinity",
            where=where,
            found=listed(bad),
            fix="use a checkpoint from before training diverged",
        )
