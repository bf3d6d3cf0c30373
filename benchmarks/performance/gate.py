"""What the parity gate costs beside the bare inference of both models, and the memory that ImageNet's 50,000 images take.

`python benchmarks/performance/gate.py` writes gate.json beside this script. Both sides run in one process, in turn, on the same ONNX
Runtime sessions and batches. `--quick` takes few images and writes nothing.

Bare inference is ONNX Runtime alone on batches of float32 that lie in memory. The gate does all that `compare` does, from
image files in memory (`files`: decoding and normalizing included) and from the same float32 batches (`arrays`).
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
from maskplan.pipeline.data.dataset import Split, batches, identify
from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
from maskplan.pipeline.parity.compare import compare, parity_report
from maskplan.pipeline.parity.model_outputs import fixed_image_positions, run_on_batches
from maskplan.pipeline.parity.options import CompareOptions
from maskplan.pipeline.report.write import versions
from maskplan.pipeline.timing.compare_latency import cpu_name

BENCHMARKS = Path(__file__).parent
BATCH = 32
OPTIONS = CompareOptions(max_top1_drop=100, min_agreement=0)


@dataclass(frozen=True)
class Lazy:
    """Noise that is made when it is read, the same for the same index: a PPM file of `size` x `size` pixels."""

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
    """Wall and CPU seconds of the gate and of bare inference, in turn."""
    with tempfile.TemporaryDirectory() as name:
        dense, sparse, how = pair(model, Path(name))
        labels = np.random.default_rng(0).integers(0, 10, count)
        lazy = Lazy(labels, how.height)
        val = split_of(Loaded(labels, tuple(lazy.read(i) for i in range(count))))
        loaded = list(batches(val, how, BATCH))
        engines = [OrtEngine(path) for path in (dense, sparse)]
        first, second = (Classifier(engine, path.name) for engine, path in zip(engines, (dense, sparse), strict=True))
        fixed = fixed_image_positions(val, OPTIONS.fixed_images)

        def bare() -> None:
            for x, _ in loaded:
                for engine in engines:
                    engine.infer({"input": x})

        def from_arrays() -> None:
            said = run_on_batches({"dense": first, "sparse": second}, iter(loaded), count, fixed)
            parity_report(said, "sparse", [None, None], val, OPTIONS)

        def from_files() -> None:
            compare(first, second, how, [None, None], val, OPTIONS)

        ways: dict[str, Callable[[], None]] = {"bare": bare, "arrays": from_arrays, "files": from_files}
        spent: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        bare()
        for turn in range(repeats):
            # Each way goes first as often as any other.
            for way in [*list(ways)[turn % 3 :], *list(ways)[: turn % 3]]:
                wall, cpu = time.perf_counter(), time.process_time()
                ways[way]()
                spent[way].append((time.perf_counter() - wall, time.process_time() - cpu))
    medians = {way: [statistics.median(s[i] for s in times) for i in range(2)] for way, times in spent.items()}
    ratios = {
        way: [statistics.median(a[i] / b[i] for a, b in zip(spent[way], spent["bare"], strict=True)) for i in range(2)]
        for way in ("arrays", "files")
    }
    return {
        "model": model,
        "images": count,
        "repeats": repeats,
        "ways": {
            way: {
                "wall_s": round(medians[way][0], 3),
                "cpu_s": round(medians[way][1], 3),
                "wall_s_each": [round(wall, 3) for wall, _ in spent[way]],
            }
            for way in ways
        },
        "wall_ratio": {way: round(ratio[0], 3) for way, ratio in ratios.items()},
        "cpu_ratio": {way: round(ratio[1], 3) for way, ratio in ratios.items()},
    }


def tiny(path: Path, classes: int = 1000) -> None:
    """Average pooling and a linear head: a model that costs nothing, so that the gate itself is seen."""
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
    """Run the gate on lazily made 256x256 images, cut to 224x224, in this process: its peak resident memory."""
    how = Preprocessing(3, 224, 224, 256, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    val = split_of(Lazy(np.arange(count) % 1000, 256))
    before = peak_resident()
    started = time.perf_counter()
    identify(val)
    with Classifier(OrtEngine(dense), "dense") as first, Classifier(OrtEngine(sparse), "sparse") as second:
        report = compare(first, second, how, [None, None], val, OPTIONS)
    assert report.images == count
    return {
        "images": count,
        "seconds": round(time.perf_counter() - started, 1),
        "imported_bytes": before,
        "peak_resident_bytes": peak_resident(),
    }


def peak_resident() -> int:
    """Bytes, as the kernel counted them for this program; what it inherited from the one that started it is left out."""
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def memory(name: str, make: Callable[[Path], tuple[Path, Path]], count: int) -> dict[str, Any]:
    """`probe` in a process of its own."""
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
    out = BENCHMARKS / "gate.json"
    found: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    found |= {"command": "python benchmarks/performance/gate.py", "device": cpu_name(), "cores": os.cpu_count()}
    found["versions"] = versions()
    if "cost" in args.parts:
        found["load_before_cost"] = round(os.getloadavg()[0], 2)
        count, repeats = (640, 1) if args.quick else (args.images, args.repeats)
        found["cost"] = cost(f"{BENCHMARKS / 'models.py'}:resnet20", count, repeats)
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
