"""Reads weight files into state dicts and modules, and writes them. Code in a file is never executed."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskplan.pipeline.core.errors import InputError, listed

if TYPE_CHECKING:
    import torch
    from torch import nn

_WRAPPER_KEYS = ("state_dict", "model_state_dict", "model", "net", "module", "model_ema")
_PREFIXES = ("module.", "_orig_mod.")
METADATA_KEY = "maskplan"


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a `.safetensors` file, or a PyTorch file with `weights_only=True`.

    A state dict inside a training checkpoint is found, and the prefixes of DataParallel and `torch.compile` are removed.

    Raises:
        InputError: The file is missing, truncated, without tensors, or a pickle that would run code.
    """
    if not path.is_file():
        raise InputError("checkpoint not found", where=path, fix="check the path given to --weights")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    return _unwrap(content, path)


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
        raise _unreadable(path, error) from error
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise _unreadable(path, error) from error
    if not isinstance(value, dict):
        raise _unreadable(path, "metadata that is not a table")
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
        separate[name] = tensor.clone() if shared else tensor.contiguous()
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


def fit_weights(module: nn.Module, state: Mapping[str, torch.Tensor], *, where: object) -> None:
    """Load a state dict into a module, in place.

    Raises:
        InputError: Keys or shapes do not fit, or weights are NaN or infinite; the first few are named, all are counted.
    """
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
        )
        if keys
    ]
    if problems:
        raise InputError(
            "the checkpoint does not fit the model",
            where=where,
            found="; ".join(problems),
            fix="give the model that it was saved from; if the number of classes differs, add --classes N",
        )
    # Checked in the model's type: a value that is finite in float64 may be infinite in float32.
    typed = OrderedDict((k, state[k].to(v.dtype)) for k, v in own.items() if k in state)
    bad = [k for k, v in typed.items() if v.is_floating_point() and not bool(v.isfinite().all())]
    if bad:
        raise InputError(
            f"{len(bad)} tensors contain NaN or infinity",
            where=where,
            found=listed(bad),
            fix="use a checkpoint from before training diverged",
        )
    # The format versions of the installed libraries: the values above are already in their format, and MNASNet rejects
    # a state dict without versions.
    typed._metadata = own._metadata  # type: ignore[attr-defined]
    module.load_state_dict(typed, strict=False)


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _read_torch(path: Path) -> Mapping[str, Any]:
    import pickle  # noqa: TID251 - only for its exception; torch reads with weights_only

    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        if "Unsupported global" in text or "GLOBAL" in text or "unrecognized function" in text:
            raise InputError(
                "the checkpoint would run code while it loads; refused",
                where=path,
                found=_refused_global(text),
                fix="save only tensors: torch.save(model.state_dict(), F), or use safetensors",
            ) from error
        raise _unreadable(path, text.partition("\n")[0]) from error
    except Exception as error:  # torch's reader trusts the bytes, and corrupt ones raise many kinds of exceptions
        raise _unreadable(path, str(error).partition("\n")[0] or type(error).__name__) from error
    if not isinstance(content, Mapping):
        raise InputError(
            "no state dict in the checkpoint",
            where=path,
            found=type(content).__name__,
            fix="save model.state_dict()",
        )
    return content


def _refused_global(text: str) -> str:
    """The function or class that torch's error message names."""
    for marker in (
        "Unsupported global: GLOBAL ",
        "Trying to call reduce for unrecognized function ",
        "GLOBAL ",
    ):
        if marker in text:
            return text.partition(marker)[2].split(maxsplit=1)[0]
    return "a pickle opcode that tensors do not need"


def _unreadable(path: Path, error: object) -> InputError:
    return InputError(
        "the checkpoint cannot be read",
        where=path,
        found=str(error) or type(error).__name__,
        fix="it may be truncated: copy or download it again",
    )


def _unwrap(content: Mapping[str, Any], path: Path) -> dict[str, torch.Tensor]:
    import torch

    # Bounded: a mapping in a pickle may contain itself.
    for _ in _WRAPPER_KEYS:
        inner = next((content[k] for k in _WRAPPER_KEYS if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise InputError(
            "no tensors in the checkpoint",
            where=path,
            found=listed(content) or "nothing",
            fix="save model.state_dict()",
        )
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if all(k.startswith(prefix) for k in tensors):
                tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
                stripped = True
    return tensors
