"""Accuracy of a network of full width in a given time: train it, learn its masks, measure. Used by benchmarks/gpu.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import torch
from accuracy import PATTERN, by_magnitude, hits, paired, pruned, recalibrated
from cifar import HOW, load_cifar10, pixels
from dense import train
from torch import nn

from maskplan.pipeline.learning.options import LearnOptions
from maskplan.pipeline.learning.trainer import learn_masks
from maskplan.pipeline.masking.policy import select_layers
from maskplan.pipeline.models.layers import trace_layers

_MOST_EPOCHS = 30
# Learning rate at a batch of 128; it grows with the root of the batch.
_RATE = 0.2
_TRIAL_STEPS = 8


def measure_network(
    name: str, folder: Path, seconds: float, device: str, save: Callable[[dict[str, Any]], None], batch: int
) -> None:
    """Train, learn and measure; `save` gets the rows known so far, last with the learned masks."""
    started = time.monotonic()
    data = load_cifar10(folder)
    torch.manual_seed(0)
    net: nn.Module = getattr(models, name)()
    layers, _ = trace_layers(net.eval(), HOW)
    images, labels = pixels(data.train).to(device), torch.from_numpy(data.train.labels).to(device)
    loaded_s = time.monotonic() - started
    net = net.to(device, memory_format=torch.channels_last)
    rate = _RATE * (batch / 128) ** 0.5
    epoch_s = _epoch_s(name, images, labels, batch, device)
    epochs = max(1, min(_MOST_EPOCHS, int(0.4 * seconds / epoch_s)))
    train(net, images, labels, epochs, rate, 0, name, batch)
    trained_s = time.monotonic() - started
    net = net.eval().to("cpu", memory_format=torch.contiguous_format)
    chosen = select_layers(layers, PATTERN).masked
    magnitude = by_magnitude(net, chosen)
    row: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "masked_layers": len(chosen),
        "batch": batch,
        "dense_epochs": epochs,
        "load_s": round(loaded_s, 1),
        "dense_s": round(trained_s, 1),
        "val_images": len(data.val),
    }
    on_device = net.to(device)
    right = {"dense": hits(on_device, data.val)}
    right["magnitude, recalibrated"] = hits(recalibrated(pruned(on_device, magnitude), data, dense=on_device), data.val)

    def rows() -> dict[str, Any]:
        return {
            key: {"top1": round(100 * float(found.mean()), 3)} | paired(right["dense"], found)
            for key, found in right.items()
        }

    save(row | {"rows": rows()})
    budget_s = max(1.0, 0.85 * (seconds - (time.monotonic() - started)))
    options = LearnOptions(epochs=_MOST_EPOCHS, batch=128, augment="shift+flip", budget_minutes=budget_s / 60)
    learned, learning = learn_masks(net.to("cpu"), magnitude, PATTERN, HOW, data, options)
    on_device = net.to(device)
    right["maskplan, recalibrated"] = hits(recalibrated(pruned(on_device, learned), data, dense=on_device), data.val)
    row |= {"epochs": learning.epochs, "learn_s": round(time.monotonic() - started - trained_s, 1)}
    save(row | {"groups_moved_percent": round(100 * learning.groups_changed, 2), "rows": rows()})


def _epoch_s(name: str, images: torch.Tensor, labels: torch.Tensor, batch: int, device: str) -> float:
    """Seconds of an epoch, from a few steps of a network that is thrown away; the first steps load kernels."""
    net = getattr(models, name)().to(device, memory_format=torch.channels_last)
    count = min(_TRIAL_STEPS * batch, len(images) // batch * batch)
    for _ in range(2):
        started = time.monotonic()
        train(net, images[:count], labels[:count], 1, 0.01, 0, "trial", batch)
        took = time.monotonic() - started
    return took * len(images) / count
