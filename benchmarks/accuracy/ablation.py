"""Ablation of the recipe: one part changed at a time, evaluated on the `select` part; `val` is never read.

    python benchmarks/accuracy/ablation.py resnet20 --weights resnet20.safetensors --data DIR --epochs 2

adds each row to ablation.json next to this script as soon as it is done, and rewrites docs/results.md. Existing rows
are not run again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from accuracy import PATTERN, by_magnitude, dense_network, network_parser
from cifar import HOW, load_cifar10

from maskplan.pipeline.learning.options import LearnOptions
from maskplan.pipeline.learning.trainer import learn_masks
from maskplan.pipeline.masking.policy import select_layers
from maskplan.pipeline.models.layers import trace_layers
from maskplan.pipeline.report.write import versions
from maskplan.pipeline.timing.compare_latency import cpu_name

# The options that each row changes.
CHANGES: dict[str, dict[str, Any]] = {
    "maskplan": {},
    "soft samples, tau to 0.1": {"hard": False, "tau_end": 0.1},
    "no magnitude prior": {"init_std": 0.0},
    "labels, no distillation": {"distill": 0.0},
    "full noise to the end": {"noise_start": 1.0, "noise_end": 1.0},
    "no noise": {"noise_start": 0.0},
    "rate 0.02": {"lr": 0.02},
    "no augmentation": {"augment": "none"},
    "soft samples": {"hard": False},
    "tau to 0.1": {"tau_end": 0.1},
    "labels and distillation": {"distill": 0.5},
    "running average of gates": {"ema": 0.99},
    "reward for kept norm": {"norm_reward": 1.0},
}


def main() -> None:
    """Run the missing rows."""
    parser = network_parser(__doc__, epochs=2)
    parser.add_argument("--rows", nargs="+", choices=list(CHANGES), default=list(CHANGES))
    args = parser.parse_args()
    data = load_cifar10(args.data)
    module = dense_network(args.model, args.weights, args.data)
    layers, _ = trace_layers(module, HOW)
    magnitude = by_magnitude(module, select_layers(layers, PATTERN).masked)
    baseline = LearnOptions(epochs=args.epochs, batch=128, augment="shift+flip", seed=args.seed)
    key = {"model": args.model, "epochs": args.epochs, "seed": args.seed}
    for row in args.rows:
        if any(r["row"] == row and {k: r[k] for k in key} == key for r in args.results.read("ablation")):
            continue
        options = dataclasses.replace(baseline, **CHANGES[row])
        _, learning = learn_masks(module, magnitude, PATTERN, HOW, data, options)
        result = key | {
            "row": row,
            "changed": CHANGES[row],
            "command": f"python benchmarks/accuracy/ablation.py {args.model} --epochs {args.epochs} --seed {args.seed}",
            "device": cpu_name(),
            "versions": versions(),
            "minutes": round(learning.seconds / 60, 1),
            "groups_moved_percent": round(100 * learning.groups_changed, 2),
            "select_images": len(data.select),
            "select_divergence_magnitude": learning.select_divergence_start,
            "select_top1_magnitude": learning.select_top1_start,
            "select_divergence": learning.select_divergence_end,
            "select_top1": learning.select_top1_end,
        }
        args.results.add("ablation", result, (*key, "row"))
        args.results.write_page()


if __name__ == "__main__":
    main()
