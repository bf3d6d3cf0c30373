"""Weight files to state dicts, and whether they fit a module. Nothing in a file is ever executed."""

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

_WRAPPINGS = ("state_dict", "model_state_dict", "model", "net", "module", "model_ema")
_PREFIXES = ("module.", "_orig_mod.")
METADATA_KEY = "maskplan"


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read `.safetensors`, or a PyTorch file with `weights_only=True`; the usual wrappings and prefixes are undone.

    Raises:
        InputError: The file is missing, truncated, holds no tensors, or is a pickle that wants to run code.
    """
    if not path.is_file():
        raise InputError("checkpoint not found", where=path, fix="check the path given to --weights")
    found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    return _unwrap(found, path)


def read_metadata(path: Path) -> dict[str, Any] | None:
    """What maskplan wrote into a safetensors header, or None for a file of another tool.

    Raises:
        InputError: Not a safetensors file, or a header that is not JSON.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise _damaged(path, error) from error
    if not isinstance(value, dict):
        raise _damaged(path, "metadata that is not a table")
    return value


def serialize(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> bytes:
    """A safetensors file's bytes, the same for the same content.

    All metadata lies under one key: safetensors writes several keys in an order that changes from run to run.
    """
    import safetensors.torch

    text = json.dumps(metadata, sort_keys=True)
    owners: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        # A layer under two names is one memory, which safetensors refuses.
        shared = tensor.untyped_storage().data_ptr() in owners
        separate[name] = tensor.clone() if shared else tensor.contiguous()
        owners.add(tensor.untyped_storage().data_ptr())
    return safetensors.torch.save(separate, {METADATA_KEY: text})


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest of names, types, shapes and values, whatever file they came from."""
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
        InputError: Keys or shapes do not fit, or weights are NaN or infinite; the first few are named and all counted.
    """
    own = module.state_dict()
    # Old checkpoints lack the batch counter, which inference does not use.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    reshaped = [
        f"{k} is {tuple(state[k].shape)} where the model has {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    problems = [
        f"{len(keys)} {kind}: {listed(keys)}"
        for kind, keys in (
            ("missing", missing),
            ("not in the model", unexpected),
            ("of another shape", reshaped),
        )
        if keys
    ]
    if problems:
        raise InputError(
            "the checkpoint does not fit the model",
            where=where,
            found="; ".join(problems),
            fix="give the model that it was saved from; for another number of classes add --classes N",
        )
    # In the model's type: what is finite in a wider one need not be.
    typed = OrderedDict((k, state[k].to(v.dtype)) for k, v in own.items() if k in state)
    bad = [k for k, v in typed.items() if v.is_floating_point() and not bool(v.isfinite().all())]
    if bad:
        raise InputError(
            f"{len(bad)} tensors hold NaN or infinity",
            where=where,
            found=listed(bad),
            fix="use a checkpoint from before training diverged",
        )
    # With it torch tells formats of old apart, and MNASNet refuses weights without; what `own` says is this library's.
    typed._metadata = own._metadata  # type: ignore[attr-defined]
    module.load_state_dict(typed, strict=False)


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _read_torch(path: Path) -> Mapping[str, Any]:
    import pickle  # noqa: TID251 - only to name its error; torch reads with weights_only

    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        if "Unsupported global" in text or "GLOBAL" in text or "unrecognized function" in text:
            raise InputError(
                "the checkpoint wants to run code while it loads; refused",
                where=path,
                found=_offender(text),
                fix="save only tensors: torch.save(model.state_dict(), F), or use safetensors",
            ) from error
        raise _damaged(path, text.partition("\n")[0]) from error
    except Exception as error:  # torch's reader trusts the bytes, and what it meets decides what it raises
        raise _damaged(path, str(error).partition("\n")[0] or type(error).__name__) from error
    if not isinstance(found, Mapping):
        raise InputError(
            "no state dict in the checkpoint",
            where=path,
            found=type(found).__name__,
            fix="save model.state_dict()",
        )
    return found


def _offender(text: str) -> str:
    for marker in (
        "Unsupported global: GLOBAL ",
        "Trying to call reduce for unrecognized function ",
        "GLOBAL ",
    ):
        if marker in text:
            return text.partition(marker)[2].split(maxsplit=1)[0]
    return "a pickle opcode that is not for tensors"


def _damaged(path: Path, error: object) -> InputError:
    return InputError(
        "the checkpoint cannot be read",
        where=path,
        found=str(error) or type(error).__name__,
        fix="it may be truncated: copy or download it again",
    )


def _unwrap(found: Mapping[str, Any], path: Path) -> dict[str, torch.Tensor]:
    import torch

    for _ in _WRAPPINGS:
        inner = next((found[k] for k in _WRAPPINGS if isinstance(found.get(k), Mapping)), None)
        if inner is None:
            break
        found = inner
    tensors = {str(k): v for k, v in found.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise InputError(
            "no tensors in the checkpoint",
            where=path,
            found=listed(found) or "nothing",
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
