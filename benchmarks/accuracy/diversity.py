"""Does the number of masks that a kind of sparsity allows predict its accuracy? On CIFAR-10's ResNet-20.

    python benchmarks/accuracy/diversity.py --weights resnet20.safetensors --data DIR

masks half of the weights of ResNet-20's layers by magnitude in several kinds of sparsity, recalibrates all alike, and
counts the masks that each kind allows, exactly and by the formula of Hubara et al. (2021), who claim that more masks
cost less accuracy. Their networks are trained under the mask; here weights do not change. Writes diversity.json next to
this script; `val` is read once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from accuracy import PATTERN, dense_network, hits, paired, pruned, recalibrated
from cifar import HOW, load_cifar10
from mask_counts import diversity, tile_masks, tile_masks_by_paper
from scipy.stats import pearsonr, spearmanr

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.files import write_json
from maskplan.pipeline.masking.magnitude import magnitude_mask
from maskplan.pipeline.masking.patterns import parse_pattern
from maskplan.pipeline.masking.policy import select_layers
from maskplan.pipeline.masking.transposable import transposable_mask
from maskplan.pipeline.models.layers import trace_layers
from maskplan.pipeline.report.write import versions
from maskplan.pipeline.timing.compare_latency import cpu_name

Weights = Mapping[str, npt.NDArray[np.float32]]
Masks = dict[str, npt.NDArray[np.bool_]]

# All keep one half. Transposable 8:16 is omitted: its exact count takes a minute, its masks by flow much longer.
HALVES = tuple(Pattern(n, 2 * n) for n in (1, 2, 4, 8))
TILES = HALVES[:3]


def masks_by_kind(weights: Weights) -> dict[str, Masks]:
    """Half of the weights by magnitude, in every kind."""
    cut = float(np.median(np.concatenate([np.abs(w).ravel() for w in weights.values()])))
    kinds: dict[str, Callable[[npt.NDArray[np.float32]], npt.NDArray[np.bool_]]] = {
        "unstructured": lambda w: np.abs(w) > cut
    }
    for pattern in HALVES:
        kinds[str(pattern)] = lambda w, p=pattern: magnitude_mask(w, p)  # type: ignore[misc]
    for pattern in TILES:
        kinds[f"transposable {pattern}"] = lambda w, p=pattern: transposable_mask(w, p)  # type: ignore[misc]
    return {kind: {name: choose(w) for name, w in weights.items()} for kind, choose in kinds.items()}


def counts(kind: str, sizes: Sequence[int]) -> dict[str, float]:
    """Base-10 logarithms of the number of masks: the exact count, and the paper's formula where it differs."""
    if kind == "unstructured":
        exact = paper = diversity(sizes, PATTERN).unstructured
    else:
        *tiled, name = kind.split()
        pattern = parse_pattern(name)
        if tiled:
            tiles = sum(sizes) // pattern.m**2
            exact, paper = (tiles * math.log10(f(pattern)) for f in (tile_masks, tile_masks_by_paper))
        else:
            exact = paper = sum(sizes) // pattern.m * math.log10(math.comb(pattern.m, pattern.n))
    return {"exact": exact, "by_paper": paper}


def tile_counts() -> dict[str, Any]:
    """Masks of a tile, and the diversity of the masks of 64 weights as base-10 logarithms."""
    return {
        str(pattern): {
            "tile_exact": tile_masks(pattern),
            "tile_by_paper": tile_masks_by_paper(pattern),
            "log10_of_64_weights": {
                "unstructured": round(counted.unstructured, 3),
                "one_axis": round(counted.one_axis, 3),
                "transposable_exact": round(counted.transposable, 3),
                "transposable_by_paper": round(counted.transposable_by_paper, 3),
            },
        }
        for pattern in (Pattern(2, 4), Pattern(4, 8))
        for counted in (diversity([64], pattern),)
    }


def correlation(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    return {
        "pearson": round(float(pearsonr(first, second).statistic), 3),
        "spearman": round(float(spearmanr(first, second).statistic), 3),
    }


def main() -> None:
    """Measure all kinds in one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="weights of the dense ResNet-20")
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10 as .npz files")
    parser.add_argument("--most", type=int, help="use only the first images, up to this number; all by default")
    args = parser.parse_args()
    data = load_cifar10(args.data, most=args.most)
    module = dense_network("resnet20", args.weights, args.data)
    chosen = select_layers(trace_layers(module, HOW)[0], PATTERN).masked
    state = module.state_dict()
    weights = {layer.name: state[layer.name].numpy() for layer in chosen}
    whole = sum(float(np.abs(w).sum(dtype=np.float64)) for w in weights.values())
    dense = hits(module.eval(), data.val)
    rows: dict[str, dict[str, Any]] = {}
    for kind, masks in masks_by_kind(weights).items():
        kept = sum(float(np.abs(w).sum(where=masks[name], dtype=np.float64)) for name, w in weights.items())
        right = hits(recalibrated(pruned(module, masks), data, dense=module).eval(), data.val)
        rows[kind] = {
            "log10_masks": counts(kind, [w.size for w in weights.values()]),
            "kept_weights_percent": 100 * float(np.mean(np.concatenate([m.ravel() for m in masks.values()]))),
            "kept_magnitude_percent": 100 * kept / whole,
            "top1": 100 * float(right.mean()),
            **paired(dense, right),
        }
        print(kind, json.dumps(rows[kind]), flush=True)
    exact, paper = ([row["log10_masks"][count] for row in rows.values()] for count in ("exact", "by_paper"))
    magnitude, top1 = ([row[name] for row in rows.values()] for name in ("kept_magnitude_percent", "top1"))
    found = {
        "command": "python benchmarks/accuracy/diversity.py" + (f" --most {args.most}" if args.most else ""),
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "model": "resnet20",
        "masked_weights": sum(w.size for w in weights.values()),
        "val_images": len(data.val),
        "top1_dense": 100 * float(dense.mean()),
        "tiles": tile_counts(),
        "rows": rows,
        "correlation": {
            "exact count and kept magnitude": correlation(exact, magnitude),
            "exact count and top-1": correlation(exact, top1),
            "paper's count and kept magnitude": correlation(paper, magnitude),
            "paper's count and top-1": correlation(paper, top1),
            "kept magnitude and top-1": correlation(magnitude, top1),
        },
    }
    write_json(Path(__file__).with_suffix(".json"), found)
    print(json.dumps(found["correlation"], indent=2))


if __name__ == "__main__":
    main()
