"""Where learning stands: what a later process needs to go on to the same masks, in one safetensors file."""

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


@dataclass
class Progress:
    """Counters, and the best masks so far.

    Attributes:
        first: The judgment of the masks that learning started from.
        best: That of the best masks.
        best_masks: By weight name.
        steps: Done.
        epochs: Done.
        stale: Epochs since the best.
        minutes: CallTiming, in all processes that worked on this one after the other.
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
    """Everything that changes in learning. Noise and order follow from the seed and the counters.

    Attributes:
        key: Digest of what the learner was asked; a state answers no other question.
        progress: Counters and the best masks.
        logits: The gates, in the order of the masked net.
        adam: First and second moments, in the same order, and Adam's own count of steps.
        average: The running average of the gates; empty without one.
    """

    key: str
    progress: Progress
    logits: list[torch.Tensor]
    adam: list[dict[str, torch.Tensor]]
    average: list[torch.Tensor]


def state_key(options: LearnOptions, weights_sha256: str, start: Masks, images: tuple[str, ...]) -> str:
    """Digest of what decides the masks: not how long it may take, nor how often it is saved."""
    asked = encode(replace(options, budget_minutes=None, save_every=0))
    digest = hashlib.sha256(json.dumps([asked, weights_sha256, list(images)], sort_keys=True).encode())
    for name in sorted(start):
        digest.update(name.encode())
        digest.update(start[name].tobytes())
    return digest.hexdigest()


def save_state(state: LearnerState, path: Path) -> None:
    """Write a state, whole or not at all.

    Raises:
        HostError: The disk is full or the folder cannot be written; an earlier state is still there.
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
    """Read a state; None if there is none, or one of another question, which is then of no use here.

    Raises:
        InputError: The file cannot be read.
    """
    import safetensors.torch
    from safetensors import SafetensorError

    if not path.is_file():
        return None
    header = read_metadata(path) or {}
    if header.get("key") != key:
        log.warning("%s is of other weights, images or options: learning starts anew", path.name)
        return None
    try:
        return _state_of(safetensors.torch.load_file(path), header)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            "the learner's checkpoint cannot be read", where=path, found=error, fix="delete it and learn anew"
        ) from error


def _state_of(tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> LearnerState:
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
