"""Accuracy of INT8 on CIFAR-10: dense and sparse in FP32, FP16 and INT8 on ONNX Runtime; `val` is read once.

    python benchmarks/accuracy/int8.py resnet20 --weights resnet20.safetensors --data DIR

learns masks as accuracy.py does, calibrates by every method, compares the methods on `select`, and measures the best on
`val`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import PATTERN, Hits, by_magnitude, dense_network, network_parser, paired, pruned, recalibrated
from cifar import HOW, load_cifar10
from torch import nn

from maskplan.calibration.calibrate import CalibrateOptions, CalibrationImages, calibrate
from maskplan.calibration.ranges import METHODS
from maskplan.engines.base import Classifier
from maskplan.engines.ort import OrtEngine
from maskplan.exporters.conformance import CheckOptions, check_2to4
from maskplan.exporters.onnx_export import ExportOptions, export_onnx
from maskplan.pipeline.core.artifacts import OnnxModel, Provenance
from maskplan.pipeline.core.choices import FP32
from maskplan.pipeline.data.dataset import Dataset, Split, batches
from maskplan.pipeline.learning.options import LearnerFiles, LearnOptions
from maskplan.pipeline.learning.trainer import learn_masks
from maskplan.pipeline.masking.policy import select_layers
from maskplan.pipeline.models.layers import trace_layers
from maskplan.pipeline.report.write import versions
from maskplan.pipeline.timing.compare_latency import cpu_name


def hits(model: OnnxModel, split: Split) -> Hits:
    """For each image, whether an ONNX file predicts it correctly."""
    with Classifier(OrtEngine(model.path), model.path.name) as classifier:
        found = [classifier.logits(x).argmax(axis=1) == labels for x, labels in batches(split, HOW, 250)]
    return np.concatenate(found)


def exported(module: nn.Module, masked: tuple[str, ...], folder: Path, name: str) -> dict[str, OnnxModel]:
    """A network in FP32 and FP16."""
    pattern = str(PATTERN) if masked else None
    made = Provenance(name, True, "", "", 10, (), HOW, masked, pattern, "channel" if masked else None)
    paths = {"fp32": folder / f"{name}.onnx", "fp16": folder / f"{name}.fp16.onnx"}
    return dict(zip(paths, export_onnx(module, made, ExportOptions(), paths), strict=True))


def quantized(model: OnnxModel, data: Dataset, folder: Path, method: str) -> OnnxModel:
    """The same in INT8."""
    out = folder / f"{model.path.stem}.{method}.int8.onnx"
    source = CalibrationImages(data.train, data.select, HOW)
    return calibrate(model, source, CalibrateOptions(method=method), {FP32: out}).models[0]


def measure(module: nn.Module, data: Dataset, options: LearnOptions, state: Path) -> dict[str, Any]:
    """The table of one network."""
    layers, _ = trace_layers(module, HOW)
    magnitude = by_magnitude(module, select_layers(layers, PATTERN).masked)
    masks, learning = learn_masks(
        module, magnitude, PATTERN, HOW, data, options, files=LearnerFiles(state, log_dir=state.parent / state.stem)
    )
    sparse = recalibrated(pruned(module, masks), data, dense=module)
    right: dict[str, Hits] = {}
    select: dict[str, dict[str, float]] = {}
    conformance = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for name, net, masked in (("dense", module, ()), ("sparse", sparse, tuple(masks))):
            models = exported(net, masked, folder, name)
            by_method = {method: quantized(models["fp32"], data, folder, method) for method in METHODS}
            select[name] = {
                row: round(100 * float(hits(model, data.select).mean()), 3)
                for row, model in ({"fp32": models["fp32"]} | by_method).items()
            }
            method = max(METHODS, key=lambda m, of=select[name]: of[m])  # type: ignore[misc]
            models["int8"] = by_method[method]
            select[name]["chosen"] = method  # type: ignore[assignment]
            if masked:
                verdict = check_2to4(models["int8"].path, CheckOptions())
                conformance = {"verdict": verdict.verdict, "conforming": verdict.conforming}
            right |= {f"{name} {precision}": hits(model, data.val) for precision, model in models.items()}
    return {
        "epochs": learning.epochs,
        "masked_layers": len(masks),
        "calibration_images": CalibrateOptions().images,
        "val_images": len(data.val),
        "conformance": conformance,
        "select_top1": select,
        "rows": {
            row: {"top1": round(100 * float(found.mean()), 3)} | paired(right["dense fp32"], found)
            for row, found in right.items()
        },
        "sparse_int8_against_sparse_fp32": paired(right["sparse fp32"], right["sparse int8"]),
    }


def main() -> None:
    """Measure one network and add it to the results."""
    parser = network_parser(__doc__, epochs=2)
    args = parser.parse_args()
    options = LearnOptions(epochs=args.epochs, seed=args.seed, augment="shift+flip")
    torch.manual_seed(args.seed)
    module, data = dense_network(args.model, args.weights, args.data), load_cifar10(args.data)
    folder = Path(tempfile.gettempdir()) / f"maskplan-{args.model}-{args.seed}-{args.epochs}-shift+flip"
    found = {
        "model": args.model,
        "seed": args.seed,
        "command": f"python benchmarks/accuracy/int8.py {args.model} --epochs {args.epochs} --seed {args.seed}",
        "device": cpu_name(),
        "versions": versions(),
        **measure(module, data, options, folder / "learning.safetensors"),
    }
    args.results.add("int8", found)
    args.results.write_page()


if __name__ == "__main__":
    main()
