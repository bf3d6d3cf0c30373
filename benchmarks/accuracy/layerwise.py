"""Layer-wise masks and conversion: accuracy on CIFAR-10, time on ResNet-50.

    python benchmarks/accuracy/layerwise.py accuracy --weights resnet20.safetensors --data DIR

masks ResNet-20 2:4 layer-wise, and converts a copy with half of its weights zero (the smallest over all masked layers,
recalibrated) to 2:4, without and with update. All rows are recalibrated alike; `val` is read once, at the end.

    python benchmarks/accuracy/layerwise.py resnet50

times the masks of ResNet-50 at 224x224, with random weights on 256 random images. Both write their section of
layerwise.json next to this script.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accuracy import PATTERN, Hits, by_magnitude, dense_network, hits, paired, pruned, recalibrated
from cifar import HOW, load_cifar10
from PIL import Image
from torch import nn

from maskplan.pipeline.core.artifacts import Layer, Provenance
from maskplan.pipeline.core.files import write_json
from maskplan.pipeline.core.serialization import encode
from maskplan.pipeline.data.dataset import Dataset, Split
from maskplan.pipeline.learning.masked_net import Masks
from maskplan.pipeline.masking.layerwise import layerwise_mask, output_error
from maskplan.pipeline.masking.policy import select_layers
from maskplan.pipeline.models.batchnorm import RecalibrateOptions
from maskplan.pipeline.models.layers import trace_layers
from maskplan.pipeline.models.registry import build_model
from maskplan.pipeline.models.state_dict import fit_weights, read_weights
from maskplan.pipeline.pruning.convert import ConvertOptions, convert
from maskplan.pipeline.pruning.mask import MaskOptions
from maskplan.pipeline.pruning.second_moments import MomentOptions, second_moments
from maskplan.pipeline.report.write import versions
from maskplan.pipeline.timing.compare_latency import cpu_name


def accuracy(weights: Path, folder: Path, out: Path, most: int | None) -> dict[str, Any]:
    """Layer-wise masks compared with magnitude masks, and conversions with their source."""
    data = load_cifar10(folder, most=most)
    module = dense_network("resnet20", weights, folder)
    chosen = select_layers(trace_layers(module, HOW)[0], PATTERN).masked
    magnitude = by_magnitude(module, chosen)
    started = time.process_time()
    layerwise, shares = masks_of(module, chosen, data, magnitude)
    seconds = time.process_time() - started
    source = recalibrated(half_zero(module, chosen), data, dense=module)
    nets = {
        "dense": module,
        "magnitude, recalibrated": recalibrated(pruned(module, magnitude), data, dense=module),
        "layerwise, recalibrated": recalibrated(pruned(module, layerwise), data, dense=module),
        "source, 50% zeros, recalibrated": source,
        "source to 2:4 by magnitude, recalibrated": recalibrated(
            pruned(source, by_magnitude(source, chosen)), data, dense=source
        ),
    }
    provenance = Provenance("resnet20", True, weights.name, "", len(data.classes), data.classes, HOW)
    conversions = {}
    for update, row in ((False, "source converted, no update"), (True, "source converted, updated")):
        file = out / "converted.safetensors"
        _, report = convert(source, provenance, data, ConvertOptions(update=update), RecalibrateOptions(), file)
        nets[row] = copy.deepcopy(source)
        fit_weights(nets[row], read_weights(file), where=file)
        conversions[row] = encode(report)
    right = {row: hits(net.eval(), data.val) for row, net in nets.items()}
    return {
        "model": "resnet20",
        "masked_layers": len(chosen),
        "images": MaskOptions().images,
        "val_images": len(data.val),
        "layerwise_cpu_seconds": round(seconds, 1),
        "output_error_by_magnitude_and_layerwise": {name: [round(v, 4) for v in pair] for name, pair in shares.items()},
        "rows": {row: row_of(right, row) for row in nets},
        "layerwise_against_magnitude": paired(right["magnitude, recalibrated"], right["layerwise, recalibrated"]),
        "update_against_no_update": paired(right["source converted, no update"], right["source converted, updated"]),
        "conversions": conversions,
    }


def masks_of(
    module: nn.Module, layers: Sequence[Layer], data: Dataset, magnitude: Masks
) -> tuple[Masks, dict[str, tuple[float, float]]]:
    """Layer-wise masks, and each layer's output error under magnitude and layer-wise masks, relative to the mean square."""
    state, masks, shares = module.state_dict(), {}, {}
    for layer, found in second_moments(module, layers, HOW, data.train, MomentOptions(images=MaskOptions().images)):
        weight, moment = state[layer.name].numpy(), found.effective
        masks[layer.name] = layerwise_mask(weight, moment, PATTERN)
        whole = float(output_error(weight, moment).sum())
        by_magnitude, by_layer = (
            float(output_error(np.where(m[layer.name], 0, weight), moment).sum()) / whole for m in (magnitude, masks)
        )
        shares[layer.name] = (by_magnitude, by_layer)
    return masks, shares


def half_zero(module: nn.Module, layers: Sequence[Layer]) -> nn.Module:
    """A copy with the smaller half of all weights of these layers set to zero."""
    sparse = copy.deepcopy(module)
    weights = [dict(sparse.named_parameters())[layer.name] for layer in layers]
    with torch.no_grad():
        cut = torch.cat([w.abs().flatten() for w in weights]).median()
        for weight in weights:
            weight.masked_fill_(weight.abs() <= cut, 0.0)
    return sparse


def row_of(right: dict[str, Hits], row: str) -> dict[str, Any]:
    return {"top1": round(100 * float(right[row].mean()), 3)} | paired(right["dense"], right[row])


def resnet50(images: int) -> dict[str, Any]:
    """Time and memory, with the load of the machine."""
    built = build_model("resnet50", seed=0)
    chosen = select_layers(trace_layers(built.module, built.preprocessing)[0], PATTERN).masked
    train = Split("train", RandomImages(np.zeros(images, np.int64)), np.arange(images))
    state = built.module.state_dict()
    before, wall, cpu, searching = os.getloadavg(), time.monotonic(), time.process_time(), 0.0
    options = MomentOptions(images=images)
    for layer, found in second_moments(built.module, chosen, built.preprocessing, train, options):
        begun = time.process_time()
        layerwise_mask(state[layer.name].numpy(), found.effective, PATTERN, name=layer.name)
        searching += time.process_time() - begun
    return {
        "images": images,
        "masked_layers": len(chosen),
        "minutes": round((time.monotonic() - wall) / 60, 2),
        "cpu_minutes": round((time.process_time() - cpu) / 60, 2),
        "cpu_minutes_of_search": round(searching / 60, 2),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "load_before": [round(v, 1) for v in before],
        "load_after": [round(v, 1) for v in os.getloadavg()],
    }


class RandomImages:
    """Colored clouds of 256x256 pixels."""

    def __init__(self, labels: npt.NDArray[np.int64]) -> None:
        self.labels = labels

    def name(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int) -> bytes:
        small = np.random.default_rng(index).integers(0, 256, (14, 14, 3)).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(small).resize((256, 256), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        return buffer.getvalue()


def main() -> None:
    """Measure one section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=("accuracy", "resnet50"))
    parser.add_argument("--weights", type=Path, help="weights of the dense ResNet-20")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10 as .npz files")
    parser.add_argument("--most", type=int, help="use only the first CIFAR images, up to this number; all by default")
    parser.add_argument("--images", type=int, default=256, help="for ResNet-50 (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".json"), metavar="FILE")
    args = parser.parse_args()
    if args.section == "resnet50":
        found = resnet50(args.images)
    elif args.weights is None or args.data is None:
        parser.error("accuracy needs --weights and --data")
    else:
        with tempfile.TemporaryDirectory(prefix="maskplan-") as folder:
            found = accuracy(args.weights, args.data, Path(folder), args.most)
    command = f"python benchmarks/accuracy/layerwise.py {args.section}" + (f" --most {args.most}" if args.most else "")
    results = json.loads(args.results.read_text()) if args.results.is_file() else {}
    head = {"command": command, "device": cpu_name(), "cores": os.cpu_count(), "versions": versions()}
    write_json(args.results, results | {args.section: head | found})
    print(json.dumps({k: v for k, v in found.items() if k != "conversions"}, indent=2))


if __name__ == "__main__":
    main()
