"""Masks from few unlabeled images of CIFAR-10, or from none, compared with layer-wise and magnitude masks.

    python benchmarks/accuracy/few_images.py resnet20 --weights resnet20.safetensors --data DIR --images 1024

Every masked row sees the same N training images and no label: masks, the choice of the epoch and the BatchNorm statistics.
Rows of synthetic images see no image of CIFAR-10 (`--synthetic N`). With `--permute`, masks are also chosen after a
permutation of the channels. `val` is read once, at the end. Writes few_images.json next to this script and the tables of
docs/results.md.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accuracy import (
    PATTERN,
    by_magnitude,
    dense_network,
    dense_training,
    hits,
    network_parser,
    paired,
    permuted,
    pruned,
    recalibrated,
)
from cifar import HOW, load_cifar10

from maskplan.pipeline.core.artifacts import Provenance
from maskplan.pipeline.core.serialization import encode
from maskplan.pipeline.data.dataset import UNLABELED, Dataset, Images, Split
from maskplan.pipeline.data.few_images import limit_images
from maskplan.pipeline.learning.few_images import few_image_options
from maskplan.pipeline.learning.options import LearnOptions
from maskplan.pipeline.masking.maskset import load_masks
from maskplan.pipeline.masking.policy import select_layers
from maskplan.pipeline.models.layers import trace_layers
from maskplan.pipeline.models.synthesize import SynthesizeOptions, synthesize_dataset
from maskplan.pipeline.pruning.mask import MaskOptions, choose_masks
from maskplan.pipeline.report.write import versions
from maskplan.pipeline.timing.compare_latency import cpu_name


@dataclass(frozen=True)
class Unlabeled:
    """Images without their labels."""

    images: Images

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return np.full(len(self.images.labels), UNLABELED, np.int64)

    def name(self, index: int) -> str:
        return self.images.name(index)

    def read(self, index: int) -> bytes:
        return self.images.read(index)


def few(data: Dataset, count: int, seed: int) -> Dataset:
    """At most `count` training images, without labels."""
    parts = limit_images(data, count, seed)
    train, select = (Split(p.role, Unlabeled(p.images), p.indices) for p in (parts.train, parts.select))
    return Dataset(data.classes, train, select, data.val)


def measure(
    name: str, weights: Path | None, folder: Path, images: int, synthetic: int, seed: int, *, permutes: bool = False
) -> dict[str, Any]:
    """All rows of one network and number of images."""
    data = load_cifar10(folder)
    limited = few(data, images, seed)
    module = dense_network(name, weights, folder)
    chosen = select_layers(trace_layers(module, HOW)[0], PATTERN).masked
    provenance = Provenance(name, True, "weights", "", len(data.classes), data.classes, HOW)
    nets = {"dense": module, "dense, recalibrated": recalibrated(module, data)}
    nets["magnitude, recalibrated"] = recalibrated(pruned(module, by_magnitude(module, chosen)), limited, dense=module)
    nets["magnitude, images alone"] = recalibrated(pruned(module, by_magnitude(module, chosen)), limited)
    minutes = {}
    started = time.monotonic()
    made = synthesize_dataset(module, provenance, SynthesizeOptions(images=synthetic, seed=seed))
    minutes["synthesize"] = round((time.monotonic() - started) / 60, 2)
    nets["magnitude, synthetic images"] = recalibrated(pruned(module, by_magnitude(module, chosen)), made, dense=module)
    tried = [
        ("layerwise, synthetic images", "layerwise", made, module),
        ("layerwise, recalibrated", "layerwise", limited, module),
        ("learned, recalibrated", "learned", limited, module),
    ]
    if permutes:
        started = time.monotonic()
        moved = permuted(module, provenance, seed)
        minutes["permute"] = round((time.monotonic() - started) / 60, 2)
        tried += [
            ("layerwise, permuted, recalibrated", "layerwise", limited, moved),
            ("learned, permuted, recalibrated", "learned", limited, moved),
        ]
    for row, method, source, dense in tried:
        out, started = Path(f"few-{name}.safetensors"), time.monotonic()
        options = MaskOptions(method=method, images=images, few_images=True, learn=LearnOptions(seed=seed))
        choose_masks(dense, provenance, options, out, source)
        minutes[row] = round((time.monotonic() - started) / 60, 2)
        nets[row] = recalibrated(pruned(dense, load_masks(out)), source, dense=dense)
        out.unlink()
    right = {row: hits(net.eval(), data.val) for row, net in nets.items()}
    reference = max(("dense", "dense, recalibrated"), key=lambda row: right[row].mean())
    return {
        "model": name,
        "seed": seed,
        "images": images,
        "rate": LearnOptions().lr,
        "synthetic_images": synthetic,
        "command": f"python benchmarks/accuracy/few_images.py {name} --images {images} --seed {seed}"
        + (" --permute" if permutes else ""),
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "select_top1": round(100 * float(hits(module, data.select).mean()), 3),
        "dense_training": dense_training(weights),
        "learning": encode(few_image_options(LearnOptions(seed=seed), len(limited.train))),
        "versions": versions(),
        "minutes": minutes,
        "val_images": len(data.val),
        "reference": reference,
        "learned_against_layerwise": paired(right["layerwise, recalibrated"], right["learned, recalibrated"]),
        "synthetic_against_magnitude": paired(right["magnitude, images alone"], right["layerwise, synthetic images"]),
        "rows": {
            row: {"top1": round(100 * float(found.mean()), 3)} | paired(right[reference], found)
            for row, found in right.items()
        },
    }


def main() -> None:
    """Measure one network and add it to the results."""
    parser = network_parser(__doc__, epochs=0)
    parser.add_argument("--images", type=int, default=1024, help="training images (default: %(default)s)")
    parser.add_argument("--synthetic", type=int, default=256, help="synthetic images (default: %(default)s)")
    parser.add_argument("--permute", action="store_true", help="rows of permuted channels as well")
    parser.add_argument("--busy", action="store_true", help="the machine does other work: minutes are not plotted")
    args = parser.parse_args()
    found = measure(args.model, args.weights, args.data, args.images, args.synthetic, args.seed, permutes=args.permute)
    if args.busy:
        found["busy"] = True
    args.results.add("few_images", found, ("model", "seed", "images", "rate", "select_top1"))
    args.results.write_page()
    print(json.dumps({"minutes": found["minutes"], **found["rows"]}, indent=2))


if __name__ == "__main__":
    main()
