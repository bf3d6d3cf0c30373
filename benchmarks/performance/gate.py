"""Cost of the parity gate compared with bare inference of both models, and its memory for ImageNet's 50,000 images.

    python benchmarks/performance/gate.py

writes gate.json next to this script. Both sides alternate in one process, on the same ONNX Runtime sessions and
batches. `--quick` uses few images and writes nothing.

Bare inference is ONNX Runtime alone on float32 batches in memory. The gate does everything that `compare` does, from
image files in memory (`files`: with decoding and normalization) and from the same float32 batches (`arrays`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maskplan.engines.base import Classifier
from maskplan.engines.ort import OrtEngine
from maskplan.exporters.onnx_export import ExportOptions, export_onnx
from maskplan.exporters.prune import prune_onnx
from maskplan.pipeline.core.artifacts import Pattern, Preprocessing
from maskplan.pipeline.core.files import write_json
from maskplan.pipeline.data.dataset import Split, batches
from maskplan.pipeline.data.image_sets import identify
from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
from maskplan.pipeline.parity.compare import compare, parity_report
from maskplan.pipeline.parity.model_outputs import fixed_image_positions, run_on_batches
from maskplan.pipeline.parity.options import CompareOptions
from maskplan.pipeline.report.write import versions
from maskplan.pipeline.timing.compare_latency import cpu_name

MODELS = Path(__file__).parents[1] / "accuracy" / "models.py"
BATCH = 32
OPTIONS = CompareOptions(max_top1_drop=100, min_agreement=0)


@dataclass(frozen=True)
class Lazy:
    """Noise images that are generated when read, deterministic per index: PPM files of `size` x `size` pixels."""

    labels: npt.NDArray[np.int64]
    size: int

    def name(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int) -> bytes:
        pixels = np.random.default_rng(index).bytes(self.size * self.size * 3)
        return b"P6 %d %d 255\n" % (self.size, self.size) + pixels


@dataclass(frozen=True)
class Loaded:
    """The files of another collection, in memory."""

    labels: npt.NDArray[np.int64]
    files: tuple[bytes, ...]

    def name(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int) -> bytes:
        return self.files[index]


def split_of(images: Any) -> Split:
    return Split("val", images, np.arange(len(images.labels)))


def pair(model: str, folder: Path) -> tuple[Path, Path, Preprocessing]:
    """A model with random weights and its pruned twin as ONNX files."""
    module, made = open_checkpoint(ModelOptions(model, "random"))
    dense, sparse = folder / "dense.onnx", folder / "sparse.onnx"
    export_onnx(module, made, ExportOptions(), {"fp32": dense})
    prune_onnx(dense, sparse, Pattern(2, 4))
    return dense, sparse, made.preprocessing


def cost(model: str, count: int, repeats: int) -> dict[str, Any]:
    """Wall and CPU seconds of the gate and of bare inference, alternately."""
    with tempfile.TemporaryDirectory() as name:
        dense, sparse, preprocessing = pair(model, Path(name))
        labels = np.random.default_rng(0).integers(0, 10, count)
        lazy = Lazy(labels, preprocessing.height)
        val = split_of(Loaded(labels, tuple(lazy.read(i) for i in range(count))))
        loaded = list(batches(val, preprocessing, BATCH))
        engines = [OrtEngine(path) for path in (dense, sparse)]
        first, second = (Classifier(engine, path.name) for engine, path in zip(engines, (dense, sparse), strict=True))
        fixed = fixed_image_positions(val, OPTIONS.fixed_images)

        def bare() -> None:
            for x, _ in loaded:
                for engine in engines:
                    engine.infer({"input": x})

        def from_arrays() -> None:
            predictions = run_on_batches({"dense": first, "sparse": second}, iter(loaded), count, fixed)
            parity_report(predictions, "sparse", [None, None], val, OPTIONS)

        def from_files() -> None:
            compare(first, second, preprocessing, [None, None], val, OPTIONS)

        variants: dict[str, Callable[[], None]] = {"bare": bare, "arrays": from_arrays, "files": from_files}
        timings: dict[str, list[tuple[float, float]]] = {variant: [] for variant in variants}
        bare()
        for turn in range(repeats):
            # Rotated, so that each variant goes first equally often.
            for variant in [*list(variants)[turn % 3 :], *list(variants)[: turn % 3]]:
                wall, cpu = time.perf_counter(), time.process_time()
                variants[variant]()
                timings[variant].append((time.perf_counter() - wall, time.process_time() - cpu))
    medians = {
        variant: [statistics.median(s[i] for s in times) for i in range(2)] for variant, times in timings.items()
    }
    ratios = {
        variant: [
            statistics.median(a[i] / b[i] for a, b in zip(timings[variant], timings["bare"], strict=True))
            for i in range(2)
        ]
        for variant in ("arrays", "files")
    }
    return {
        "model": model,
        "images": count,
        "repeats": repeats,
        "ways": {
            variant: {
                "wall_s": round(medians[variant][0], 3),
                "cpu_s": round(medians[variant][1], 3),
                "wall_s_each": [round(wall, 3) for wall, _ in timings[variant]],
            }
            for variant in variants
        },
        "wall_ratio": {variant: round(ratio[0], 3) for variant, ratio in ratios.items()},
        "cpu_ratio": {variant: round(ratio[1], 3) for variant, ratio in ratios.items()},
    }


def tiny(path: Path, classes: int = 1000) -> None:
    """Average pooling and a linear head: a model that costs almost nothing, so that the gate itself dominates."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    head = np.random.default_rng(len(path.name)).normal(size=(3 * 7 * 7, classes)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("AveragePool", ["input"], ["pooled"], kernel_shape=[32, 32], strides=[32, 32]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("MatMul", ["flat", "head"], ["logits"]),
        ],
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 224, 224])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
        [numpy_helper.from_array(head, "head")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def probe(dense: Path, sparse: Path, count: int) -> dict[str, Any]:
    """Run the gate on lazily generated 256x256 images, cropped to 224x224: peak resident memory of this process."""
    preprocessing = Preprocessing(3, 224, 224, 256, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    val = split_of(Lazy(np.arange(count) % 1000, 256))
    before = peak_resident()
    started = time.perf_counter()
    identify(val)
    with Classifier(OrtEngine(dense), "dense") as first, Classifier(OrtEngine(sparse), "sparse") as second:
        report = compare(first, second, preprocessing, [None, None], val, OPTIONS)
    assert report.images == count
    return {
        "images": count,
        "seconds": round(time.perf_counter() - started, 1),
        "imported_bytes": before,
        "peak_resident_bytes": peak_resident(),
    }


def peak_resident() -> int:
    """Peak resident bytes of this program, without what it inherited from its parent process."""
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def memory(name: str, make: Callable[[Path], tuple[Path, Path]], count: int) -> dict[str, Any]:
    """`probe` in a separate process."""
    with tempfile.TemporaryDirectory() as folder:
        dense, sparse = make(Path(folder))
        command = [sys.executable, __file__, "--probe", str(dense), str(sparse), "--images", str(count)]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"model": name, **json.loads(ran.stdout)}


def two_tiny(folder: Path) -> tuple[Path, Path]:
    paths = folder / "dense.onnx", folder / "sparse.onnx"
    for path in paths:
        tiny(path)
    return paths


def resnet50s(folder: Path) -> tuple[Path, Path]:
    dense, sparse, _ = pair("resnet50", folder)
    return dense, sparse


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--probe", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--parts", default="cost,memory")
    args = parser.parse_args()
    if args.probe:
        print(json.dumps(probe(*args.probe, args.images)))
        return
    out = Path(__file__).with_suffix(".json")
    found: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    found |= {"command": "python benchmarks/performance/gate.py", "device": cpu_name(), "cores": os.cpu_count()}
    found["versions"] = versions()
    if "cost" in args.parts:
        found["load_before_cost"] = round(os.getloadavg()[0], 2)
        count, repeats = (640, 1) if args.quick else (args.images, args.repeats)
        found["cost"] = cost(f"{MODELS}:resnet20", count, repeats)
        found["cost"]["model"] = "benchmarks/accuracy/models.py:resnet20"
    if "memory" in args.parts:
        found["memory"] = [
            memory("pooling and a linear head", two_tiny, 256 if args.quick else 50_000),
            memory("resnet50", resnet50s, 64 if args.quick else 320),
        ]
    print(json.dumps(found, indent=2))
    if not args.quick:
        write_json(out, found)


if __name__ == "__main__":
    main()
