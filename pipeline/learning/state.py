"""The learner's checkpoint: all that a later process needs to reach the same masks, in one safetensors file."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.files import write_atomically
from maskplan.pipeline.core.serialization import encode
from maskplan.pipeline.learning.evaluate import MaskScore
from maskplan.pipeline.learning.masked_net import Masks
from maskplan.pipeline.learning.options import LearnOptions
from maskplan.pipeline.models.state_dict import read_metadata, serialize

log = logging.getLogger(__name__)

# Increase this when the same options lead to other masks, or the file has other contents: learning then restarts.
_VERSION = 2


@dataclass
class Progress:
    """Counters, and the best masks so far.

    Attributes:
        first: Score of the masks that learning started from.
        best: Score of the best masks so far.
        best_masks: The best masks by weight name.
        steps: Steps done.
        epochs: Epochs done.
        stale: Epochs since the best masks.
        minutes: Learning time, summed over interrupted runs.
    """

    first: MaskScore
    best: MaskScore
    best_masks: Masks = field(repr=False)
    steps: int = 0
    epochs: int = 0
    stale: int = 0
    minutes: float = 0.0


@dataclass
class LearnerState:
    """Everything that changes during learning. Noise and image order follow from the seed and the counters.

    Attributes:
        key: Digest of the learner's inputs and options (`state_key`); other runs do not resume from this state.
        progress: Counters and the best masks.
        logits: The gates, in the order of the masked net.
        adam: Adam's first and second moments and step counts, in the same order.
        average: Moving average of the gates; empty if there is none.
    """

    key: str
    progress: Progress
    logits: list[torch.Tensor]
    adam: list[dict[str, torch.Tensor]]
    average: list[torch.Tensor]


def state_key(options: LearnOptions, weights_sha256: str, start: Masks, image_digests: tuple[str, ...]) -> str:
    """Digest of everything that decides the learned masks; the time budget and `save_every` do not."""
    relevant = encode(replace(options, budget_minutes=None, save_every=0))
    digest = hashlib.sha256(
        json.dumps([_VERSION, relevant, weights_sha256, list(image_digests)], sort_keys=True).encode()
    )
    for name in sorted(start):
        digest.update(name.encode())
        digest.update(start[name].tobytes())
    return digest.hexdigest()


def save_state(state: LearnerState, path: Path) -> None:
    """Write a state atomically.

    Raises:
        HostError: The disk is full or the folder is not writable; an earlier state is kept.
    """
    tensors: dict[str, torch.Tensor] = {}
    for i, logits in enumerate(state.logits):
        tensors[f"logits.{i}"] = logits.detach().cpu()
        for name, moment in state.adam[i].items() if state.adam else ():
            tensors[f"adam.{i}.{name}"] = moment.detach().cpu()
        if state.average:
            tensors[f"average.{i}"] = state.average[i].cpu()
    progress = state.progress
    for name, mask in progress.best_masks.items():
        tensors[f"mask:{name}"] = torch.from_numpy(mask)
    counters = {k: getattr(progress, k) for k in ("steps", "epochs", "stale", "minutes")}
    header = {"key": state.key, "first": encode(progress.first), "best": encode(progress.best), **counters}
    write_atomically(path, serialize(tensors, header))


def load_state(path: Path, key: str) -> LearnerState | None:
    """Read a state; None if there is none, or if it belongs to other inputs or options.

    Raises:
        InputError: The file cannot be read.
    """
    import safetensors.torch
    from safetensors import SafetensorError

    if not path.is_file():
        return None
    header = read_metadata(path) or {}
    if header.get("key") != key:
        log.warning(
            "%s was made with other weights, images or options, or by another version of maskplan: learning restarts",
            path.name,
        )
        return None
    try:
        return _parse_state(safetensors.torch.load_file(path), header)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            "the learner's checkpoint cannot be read",
            where=path,
            found=error,
            fix="delete the file to restart learning",
        ) from error


def _parse_state(tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> LearnerState:
    count = sum(name.startswith("logits.") for name in tensors)
    adam = [{n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(f"adam.{i}.")} for i in range(count)]
    progress = Progress(
        first=MaskScore(**header["first"]),
        best=MaskScore(**header["best"]),
        best_masks={n.removeprefix("mask:"): t.numpy() for n, t in tensors.items() if n.startswith("mask:")},
        steps=int(header["steps"]),
        epochs=int(header["epochs"]),
        stale=int(header["stale"]),
        minutes=float(header["minutes"]),
    )
    average = [tensors[f"average.{i}"] for i in range(count) if f"average.{i}" in tensors]
    logits = [tensors[f"logits.{i}"] for i in range(count)]
    return LearnerState(str(header["key"]), progress, logits, adam if any(adam) else [], average)
