"""The three ImageNet tables of Danhofer (2024), measured: dense, learned masks, and magnitude under ASP's layer rules.

    python benchmarks/accuracy/imagenet.py --table 2 --data imagenet

reads `imagenet/train/CLASS/*` and `imagenet/val/CLASS/*` and uses torchvision's V1 weights (offline: `--weights DIR`
with NAME.pth files). Each network is added to imagenet.json and to a page of tables as soon as it is done; `--table 2`
resumes from the learner's checkpoint. A GPU is used if there is one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy import PATTERN, Hits, by_asp, by_magnitude, hits_within, paired, pruned, recalibrated
from tables import HERE, Results
from torch import nn

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.files import write_atomically
from maskplan.pipeline.data.dataset import Dataset, open_folder
from maskplan.pipeline.learning.masked_net import Masks
from maskplan.pipeline.learning.options import LearnerFiles, LearnOptions
from maskplan.pipeline.learning.trainer import learn_masks
from maskplan.pipeline.masking.policy import select_layers
from maskplan.pipeline.models.layers import trace_layers
from maskplan.pipeline.models.registry import build_model
from maskplan.pipeline.models.state_dict import fit_weights, read_weights
from maskplan.pipeline.report.write import versions
from maskplan.pipeline.timing.compare_latency import cpu_name

TOP = (1, 5)
PAGE = "imagenet.md"


@dataclass(frozen=True)
class Published:
    """The report's figures, top-1 and top-5 in percent: dense, sparse (and its epochs), Apex, and Apex with permutation."""

    dense: tuple[float, float]
    sparse: tuple[float, float]
    epochs: int
    apex: tuple[float, float]
    apex_permuted: tuple[float, float]


REPORT = {
    "resnet18": Published((69.76, 89.08), (70.05, 88.16), 10, (17.20, 36.13), (21.48, 41.76)),
    "resnet34": Published((73.31, 91.42), (75.33, 91.18), 10, (43.75, 68.27), (49.27, 73.71)),
    "resnet50": Published((76.13, 92.86), (78.51, 92.84), 10, (30.09, 52.52), (48.37, 72.47)),
    "vgg16": Published((71.59, 90.38), (67.79, 87.12), 12, (42.11, 67.17), (49.43, 75.15)),
    "vgg19": Published((72.38, 90.88), (68.63, 87.63), 12, (58.99, 82.16), (63.99, 85.64)),
    "shufflenet_v2_x2_0": Published((76.23, 93.00), (11.00, 53.20), 12, (69.32, 89.49), (69.38, 89.51)),
}


@dataclass(frozen=True)
class Bench:
    """One network with its data, on the device of the measurement."""

    name: str
    dense: nn.Module
    preprocessing: Preprocessing
    data: Dataset
    results: Path
    options: LearnOptions


def rows_of(table: int, bench: Bench) -> Iterator[tuple[str, nn.Module]]:
    """The networks of one table, by the names of their rows."""
    layers, _ = trace_layers(bench.dense, bench.preprocessing)
    magnitude = by_magnitude(bench.dense, select_layers(layers, PATTERN).masked)
    yield "dense", bench.dense
    if table == 1:
        yield "dense, recalibrated", recalibrated(bench.dense, bench.data, bench.preprocessing)
        return
    masks: dict[str, Masks] = {"magnitude": magnitude}
    if table == 2:
        files = LearnerFiles(bench.results / f"{bench.name}.learning", log_dir=bench.results / f"{bench.name}.log")
        masks["maskplan"] = learn_masks(
            bench.dense, magnitude, PATTERN, bench.preprocessing, bench.data, bench.options, files=files
        )[0]
    else:
        masks["magnitude, ASP's layers"] = by_asp(bench.dense, layers)
    for name, chosen in masks.items():
        sparse = pruned(bench.dense, chosen)
        yield name, sparse
        yield f"{name}, recalibrated", recalibrated(sparse, bench.data, bench.preprocessing, dense=bench.dense)


def measure(table: int, bench: Bench) -> dict[str, Any]:
    """Top-1 and top-5 of each row, with the paired drop of top-1 against dense."""
    rows: dict[str, Any] = {}
    reference: Hits | None = None
    for name, module in rows_of(table, bench):
        found = hits_within(module, bench.data.val, bench.preprocessing, TOP)
        reference = found[1] if reference is None else reference
        tops = {f"top{k}": round(100 * float(right.mean()), 3) for k, right in found.items()}
        rows[name] = tops | paired(reference, found[1])
    return rows


def weights_of(name: str, folder: Path | None) -> Mapping[str, torch.Tensor]:
    """Torchvision's V1 weights, from a folder or by torchvision's loader, which checks their digest."""
    if folder is not None:
        files = [folder / f"{name}.{suffix}" for suffix in ("pth", "safetensors")]
        return read_weights(next((path for path in files if path.is_file()), files[0]))
    import torchvision

    found: Mapping[str, torch.Tensor] = torchvision.models.get_model_weights(name).IMAGENET1K_V1.get_state_dict(
        check_hash=True, map_location="cpu"
    )
    return found


def page(runs: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of all runs, with the report's figures."""
    lines = ["# The report's tables, measured", "", "Written by `benchmarks/accuracy/imagenet.py`."]
    for table in (1, 2, 3):
        mine = [run for run in runs if run["table"] == table]
        if not mine:
            continue
        lines += [
            "",
            f"## Table {table}",
            "",
            "| network | row | top-1 % | top-5 % | drop | 95% |",
            "|---|---|---|---|---|---|",
        ]
        for run in mine:
            for name, (top1, top5) in run["published"].items():
                lines.append(f"| {run['model']} | {name} | {top1:.2f} | {top5:.2f} | | |")
            for name, row in run["rows"].items():
                low, high = row["drop_ci95"]
                top1, top5 = row["top1"], row["top5"]
                drop = f"{row['drop']:+.2f} | {low:+.2f} to {high:+.2f}"
                lines.append(f"| {run['model']} | {name} | {top1:.2f} | {top5:.2f} | {drop} |")
    return "\n".join(lines) + "\n"


def published(table: int, name: str) -> dict[str, tuple[float, float]]:
    """The report's rows for a network; none if the report does not have it."""
    known = REPORT.get(name)
    if known is None:
        return {}
    return {
        1: {"reported: dense": known.dense},
        2: {f"reported: sparse, {known.epochs} epochs": known.sparse},
        3: {"reported: Apex": known.apex, "reported: Apex, permuted": known.apex_permuted},
    }[table]


def main() -> None:
    """Measure the missing networks of a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=int, choices=(1, 2, 3), required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(REPORT))
    parser.add_argument("--weights", type=Path, help="folder of NAME.pth or NAME.safetensors")
    parser.add_argument("--epochs", type=int, help="default: as many as the report's")
    parser.add_argument("--batch", type=int, default=LearnOptions().batch)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=HERE, metavar="DIR", help="default: the folder of this script")
    args = parser.parse_args()
    results = Results(args.results)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classes = sum(1 for entry in (args.data / "train").iterdir() if entry.is_dir())
    for name in args.models:
        key = {"table": args.table, "model": name, "seed": args.seed}
        if any({k: run[k] for k in key} == key for run in results.read("imagenet")):
            print(f"{name}: already measured")
            continue
        made = build_model(name, seed=0, classes=None if classes == 1000 else classes)
        fit_weights(made.module, weights_of(name, args.weights), where=args.weights or name)
        data = open_folder(args.data, made.labels, classes, args.seed)
        epochs = args.epochs if args.epochs is not None else REPORT[name].epochs if name in REPORT else 10
        options = LearnOptions(epochs=epochs, batch=args.batch, augment="shift+flip", seed=args.seed)
        bench = Bench(name, made.module.to(device), made.preprocessing, data, args.results, options)
        found = measure(args.table, bench)
        run = key | {
            "command": f"python benchmarks/accuracy/imagenet.py --table {args.table} --models {name} --epochs {epochs}",
            "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
            "versions": versions(),
            "epochs": epochs if args.table == 2 else 0,
            "images": len(data.train),
            "val_images": len(data.val),
            "published": published(args.table, name),
            "rows": found,
        }
        write_atomically(args.results / PAGE, page(results.add("imagenet", run, tuple(key))).encode())


if __name__ == "__main__":
    main()
