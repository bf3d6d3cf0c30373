"""The tables of docs/results.md, from what the benchmarks of accuracy wrote."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskplan.pipeline.core.files import write_atomically, write_json

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Results:
    """Where results go: a folder of JSON files, and the page of tables made from all of them."""

    folder: Path = HERE
    page: Path = HERE.parent / "docs" / "results.md"

    def read(self, name: str) -> list[dict[str, Any]]:
        """The runs of one benchmark so far."""
        path = self.folder / f"{name}.json"
        found = json.loads(path.read_text()) if path.is_file() else []
        # Some benchmarks keep one run.
        return [found] if isinstance(found, dict) else list(found)

    def add(self, name: str, run: Mapping[str, Any], key: Sequence[str] = ("model", "seed")) -> list[dict[str, Any]]:
        """Add a run, in the place of one that agrees with it in the key; all runs that there are then."""
        runs = [*(r for r in self.read(name) if any(r[k] != run[k] for k in key)), dict(run)]
        write_json(self.folder / f"{name}.json", runs)
        return runs

    def write_page(self) -> None:
        """Write the tables."""
        parts = [_HEAD]
        for name, sections in _SECTIONS.items():
            parts += sections(self.read(name))
        write_atomically(self.page, ("\n\n".join(parts) + "\n").encode())


def results_option(parser: argparse.ArgumentParser) -> None:
    """Add `--results`."""
    parser.add_argument("--results", type=_results, default=Results(), metavar="DIR", help="default: beside the script")


def _results(folder: str) -> Results:
    return Results(Path(folder), Path(folder) / "results.md")


_HEAD = """# Accuracy of 2:4 masks on CIFAR-10

Written by `benchmarks/accuracy/tables.py` from the JSON of the other benchmarks of accuracy. Every masked row keeps two of four
weights along the input channels in every eligible convolution but the stem, unless it says otherwise; weights are never
changed. Recalibrated rows have BatchNorm statistics of 10,000 training images, in every row of a network augmented alike.
Drops, in points of top-1 with paired 95% intervals, are against the better of dense and dense recalibrated, on the 10,000
test images, which nothing else has seen."""

_INT8 = """## INT8: {model}

On ONNX Runtime, ranges of {images} training images. The method was chosen on `select` ({dense} for dense, {sparse} for
sparse); top-1 there: {methods}. Drops are against dense FP32; sparse INT8 loses {drop:+.2f} points ({low:+.2f} to
{high:+.2f}) against sparse FP32. `{command}`

| network | top-1 % | drop | 95% |
|---|---|---|---|"""

_LAYERWISE = """## Masks without learning: {model}

Layer-wise masks ({images} training images, no labels, {seconds:.1f} CPU seconds) beside magnitude masks: they lose
{gain:.2f} points less ({low:.2f} to {high:.2f}). And a network with the smaller half of its weights at zero, wherever they
are, brought to 2:4 by `maskplan convert`: the update of the weights that stay gives back {update:.2f} points
({update_low:.2f} to {update_high:.2f}). `{command}`

| weights | top-1 % | drop | 95% |
|---|---|---|---|"""

_DIVERSITY = """## Do more masks cost less? {model}

Hubara et al. (2021) hold that a kind of sparsity costs less accuracy the more masks it allows. Half of {weights} weights by
magnitude, in kinds that differ in how many masks they allow (the decimal logarithm of the number), recalibrated; their
networks are trained under the mask, these are not. Rank correlation of top-1 with the exact count: {exact:.2f}; with the
paper's formula, which counts some transposable masks more than once: {paper:.2f}; with kept magnitude: {kept:.2f}.
`{command}`

| kind | masks, exact | masks, paper's formula | magnitude kept % | top-1 % | drop | 95% |
|---|---|---|---|---|---|---|"""

_ABLATION = """## What each part of the recipe buys

One part of our recipe changed at a time; masks judged on the `select` part ({images} images cut from the training images),
after recalibration. The divergence is from the dense network; it decides, for it tells apart what top-1 of so few images
cannot. `{command}`

| {model}, {epochs} epochs | divergence | top-1 % | groups moved % |
|---|---|---|---|
| magnitude masks | {divergence:.4f} | {top1:.2f} | 0.0 |"""

_REPORTED = """## The semester report's recipe: {model}

{epochs} epochs of {images} images with the report's gates, layers, optimizer and augmentation; the same with the learning
rate that was best on `select` after one epoch (top-1 by rate: {rates}). Masked are {layers}. Groups run along the flattened
matrix, which TensorRT does not take. Mean entropy of the gates' choices (1 is undecided): {entropy}. Drops are against
dense. `{command}`

| masks | top-1 % | drop | 95% |
|---|---|---|---|"""

_EXCHANGE = """## Old masks on new weights

The dense {model} fine-tuned at several learning rates ({epochs} epochs of {images} images); masks learned on the old weights
are baked into the new ones and compared with masks learned anew ({learn_epochs} epochs) and with masks that start from the
old (`mask --init`, as many epochs). Top-1 on the test images after recalibration. Equal groups are those where old and new
masks choose the same pattern; two seeds on the old weights agree on {seeds:.1f}%. `{command}`

| rate | new dense | old masks | learned anew | started from the old | magnitude | equal groups % |
|---|---|---|---|---|---|---|"""


def _accuracy(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for run in runs:
        lines = [
            f"## {run['model']}, seed {run['seed']}",
            "",
            f"{run['masked_layers']} masked layers with {run['masked_macs_percent']}% of the MACs; {run['epochs']} epochs of"
            f" {run['images']} images, {run['minutes']} minutes on {run['device']}. Augmentation:"
            f" `{run['learning']['augment']}` in learning, `{run['learning'].get('judge_augment', 'none')}` for the"
            f" statistics. `{run['command']}`",
        ]
        dense = run.get("dense_training") or {}
        if dense:
            gains = ", ".join(f"{gain:+.2f}" for gain in dense.get("gains", ()))
            more = f" {dense['more_epochs']} more epochs at a time gained {gains} points." if gains else ""
            lines += ["", f"The dense network has {dense['select_top1']:.2f}% of `select`.{more}"]
        yield "\n".join([*lines, "", "| weights | top-1 % | drop | 95% |", "|---|---|---|---|", *_rows(run)])


def _rows(run: Mapping[str, Any]) -> Iterator[str]:
    for name, row in run["rows"].items():
        low, high = row["drop_ci95"]
        yield f"| {name} | {row['top1']:.2f} | {row['drop']:+.2f} | {low:+.2f} to {high:+.2f} |"


def _ablations(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    keys = list(dict.fromkeys((r["model"], r["epochs"], r["seed"]) for r in rows))
    for key in keys:
        mine = [r for r in rows if (r["model"], r["epochs"], r["seed"]) == key]
        first = mine[0]
        head = _ABLATION.format(
            images=first["select_images"],
            command=first["command"],
            model=first["model"],
            epochs=first["epochs"],
            divergence=first["select_divergence_magnitude"],
            top1=first["select_top1_magnitude"],
        )
        lines = [
            f"| {r['row']} | {r['select_divergence']:.4f} | {r['select_top1']:.2f} | {r['groups_moved_percent']:.1f} |"
            for r in mine
        ]
        yield "\n".join([head, *lines])


def _reported(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for run in runs:
        head = _REPORTED.format(
            model=run["model"],
            epochs=run["epochs"],
            images=run["images"],
            rates=", ".join(f"{rate}: {top1:.2f}%" for rate, top1 in run["select_top1_by_rate"].items()),
            layers=", ".join(f"{part} ({count})" for part, count in run["layers"].items()),
            entropy=", ".join(f"{name} {value:.3f}" for name, value in run["entropy"].items()),
            command=run["command"],
        )
        yield "\n".join([head, *_rows(run)])


def _exchange(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    columns = ("new_dense", "old_masks", "relearned", "from_old", "magnitude", "equal_groups_percent")
    for run in runs:
        head = _EXCHANGE.format(
            model=run["model"],
            epochs=run["tune_epochs"],
            images=run["images"],
            learn_epochs=run["learn_epochs"],
            seeds=run["seed_to_seed_equal_groups_percent"],
            command=run["command"],
        )
        lines = [f"| {row['rate']} | " + " | ".join(f"{row[c]:.2f}" for c in columns) + " |" for row in run["rows"]]
        yield "\n".join([head, *lines])


def _int8(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for run in runs:
        chosen = {kind: row["chosen"] for kind, row in run["select_top1"].items()}
        methods = "; ".join(
            f"{kind}: " + ", ".join(f"{row} {value:.2f}%" for row, value in rows.items() if row != "chosen")
            for kind, rows in run["select_top1"].items()
        )
        against = run["sparse_int8_against_sparse_fp32"]
        head = _INT8.format(
            model=run["model"],
            images=run["calibration_images"],
            dense=chosen["dense"],
            sparse=chosen["sparse"],
            methods=methods,
            drop=against["drop"],
            low=against["drop_ci95"][0],
            high=against["drop_ci95"][1],
            command=run["command"],
        )
        yield "\n".join([head, *_rows(run)])


def _layerwise(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for run in (r["accuracy"] for r in runs if "accuracy" in r):
        # Points that the second of each pair loses are points that it gains below zero.
        gain, update = run["layerwise_against_magnitude"], run["update_against_no_update"]
        head = _LAYERWISE.format(
            model=run["model"],
            images=run["images"],
            seconds=run["layerwise_cpu_seconds"],
            gain=-gain["drop"],
            low=-gain["drop_ci95"][1],
            high=-gain["drop_ci95"][0],
            update=-update["drop"],
            update_low=-update["drop_ci95"][1],
            update_high=-update["drop_ci95"][0],
            command=run["command"],
        )
        yield "\n".join([head, *_rows(run)])


def _diversity(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for run in runs:
        found = {name: row["spearman"] for name, row in run["correlation"].items()}
        head = _DIVERSITY.format(
            model=run["model"],
            weights=run["masked_weights"],
            exact=found["exact count and top-1"],
            paper=found["paper's count and top-1"],
            kept=found["kept magnitude and top-1"],
            command=run["command"],
        )
        lines = []
        for kind, row in run["rows"].items():
            counts, (low, high) = row["log10_masks"], row["drop_ci95"]
            lines.append(
                f"| {kind} | {counts['exact']:.0f} | {counts['by_paper']:.0f} | {row['kept_magnitude_percent']:.2f} |"
                f" {row['top1']:.2f} | {row['drop']:+.2f} | {low:+.2f} to {high:+.2f} |"
            )
        yield "\n".join([head, *lines])


_SECTIONS = {
    "accuracy": _accuracy,
    "layerwise": _layerwise,
    "diversity": _diversity,
    "int8": _int8,
    "ablation": _ablations,
    "reported": _reported,
    "exchange": _exchange,
}


if __name__ == "__main__":
    Results().write_page()
