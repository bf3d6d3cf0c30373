"""State dicts in the format of older versions of a module, such as MNASNet's and torchvision's transformers."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


def load_older_format(
    module: nn.Module, state: Mapping[str, torch.Tensor], versions: Mapping[str, Any] | None
) -> str | None:
    """Let a module read an older format of its own state dict, in place, if its class knows one.

    Classes state their format in `_version` and convert older ones in `_load_from_state_dict`; some then change the module's
    layers. A file that states no versions is tried as each older one.

    Args:
        module: Changed only if the whole state dict fits.
        state: Tensors by key, of the keys and shapes of some older version.
        versions: The `_metadata` of the state dict, if the file has it.

    Returns:
        A note on what was done; None if no version fits.
    """
    for metadata in _tries(module, versions):
        copied = copy.deepcopy(module)
        if _loads(copied, state, metadata):
            _loads(module, state, metadata)
            return "the state dict has an older format, which the model's class converts"
    return None


def _tries(module: nn.Module, versions: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The versions to try: those of the file, or older ones of every class outside torch.nn that has several."""
    own: Mapping[str, Any] = module.state_dict()._metadata  # type: ignore[attr-defined]
    versioned = {
        path: m
        for path, m in module.named_modules()
        if isinstance(m._version, int) and m._version > 1 and not type(m).__module__.startswith("torch.nn.")
    }
    if not versioned:
        return
    if versions is not None:
        yield versions
    newest = max(int(m._version) for m in versioned.values())
    for version in range(1, newest):
        older = {path: {"version": min(version, int(m._version))} for path, m in versioned.items()}
        yield {**own, **older}
    yield {**own, **{path: {} for path in versioned}}


def _loads(module: nn.Module, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> bool:
    given = OrderedDict(state)
    given._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = module.load_state_dict(given, strict=False)
    except Exception:  # the module's own conversion may raise anything for a format that it does not know
        return False
    missing = [k for k in result.missing_keys if not k.endswith("num_batches_tracked")]
    return not missing and not result.unexpected_keys
