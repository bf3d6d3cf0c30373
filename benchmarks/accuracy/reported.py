"""Danhofer's recipe (2024) on CIFAR-10: as published, with its learning rate searched, and where its accuracy is lost.

    python benchmarks/accuracy/reported.py shufflenet_v2_x0_5 --weights F --data DIR --epochs 5

adds one network to reported.json next to this script and rewrites docs/results.md. Learning rates are compared after
one epoch each, on the `select` part, by the argmax of the gates; `val` is read once, at the end.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

import numpy as np
from accuracy import PATTERN, dense_network, hits, network_parser, paired, pruned, recalibrated
from cifar import HOW, load_cifar10
from torch import nn

from maskplan.pipeline.core.choices import FLAT
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.dataset import Dataset
from maskplan.pipeline.learning.danhofer2024 import DanhoferNet, DanhoferOptions, correct_predictions, learn_danhofer
from maskplan.pipeline.learning.masked_net import Masks
from maskplan.pipeline.masking.magnitude import magnitude_mask
from maskplan.pipeline.masking.policy import select_layers
from maskplan.pipeline.models.layers import trace_layers
from maskplan.pipeline.report.write import versions
from maskplan.pipeline.timing.compare_latency import cpu_name

# SGD on gates that start nearly equal: from the report's learning rate up to one at which the gates change.
RATES = (0.1, 1.0, 10.0, 100.0)


def only(masks: Masks, names: set[str]) -> Masks:
    """The masks of some weights."""
    return {name: mask for name, mask in masks.items() if name in names}


def search(module: nn.Module, data: Dataset, options: DanhoferOptions) -> dict[float, float]:
    """Top-1 on `select` by learning rate, after an epoch each."""
    found = {}
    for rate in RATES:
        one = dataclasses.replace(options, lr=rate, epochs=1)
        try:
            net = learn_danhofer(module, HOW, data, one, PATTERN)
        except InputError:
            found[rate] = 0.0
            continue
        found[rate] = 100 * float(np.mean(correct_predictions(net, data.select, HOW, sampled=False)))
        print(f"rate {rate:g}: {found[rate]:.2f}% of select")
    return found


def rows_of(
    name: str, net: DanhoferNet, module: nn.Module, data: Dataset, parts: Mapping[str, set[str]], augment: str
) -> dict[str, list[bool]]:
    """Correct predictions on `val` under sampled gates, and under their likeliest masks on several sets of layers."""
    found = {
        f"{name}, sampled": correct_predictions(net, data.val, HOW, sampled=True),
        f"{name}, argmax": correct_predictions(net, data.val, HOW, sampled=False),
    }
    for part, names in parts.items():
        sparse = recalibrated(pruned(module, only(net.masks(), names)), data, augment=augment, dense=module)
        found[f"{name}, argmax, {part}, recalibrated"] = hits(sparse, data.val).tolist()
    return found


def main() -> None:
    """Measure one network."""
    parser = network_parser(__doc__, epochs=30)
    parser.add_argument(
        "--recalibrate-augment", default="none", help="augmentation of the images for BatchNorm statistics"
    )
    args = parser.parse_args()
    augment = args.recalibrate_augment
    data = load_cifar10(args.data)
    module = dense_network(args.model, args.weights, args.data)
    layers, _ = trace_layers(module, HOW)
    convolutions = {x.name: x for x in layers if x.op == "Conv"}
    ours = {x.name for x in select_layers(layers, PATTERN).masked}
    parts = {
        "all convolutions": set(convolutions),
        "depthwise dense": {n for n, x in convolutions.items() if x.groups == 1},
        "our layers": ours,
    }
    if parts["depthwise dense"] == parts["all convolutions"]:
        del parts["depthwise dense"]
    options = DanhoferOptions(epochs=args.epochs, seed=args.seed)
    weights = module.state_dict()
    right = {"dense": hits(module, data.val).tolist()}
    for part, names in parts.items():
        flat = {n: magnitude_mask(weights[n].numpy(), PATTERN, FLAT) for n in names}
        sparse = recalibrated(pruned(module, flat), data, augment=augment, dense=module)
        right[f"magnitude, {part}, recalibrated"] = hits(sparse, data.val).tolist()
    untrained = DanhoferNet(module, options, PATTERN).eval()
    right |= rows_of("report, untrained", untrained, module, data, parts, augment)
    as_written = learn_danhofer(module, HOW, data, options, PATTERN)
    right |= rows_of("report", as_written, module, data, parts, augment)
    searched = search(module, data, options)
    best = max(searched, key=lambda rate: searched[rate])
    entropy = {"as written": as_written.entropy()}
    if best != options.lr:
        tuned = learn_danhofer(module, HOW, data, dataclasses.replace(options, lr=best), PATTERN)
        right |= rows_of(f"report, rate {best:g}", tuned, module, data, parts, augment)
        entropy[f"rate {best:g}"] = tuned.entropy()
    dense = np.array(right["dense"])
    result = {
        "model": args.model,
        "seed": args.seed,
        "command": f"python benchmarks/accuracy/reported.py {args.model} --epochs {args.epochs} --seed {args.seed}"
        f" --recalibrate-augment {augment}",
        "device": cpu_name(),
        "versions": versions(),
        "epochs": args.epochs,
        "images": len(data.train),
        "layers": {part: len(names) for part, names in parts.items()},
        "select_top1_by_rate": {f"{rate:g}": round(top1, 2) for rate, top1 in searched.items()},
        "entropy": {name: round(value, 4) for name, value in entropy.items()},
        "rows": {
            name: {"top1": round(100 * float(np.mean(found)), 3)} | paired(dense, np.array(found))
            for name, found in right.items()
        },
    }
    args.results.add("reported", result)
    args.results.write_page()
    print(json.dumps(result["rows"], indent=2))


if __name__ == "__main__":
    main()
