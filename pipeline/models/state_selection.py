"""Finds the state dict within a training checkpoint: behind the usual keys, raw or averaged weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskplan.pipeline.core.errors import InputError, listed

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_WRAPPER_KEYS = ("state_dict", "model_state_dict", "model", "net", "module")
_AVERAGED_WORDS = frozenset(("ema", "swa", "averaged", "shadow"))
AVERAGE_COUNTER = "n_averaged"
"""The buffer of `torch.optim.swa_utils.AveragedModel`."""


@dataclass(frozen=True)
class StateDict:
    """Tensors of a weights file.

    Attributes:
        tensors: By name, as in the file.
        versions: The `_metadata` that PyTorch stores with a state dict; None in other files.
        averaged: Whether they are known to be averaged weights (EMA or SWA).
    """

    tensors: dict[str, torch.Tensor]
    versions: Mapping[str, Any] | None = None
    averaged: bool = False


def is_averaged(name: str) -> bool:
    """Whether a key or prefix names averaged weights: one of its words is `ema`, `swa`, `averaged` or `shadow`."""
    return not _AVERAGED_WORDS.isdisjoint(re.split(r"[^a-z]+", name.lower()))


def select_state(content: Mapping[str, Any], path: Path, ema: bool | None) -> StateDict:
    """Descend to the state dict of a checkpoint's content.

    Args:
        content: What `read_content` returned.
        path: For messages.
        ema: Take averaged weights (True) or raw ones (False); None prefers raw ones and names the others in the log.

    Raises:
        InputError: There are no tensors, or only weights of the other kind.
    """
    import torch

    averaged, others = False, []
    # Bounded: a mapping in a pickle may contain itself.
    for _ in range(8):
        raw = [k for k in _WRAPPER_KEYS if isinstance(content.get(k), Mapping)]
        averages = [
            k
            for k, v in content.items()
            if isinstance(k, str) and is_averaged(k) and isinstance(v, Mapping) and _has_tensors(v, torch.Tensor)
        ]
        if averages and (ema or not (raw or _has_own_tensors(content, torch.Tensor))):
            if ema is False:
                raise missing_kind(averages[:1], path, ema=False)
            others = raw or (["its own tensors"] if _has_own_tensors(content, torch.Tensor) else [])
            averaged, content = True, content[averages[0]]
        elif raw:
            others = others or averages
            content = content[raw[0]]
        else:
            others = others or averages
            break
    tensors = {
        str(k): t for k, v in content.items() if (t := _as_tensor(v)) is not None and _is_state_of(str(k), content)
    }
    if not tensors:
        raise InputError(
            "no tensors in the checkpoint",
            where=path,
            found=listed(content) or "nothing",
            fix="save model.state_dict()",
        )
    unusable = [k for k, v in tensors.items() if v.is_meta]
    if unusable:
        raise InputError(
            f"{len(unusable)} tensors have no values: they are on the device 'meta'",
            where=path,
            found=listed(unusable),
            fix="save the state dict after the weights were loaded",
        )
    if averaged:
        log.info(
            "%s: averaged weights (EMA or SWA) are used%s", path.name, "; --no-ema uses the raw ones" * bool(others)
        )
    elif others:
        log.info("%s: raw weights are used; --ema uses the averaged ones (%s)", path.name, listed(others))
    return StateDict({k: _plain(v, k, path) for k, v in tensors.items()}, getattr(content, "_metadata", None), averaged)


def missing_kind(found: Iterable[str], path: object, ema: bool) -> InputError:
    """The error for a checkpoint without the kind of weights that `--ema` or `--no-ema` requests."""
    if ema:
        return InputError(
            "the checkpoint has no averaged weights",
            where=path,
            found=listed(found),
            fix="omit --ema: raw weights exist",
        )
    return InputError(
        "the checkpoint has no raw weights, only averaged ones", where=path, found=listed(found), fix="omit --no-ema"
    )


def _as_tensor(value: object) -> torch.Tensor | None:
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.array(value))
    return None


def _is_state_of(name: str, content: Mapping[str, Any]) -> bool:
    """Single NumPy arrays beside tensors are not weights: losses, statistics, random states."""
    import torch

    has_tensors = any(isinstance(v, torch.Tensor) for v in content.values())
    return not has_tensors or isinstance(content.get(name), torch.Tensor)


def _has_own_tensors(content: Mapping[str, Any], kind: type) -> bool:
    return any(isinstance(v, kind) for v in content.values())


def _has_tensors(content: Mapping[str, Any], kind: type, depth: int = 4) -> bool:
    return any(
        isinstance(v, kind) or (depth > 0 and isinstance(v, Mapping) and _has_tensors(v, kind, depth - 1))
        for v in content.values()
    )


def _plain(tensor: torch.Tensor, name: str, path: Path) -> torch.Tensor:
    """A dense, strided tensor with the values of a sparse or quantized one."""
    import torch

    try:
        if tensor.is_quantized:
            return tensor.detach().dequantize()
        if tensor.layout != torch.strided or tensor.is_nested:
            return tensor.detach().to_dense()
    except Exception as error:  # kernels for unusual layouts raise many kinds of exceptions
        raise InputError(
            f"a tensor of the layout {tensor.layout} cannot be read",
            where=path,
            found=f"{name}: {str(error).partition(chr(10))[0]}",
            fix="save dense tensors",
        ) from error
    return tensor.detach()
