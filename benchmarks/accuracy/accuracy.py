"""Accuracy of masks on CIFAR-10: the same layers, images and recalibration for every method; `val` is read once.

    python benchmarks/accuracy/accuracy.py resnet20 --weights resnet20.safetensors --data DIR --epochs 20

adds a run to accuracy.json next to this script and writes the tables of all runs to docs/results.md. Without --weights,
dense.py trains the dense network first.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import models
import numpy as np
import numpy.typing as npt
import torch
from cifar import HOW, load_cifar10
from tables import results_option
from torch import nn

from maskplan.pipeline.core.artifacts import Layer, Pattern, Preprocessing, Provenance
from maskplan.pipeline.core.serialization import encode
from maskplan.pipeline.core.statistics import PairedCounts, drop_interval
from maskplan.pipeline.data.dataset import Dataset, Split, batches
from maskplan.pipeline.learning.masked_net import Masks
from maskplan.pipeline.learning.options import LearnerFiles, LearnOptions
from maskplan.pipeline.learning.trainer import learn_masks
from maskplan.pipeline.masking.magnitude import magnitude_mask
from maskplan.pipeline.masking.policy import LayerPolicy, select_layers
from maskplan.pipeline.models.batchnorm import RecalibrateOptions, dense_statistics, update_statistics
from maskplan.pipeline.models.layers import trace_layers
from maskplan.pipeline.models.state_dict import fit_weights, read_weights
from maskplan.pipeline.permutation.permute import PermuteOptions, permute
from maskplan.pipeline.pruning.layerwise_masks import layerwise_masks
from maskplan.pipeline.pruning.second_moments import MomentOptions
from maskplan.pipeline.report.write import versions
from maskplan.pipeline.timing.compare_latency import cpu_name

HERE = Path(__file__).parent
PATTERN = Pattern(2, 4)
Hits = npt.NDArray[np.bool_]


def network_parser(description: str | None, epochs: int) -> argparse.ArgumentParser:
    """The command-line arguments that all benchmarks of one network share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a function of models.py")
    parser.add_argument(
        "--weights", type=Path, help="weights of the dense network; by default dense.py trains it first"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10 as .npz files")
    parser.add_argument("--epochs", type=int, default=epochs, help="epochs of mask learning (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    results_option(parser)
    return parser


def dense_network(name: str, weights: Path | None, data: Path) -> nn.Module:
    """The network with its dense weights, which are trained if none are given."""
    module: nn.Module = getattr(models, name)()
    if weights is None:
        weights = HERE.parents[1] / "build" / "dense" / f"{name}.safetensors"
        if not weights.is_file():
            weights.parent.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, str(HERE / "dense.py"), name, "--data", str(data), "--out", str(weights)]
            subprocess.run([*command, "--more", "20"], check=True)
    fit_weights(module, read_weights(weights), where=weights)
    return module.eval()


def dense_training(weights: Path | None) -> dict[str, Any] | None:
    """The record that dense.py wrote next to the weights, if there is one."""
    record = weights.with_suffix(".json") if weights else None
    return dict(json.loads(record.read_text())) if record and record.is_file() else None


def pruned(module: nn.Module, masks: Masks) -> nn.Module:
    """A copy with masked weights."""
    sparse = copy.deepcopy(module)
    parameters = dict(sparse.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].masked_fill_(~torch.from_numpy(mask).to(parameters[name].device), 0.0)
    return sparse


def recalibrated(
    module: nn.Module,
    data: Dataset,
    preprocessing: Preprocessing = HOW,
    augment: str = "none",
    dense: nn.Module | None = None,
) -> nn.Module:
    """A copy with BatchNorm statistics from 10,000 training images, relative to the dense network if it is given."""
    changed, options = copy.deepcopy(module), RecalibrateOptions(augment=augment)
    reference = dense_statistics(dense, data.train, preprocessing, options) if dense is not None else None
    update_statistics(changed, data.train, preprocessing, options, reference)
    return changed


def permuted(module: nn.Module, provenance: Provenance, seed: int) -> nn.Module:
    """A copy that computes the same, with its channels in an order of which 2:4 masks keep more."""
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "permuted.safetensors", Path(folder) / "permutation.safetensors"
        permute(module, provenance, PATTERN, LayerPolicy(), PermuteOptions(seed=seed), *files)
        changed = copy.deepcopy(module)
        fit_weights(changed, read_weights(files[0]), where=files[0])
    return changed.eval()


def hits(module: nn.Module, split: Split, preprocessing: Preprocessing = HOW) -> Hits:
    """For each image, whether its prediction is correct."""
    return hits_within(module, split, preprocessing, (1,))[1]


def hits_within(module: nn.Module, split: Split, preprocessing: Preprocessing, ks: tuple[int, ...]) -> dict[int, Hits]:
    """For each image, whether its label is among the k likeliest classes, for several k."""
    device = next(module.parameters()).device
    ranks = []
    with torch.no_grad():
        for x, labels in batches(split, preprocessing, 500 if preprocessing.height < 64 else 64):
            logits = module(torch.from_numpy(x).to(device)).cpu()
            likeliest = logits.topk(min(max(ks), logits.shape[1]), dim=1).indices.numpy()
            found = likeliest == labels[:, None]
            ranks.append(np.where(found.any(axis=1), found.argmax(axis=1), likeliest.shape[1]))
    rank = np.concatenate(ranks)
    return {k: rank < k for k in ks}


def paired(first: Hits, second: Hits) -> dict[str, Any]:
    """The drop of the second against the first in points, with its paired 95% interval."""
    counts = PairedCounts(
        int((first & second).sum()),
        int((first & ~second).sum()),
        int((~first & second).sum()),
        int((~first & ~second).sum()),
    )
    return {"drop": round(counts.drop, 3), "drop_ci95": [round(v, 3) for v in drop_interval(counts)]}


def measure(
    name: str,
    module: nn.Module,
    data: Dataset,
    options: LearnOptions,
    state: Path,
    command: str,
    start: str,
) -> dict[str, Any]:
    """All rows of one network and seed; `start` names the masks that learning starts from."""
    layers, _ = trace_layers(module, HOW)
    chosen = select_layers(layers, PATTERN).masked
    magnitude = by_magnitude(module, chosen)
    started = time.monotonic()
    layerwise = layerwise_masks(module, chosen, HOW, data.train, PATTERN, MomentOptions(seed=options.seed), "cpu")
    learned, learning = learn_masks(
        module,
        {"magnitude": magnitude, "layerwise": layerwise}[start],
        PATTERN,
        HOW,
        data,
        options,
        favor_start=start != "magnitude",
        files=LearnerFiles(state, log_dir=state.parent / state.stem),
    )
    minutes = (time.monotonic() - started) / 60
    nets = {"dense": module, "magnitude": pruned(module, magnitude), "layerwise": pruned(module, layerwise)}
    nets["maskplan"] = pruned(module, learned)
    nets |= {
        f"{row}, recalibrated": recalibrated(
            net, data, augment=options.judge_augment, dense=None if net is module else module
        )
        for row, net in nets.items()
    }
    asp = by_asp(module, layers)
    nets["magnitude, ASP's layers, recalibrated"] = recalibrated(
        pruned(module, asp), data, augment=options.judge_augment, dense=module
    )
    right = {row: hits(net, data.val) for row, net in nets.items()}
    reference = max(("dense", "dense, recalibrated"), key=lambda row: right[row].mean())
    free = ("magnitude", "magnitude, recalibrated", "layerwise, recalibrated")
    best_free = max(free, key=lambda row: right[row].mean())
    rows = {
        row: {"top1": round(100 * float(found.mean()), 3)} | paired(right[reference], found)
        for row, found in right.items()
    }
    return {
        "model": name,
        "seed": options.seed,
        "command": command,
        "device": cpu_name(),
        "versions": versions(),
        "masked_layers": len(chosen),
        "asp_macs_percent": round(100 * share_of_macs([x for x in layers if x.name in asp], layers), 2),
        "masked_macs_percent": round(100 * share_of_macs(chosen, layers), 2),
        "epochs": learning.epochs,
        "images": learning.images,
        "val_images": len(data.val),
        "minutes": round(minutes, 1),
        "reference": reference,
        "groups_moved_percent": round(100 * learning.groups_changed, 2),
        "start": start,
        "permuted": " --permute" in command,
        "select_top1": round(100 * float(hits(module, data.select).mean()), 3),
        "threads": torch.get_num_threads(),
        "learning": encode(options),
        "against_best_training_free": {"row": best_free} | paired(right[best_free], right["maskplan, recalibrated"]),
        "rows": rows,
    }


def by_magnitude(module: nn.Module, layers: Sequence[Layer]) -> Masks:
    """Magnitude masks of these layers."""
    weights = module.state_dict()
    return {layer.name: magnitude_mask(weights[layer.name].cpu().numpy(), PATTERN) for layer in layers}


def by_asp(module: nn.Module, layers: Sequence[Layer]) -> Masks:
    """Magnitude masks under the layer rules of Apex's ASP: tiles of 8 outputs and 16 inputs, linear layers included."""
    tiled = [x for x in layers if x.groups == 1 and x.shape[0] % 8 == 0 and x.shape[1] % 16 == 0]
    return by_magnitude(module, tiled)


def share_of_macs(chosen: Sequence[Layer], layers: Sequence[Layer]) -> float:
    """The fraction of all MACs in the chosen layers."""
    return sum(layer.macs for layer in chosen) / sum(layer.macs for layer in layers)


def main() -> None:
    """Measure one network and add it to the results."""
    parser = network_parser(__doc__, epochs=30)
    parser.add_argument(
        "--augment", default="shift+flip", help="augmentation of the images that masks are learned from"
    )
    parser.add_argument(
        "--recalibrate-augment",
        default="none",
        help="augmentation of the images for BatchNorm statistics, in every row",
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=LearnOptions().lr)
    parser.add_argument("--start", choices=("magnitude", "layerwise"), default="magnitude", help="default: %(default)s")
    parser.add_argument("--match-features", type=float, default=LearnOptions().match_features, metavar="WEIGHT")
    parser.add_argument("--match-blocks", type=float, default=LearnOptions().match_blocks, metavar="SHARE")
    parser.add_argument("--distill", type=float, default=LearnOptions().distill, metavar="WEIGHT")
    parser.add_argument("--permute", action="store_true", help="permute the channels of the dense network first")
    args = parser.parse_args()
    options = LearnOptions(
        epochs=args.epochs,
        batch=args.batch,
        lr=args.rate,
        match_features=args.match_features,
        match_blocks=args.match_blocks,
        distill=args.distill,
        augment=args.augment,
        judge_augment=args.recalibrate_augment,
        seed=args.seed,
    )
    data = load_cifar10(args.data)
    module = dense_network(args.model, args.weights, args.data)
    if args.permute:
        about = Provenance(args.model, True, "weights", "", len(data.classes), data.classes, HOW)
        module = permuted(module, about, args.seed)
    state = (
        Path(tempfile.gettempdir())
        / f"maskplan-{args.model}-{args.seed}-{args.epochs}-{args.augment}-{args.start}-{args.match_features:g}"
        f"-{args.match_blocks:g}" / "learning.safetensors"
    )
    command = (
        f"python benchmarks/accuracy/accuracy.py {args.model} --epochs {args.epochs} --seed {args.seed}"
        f" --rate {args.rate} --batch {args.batch}"
        f" --augment {args.augment} --recalibrate-augment {args.recalibrate_augment}"
        f" --start {args.start} --match-features {args.match_features:g} --match-blocks {args.match_blocks:g}"
        f" --distill {args.distill:g}{' --permute' if args.permute else ''}"
    )
    found = measure(args.model, module, data, options, state, command, args.start)
    found["dense_training"] = dense_training(args.weights)
    args.results.add("accuracy", found, ("model", "seed", "command"))
    args.results.write_page()
    print(json.dumps(found["rows"], indent=2))


if __name__ == "__main__":
    main()
