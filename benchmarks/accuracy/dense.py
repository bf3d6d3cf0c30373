"""Train a dense network on CIFAR-10 until more epochs gain nothing.

    python benchmarks/accuracy/dense.py resnet20 --data DIR --out resnet20.safetensors [--epochs 30] [--more 20]

writes the weights and, next to them, a JSON file with the accuracy and the gains of further epochs. Further epochs are
kept while they gain at least 0.2 points.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import models
import torch
from cifar import load_cifar10, normalized, pixels, shifted_and_flipped
from torch import nn
from torch.nn import functional as F

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.files import write_atomically, write_json
from maskplan.pipeline.core.progress import track
from maskplan.pipeline.models.state_dict import fit_weights, read_weights, serialize
from maskplan.pipeline.report.write import versions
from maskplan.pipeline.timing.compare_latency import cpu_name

BATCH, DECAY, SMOOTHING = 128, 5e-4, 0.0
# In points of top-1; a network that gains less from more epochs counts as converged.
CONVERGED = 0.2


def accuracy(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 in percent."""
    net.eval()
    right = 0
    with torch.no_grad():
        for at in range(0, len(images), 512):
            right += int((net(normalized(images[at : at + 512])).argmax(1) == labels[at : at + 512]).sum())
    return 100 * right / len(images)


def train(
    net: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    epochs: int,
    peak: float,
    seed: int,
    name: str,
    batch_size: int = BATCH,
    *,
    bf16: bool = False,
) -> None:
    """SGD with momentum; the learning rate rises over the first fifth and then falls to nearly zero."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), peak, momentum=0.9, weight_decay=DECAY, nesterov=True)
    steps = epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.2)
    net.train()
    orders = (torch.randperm(len(images), generator=generator) for _ in range(epochs))
    starts = range(0, len(images) - batch_size + 1, batch_size)
    batches = (order[at : at + batch_size] for order in orders for at in starts)
    for batch in track(batches, name, steps):
        x = normalized(shifted_and_flipped(images[batch], generator))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = net(x)
        loss = F.cross_entropy(logits.float(), labels[batch], label_smoothing=SMOOTHING)
        if not bool(loss.isfinite()):
            raise InputError("the loss is not a number", where=name, fix="lower --rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def arguments() -> list[str]:
    """The command's arguments without folders, for the record."""
    return [Path(argument).name if "/" in argument else argument for argument in sys.argv[1:]]


def main() -> None:
    """Train; then continue for `--more` epochs at a time until they gain less than 0.2 points on `select`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a function of models.py")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="weights to continue from, instead of training from scratch")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--more", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3, help="maximum number of continuations")
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16, twice as fast on CPUs with AMX")
    args = parser.parse_args()
    data = load_cifar10(args.data)
    images, labels = pixels(data.train), torch.from_numpy(data.train.labels)
    select, select_labels = pixels(data.select), torch.from_numpy(data.select.labels)
    torch.manual_seed(args.seed)
    net: nn.Module = getattr(models, args.model)().to(memory_format=torch.channels_last)
    started = time.monotonic()
    epochs = 0
    if args.weights:
        fit_weights(net, read_weights(args.weights), where=args.weights)
        record = args.weights.with_suffix(".json")
        epochs = json.loads(record.read_text())["epochs"] if record.is_file() else 0
    else:
        epochs = args.epochs
        train(net, images, labels, epochs, args.rate, args.seed, f"train {args.model}", bf16=args.bf16)
    gains: list[float] = []
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/accuracy/dense.py", *arguments()]),
        "device": cpu_name(),
        "versions": versions(),
        "epochs": epochs,
        "more_epochs": args.more,
        "select_top1": accuracy(net, select, select_labels),
        "gains": gains,
    }

    def keep() -> None:
        write_atomically(args.out, serialize(net.state_dict(), {}))
        write_json(args.out.with_suffix(".json"), result | {"minutes": round((time.monotonic() - started) / 60, 1)})

    keep()
    for turn in range(args.rounds if args.more else 0):
        longer = copy.deepcopy(net)
        seed = args.seed + 1 + turn
        train(longer, images, labels, args.more, args.rate / 4, seed, f"{args.more} more epochs", bf16=args.bf16)
        reached = accuracy(longer, select, select_labels)
        gains.append(round(reached - result["select_top1"], 3))
        print(f"{args.more} more epochs: {gains[-1]:+.2f} points", flush=True)
        if gains[-1] >= CONVERGED:
            net = longer
            result |= {"epochs": result["epochs"] + args.more, "select_top1": reached}
        keep()
        if gains[-1] < CONVERGED:
            break
    print(result)


if __name__ == "__main__":
    main()
