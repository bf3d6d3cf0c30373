"""Can weights be updated under fixed masks? Old masks on fine-tuned weights, compared with masks learned for them.

    python benchmarks/accuracy/exchange.py vgg16_bn_quarter --weights F --data DIR --epochs 2

fine-tunes the dense network at three learning rates, writes exchange.json next to this script row by row, and rewrites
docs/results.md. Masks are chosen on `select`; `val` is read once, at the end of each row.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from accuracy import PATTERN, by_magnitude, dense_network, hits, network_parser, pruned, recalibrated
from cifar import HOW, load_cifar10, pixels
from dense import train
from torch import nn

from maskplan.pipeline.data.dataset import Dataset
from maskplan.pipeline.learning.evaluate import fraction_changed
from maskplan.pipeline.learning.masked_net import Masks
from maskplan.pipeline.learning.options import LearnOptions
from maskplan.pipeline.learning.trainer import learn_masks
from maskplan.pipeline.masking.policy import select_layers
from maskplan.pipeline.models.layers import trace_layers
from maskplan.pipeline.report.write import versions
from maskplan.pipeline.timing.compare_latency import cpu_name

# From light fine-tuning to a learning rate of training.
RATES = (0.001, 0.01, 0.1)


def magnitude(module: nn.Module) -> Masks:
    """Magnitude masks of our layers."""
    layers, _ = trace_layers(module, HOW)
    return by_magnitude(module, select_layers(layers, PATTERN).masked)


def learned(module: nn.Module, data: Dataset, options: LearnOptions, old: Masks | None = None) -> Masks:
    """Masks learned for a network, from its magnitudes or from other masks (as `mask --init`)."""
    start = magnitude(module) if old is None else old
    return learn_masks(module, start, PATTERN, HOW, data, options, favor_start=old is not None)[0]


def equal_groups(first: Masks, second: Masks) -> float:
    """Percent of groups that choose the same pattern."""
    return round(100 * (1 - fraction_changed(first, second, PATTERN.m)), 3)


def top1(module: nn.Module, masks: Masks, data: Dataset) -> float:
    """Percent of `val`, pruned and recalibrated."""
    return round(100 * float(hits(recalibrated(pruned(module, masks), data, dense=module), data.val).mean()), 3)


def main() -> None:
    """Fine-tune, learn and compare, one rate after the other."""
    parser = network_parser(__doc__, epochs=5)
    parser.add_argument("--tune-epochs", type=int, default=1)
    parser.add_argument(
        "--most", type=int, help="use only the first training images, up to this number; all by default"
    )
    args = parser.parse_args()
    data = load_cifar10(args.data, most=args.most)
    old = dense_network(args.model, args.weights, args.data)
    images, labels = pixels(data.train), torch.from_numpy(data.train.labels)
    options = LearnOptions(epochs=args.epochs, batch=128, augment="shift+flip", seed=args.seed)
    other_seed = LearnOptions(epochs=args.epochs, batch=128, augment="shift+flip", seed=args.seed + 1)
    masks = learned(old, data, options)
    rows: list[dict[str, Any]] = []
    result = {
        "model": args.model,
        "seed": args.seed,
        "command": f"python benchmarks/accuracy/exchange.py {args.model} --epochs {args.epochs}"
        f" --tune-epochs {args.tune_epochs}" + (f" --most {args.most}" if args.most else ""),
        "images": len(data.train),
        "device": cpu_name(),
        "versions": versions(),
        "learn_epochs": args.epochs,
        "tune_epochs": args.tune_epochs,
        "old_dense": round(100 * float(hits(old, data.val).mean()), 3),
        "old_masks_on_old_weights": top1(old, masks, data),
        "seed_to_seed_equal_groups_percent": equal_groups(masks, learned(old, data, other_seed)),
        "learned_to_magnitude_equal_groups_percent": equal_groups(masks, magnitude(old)),
        "rows": rows,
    }
    for rate in RATES:
        new = copy.deepcopy(old).to(memory_format=torch.channels_last)
        train(new, images, labels, args.tune_epochs, rate, args.seed, f"fine-tune at {rate:g}")
        new = new.eval().to(memory_format=torch.contiguous_format)
        relearned, from_old = learned(new, data, options), learned(new, data, options, masks)
        rows.append(
            {
                "rate": rate,
                "new_dense": round(100 * float(hits(new, data.val).mean()), 3),
                "old_masks": top1(new, masks, data),
                "relearned": top1(new, relearned, data),
                "from_old": top1(new, from_old, data),
                "magnitude": top1(new, magnitude(new), data),
                "equal_groups_percent": equal_groups(masks, relearned),
                "from_old_equal_groups_percent": equal_groups(masks, from_old),
            }
        )
        args.results.add("exchange", result)
        args.results.write_page()


if __name__ == "__main__":
    main()
