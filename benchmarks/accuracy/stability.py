"""Bounds and certificates: whether they hold on many random networks, and how tight they are on real ones.

    python benchmarks/accuracy/stability.py random

checks them on random networks (tests/support/random_nets.py), each with many samples of weights, masks, images and
updates. Together the networks contain every operator that the bounds accept, with uncommon arguments.

    python benchmarks/accuracy/stability.py cifar --weights resnet20.safetensors --data DIR

analyzes ResNet-20 under recalibrated magnitude and layer-wise masks on images of CIFAR-10's test set, and a training
step under magnitude masks.

    python benchmarks/accuracy/stability.py digits

times the command on the bundled model. All write their section of stability.json next to this script.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import PATTERN, by_magnitude, dense_network, pruned
from cifar import HOW, load_cifar10
from layerwise import masks_of
from torch import nn
from torch.nn import functional as F

from maskplan.pipeline.core.artifacts import Provenance
from maskplan.pipeline.core.files import write_json
from maskplan.pipeline.core.serialization import encode
from maskplan.pipeline.data.dataset import Split, batches
from maskplan.pipeline.data.image_sets import identify
from maskplan.pipeline.masking.policy import select_layers
from maskplan.pipeline.models.batchnorm import RecalibrateOptions, dense_statistics, update_statistics
from maskplan.pipeline.models.layers import trace_layers
from maskplan.pipeline.report.write import versions
from maskplan.pipeline.stability.analyze import StabilityOptions, Weights, analyze, under_masks
from maskplan.pipeline.stability.bounds import change_bounds, difference_norms, observe, pair_of, worst_case
from maskplan.pipeline.stability.certify import certify, tails
from maskplan.pipeline.stability.network import affine_maps
from maskplan.pipeline.stability.reader import ACCEPTED_OPERATORS
from maskplan.pipeline.stability.updates import ball_changes, ball_of, keeps_class
from maskplan.pipeline.timing.compare_latency import cpu_name

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests" / "support"))

import random_nets  # noqa: E402 - tests and this script draw the same networks

RADII = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def random(examples: int, architectures: int, images: int, workers: int) -> dict[str, Any]:
    """Count violations, flips of certified images, and differences between networks as read and modules; all must be 0.

    A certificate is one image certified by the bounds from one node on; an image can have several.
    """
    each = math.ceil(examples / architectures)
    counts: Counter[str] = Counter()
    above: list[float] = []
    operators: set[str] = set()
    started = time.monotonic()
    with ExitStack() as stack:
        spread = stack.enter_context(ProcessPoolExecutor(workers)).map if workers > 1 else map
        for found, ratios, names in spread(
            one_network, range(architectures), [each] * architectures, [images] * architectures
        ):
            counts += found
            above += ratios
            operators |= names
    tightness = {f"p{q}": round(float(np.quantile(above, q / 100)), 3) for q in (10, 50, 90)}
    return {
        "architectures": architectures,
        "operators": sorted(operators),
        "accepted_operators_not_covered": sorted(ACCEPTED_OPERATORS - operators),
        "minutes": round((time.monotonic() - started) / 60, 1),
        **{name: counts[name] for name in COUNTED},
        "log10_of_bound_over_measured": tightness,
    }


COUNTED = (
    "examples",
    "images",
    "flips",
    "reading_mismatches",
    "violations",
    "worst_case_violations",
    "ball_violations",
    "certificates",
    "certified_flips",
    "ball_certificates",
    "ball_certified_flips",
)


def one_network(number: int, draws: int, images: int) -> tuple[Counter[str], list[float], frozenset[str]]:
    """All draws of one network."""
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    above: list[float] = []
    for seed in range(draws):
        case = random_nets.case(number, seed, images)
        pair, observed = random_nets.observe_case(case)
        first, second = case.logits(case.first).numpy(), case.logits(case.second).numpy()
        flips = first.argmax(1) != second.argmax(1)
        counts["reading_mismatches"] += differs(first, observed.logits_first, observed.sizes_first)
        counts["reading_mismatches"] += differs(second, observed.logits_second, observed.sizes_second)
        counts.update(examples=1, images=len(flips), flips=int(flips.sum()))
        for end in tails(pair.network):
            bounds = change_bounds(pair, observed, end.start)
            held = certify(pair, observed, end.start).certified
            counts["violations"] += random_nets.exceeds(observed, bounds, end.start)
            counts.update(certificates=int(held.sum()), certified_flips=int((held & flips).sum()))
        # Less is rounding.
        there = observed.changes[-1] > 1e-9 * (observed.sizes_first[-1] + observed.sizes_second[-1])
        above += np.log10(bounds[-1][there] / observed.changes[-1][there]).tolist()
        worst = worst_case(pair, difference_norms(pair.network, pair.first, pair.second), observed.sizes_first[0].max())
        counts["worst_case_violations"] += random_nets.exceeds(observed, worst.changes[:, None])
        counts += ball_counts(case, np.random.default_rng([number, seed, 1]))
    return counts, above, random_nets.architecture(number)[2]


def differs(logits: np.ndarray, as_read: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether a module and the network as read differ by more than rounding, on some image."""
    allowed = 1e-9 * np.abs(logits).max(axis=1) + 1e-13 * sizes.max(axis=0)
    return bool((np.abs(logits - as_read).max(axis=1) > allowed).any())


def ball_counts(case: random_nets.Case, rng: np.random.Generator) -> Counter[str]:
    """One update on the border of a ball around the masked network."""
    network = case.network
    masked, dense = affine_maps(network, case.masked), affine_maps(network, case.dense)
    layers = [i for i in network.layers if rng.random() < 0.6]
    rho = float(rng.choice(RADII))
    new = random_nets.update_within(case, rho, layers, rng)
    pair = pair_of(network, masked, affine_maps(network, new))
    observed = observe(pair, case.images)
    ball = ball_of(network, masked, pair.first_norms, {i: a.frobenius for i, a in dense.items()}, layers)
    radii = np.full(len(case.images), rho)
    kept = keeps_class(ball, observed.sizes_first, observed.logits_first, radii)
    flips = observed.logits_first.argmax(1) != observed.logits_second.argmax(1)
    exceeded = random_nets.exceeds(observed, ball_changes(ball, observed.sizes_first, radii))
    return Counter(
        ball_violations=int(exceeded), ball_certificates=int(kept.sum()), ball_certified_flips=int((kept & flips).sum())
    )


def cifar(weights: Path, folder: Path, images: int, most: int | None) -> dict[str, Any]:
    """ResNet-20 under two kinds of masks, and under one of them after one step of training."""
    data = load_cifar10(folder, most=most)
    module = dense_network("resnet20", weights, folder)
    chosen = select_layers(trace_layers(module, HOW)[0], PATTERN).masked
    magnitude = by_magnitude(module, chosen)
    layerwise, _ = masks_of(module, chosen, data, magnitude)
    newer = a_step_later(module, data.train)
    known = identify(data.val)
    found = {}
    for method, masks in (("magnitude", magnitude), ("layerwise", layerwise)):
        masked = pruned(module, masks)
        options = RecalibrateOptions()
        reference = dense_statistics(module, data.train, HOW, options)
        recalibrated_images = update_statistics(masked, data.train, HOW, options, reference)
        about = Provenance(
            "resnet20",
            True,
            weights.name,
            "",
            len(data.classes),
            data.classes,
            HOW,
            recalibrated_images=recalibrated_images,
        )
        state = masked.state_dict()
        states = Weights(module.state_dict(), state)
        if method == "magnitude":
            states = replace(states, updated=newer.state_dict(), updated_masked=under_masks(newer, masks, state))
        started = time.monotonic()
        options = StabilityOptions(images=images, radii=(1e-6, 1e-5, 1e-4, 1e-3, 1e-2))
        report = analyze(masked, about, states, method, data.val, known, options)
        told = encode(report)
        told["images"].pop("members")
        found[method] = {"seconds": round(time.monotonic() - started, 1)} | told
    return {"model": "resnet20", "masked_layers": len(chosen), "update": UPDATE} | found


UPDATE = "one step of SGD on 128 training images, rate 1e-3, BatchNorm's statistics kept"


def a_step_later(module: nn.Module, train: Split) -> nn.Module:
    """A copy with weights that were updated once."""
    newer = copy.deepcopy(module).eval()
    x, labels = next(batches(train, HOW, 128))
    F.cross_entropy(newer(torch.from_numpy(x)), torch.from_numpy(labels)).backward()
    with torch.no_grad():
        for parameter in newer.parameters():
            parameter.sub_(1e-3 * parameter.grad)
            parameter.grad = None
    return newer


def digits() -> dict[str, Any]:
    """Seconds of the command, its output and its report."""
    with tempfile.TemporaryDirectory(prefix="maskplan-") as folder:
        masks, out, report = (
            Path(folder) / name for name in ("masks.safetensors", "sparse.safetensors", "report.json")
        )
        maskplan("mask", "digits_resnet", "--method", "magnitude", "-o", masks)
        maskplan("bake", "digits_resnet", "--masks", masks, "-o", out)
        started = time.monotonic()
        said = maskplan("stability", "digits_resnet", "--masks", masks, "--sparse", out, "--report", report)
        seconds = time.monotonic() - started
        told = json.loads(report.read_text())
    told["images"].pop("members")
    return {"seconds": round(seconds, 1), "said": said.splitlines(), "report": told}


def maskplan(*arguments: object) -> str:
    command = [sys.executable, "-m", "maskplan.pipeline", "-q", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=HERE.parents[1]).stdout


def main() -> None:
    """Measure one section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=("random", "cifar", "digits"))
    parser.add_argument("--examples", type=int, default=4_140, help="of random networks (default: %(default)s)")
    parser.add_argument("--architectures", type=int, default=69, help="that they are of (default: %(default)s)")
    parser.add_argument("--images-per-example", type=int, default=16, help="of random networks (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument("--weights", type=Path, help="weights of the dense ResNet-20")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10 as .npz files")
    parser.add_argument("--images", type=int, default=1000, help="of CIFAR's test set (default: %(default)s)")
    parser.add_argument("--most", type=int, help="use only the first CIFAR images, up to this number; all by default")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".json"), metavar="FILE")
    args = parser.parse_args()
    command = f"python benchmarks/accuracy/stability.py {args.section}"
    if args.section == "random":
        found = random(args.examples, args.architectures, args.images_per_example, args.workers)
        command += f" --examples {args.examples} --architectures {args.architectures}"
        command += f" --images-per-example {args.images_per_example}"
    elif args.section == "digits":
        found = digits()
    elif args.weights is None or args.data is None:
        parser.error("cifar needs --weights and --data")
    else:
        found = cifar(args.weights, args.data, args.images, args.most)
        command += f" --images {args.images}" + (f" --most {args.most}" if args.most else "")
    results = json.loads(args.results.read_text()) if args.results.is_file() else {}
    head = {"command": command, "device": cpu_name(), "cores": os.cpu_count(), "versions": versions()}
    write_json(args.results, results | {args.section: head | found})
    print(json.dumps({k: v for k, v in found.items() if not isinstance(v, dict)}, indent=2))


if __name__ == "__main__":
    main()
