"""Cost of measuring calibration ranges: compared with plain ONNX Runtime inference of the same images, and in memory.

    python benchmarks/performance/calibrate.py

writes calibrate.json next to this script. Both sides alternate on chunks of the images, so that a slowdown of the host
affects both; each turn opens a session and runs one chunk. Plain inference uses ONNX Runtime's default settings. Our
time includes choosing the ranges once for all chunks, by the slowest method. Peak memory is that of a separate process
that measures ranges on all images in one pass.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from maskplan.calibration.activations import collect_histograms
from maskplan.calibration.histogram import Histogram, union
from maskplan.calibration.ranges import METHODS, RangeOptions, amax_of
from maskplan.pipeline.core.files import write_json
from maskplan.pipeline.report.write import versions
from maskplan.pipeline.timing.compare_latency import cpu_name


def exported(name: str, folder: Path) -> Path:
    """A network with random weights, exported in a separate process to keep PyTorch out of this one's memory."""
    program = (
        "import sys; from pathlib import Path\n"
        "from maskplan.exporters.onnx_export import trace\n"
        "from maskplan.pipeline.core.artifacts import Provenance\n"
        "from maskplan.pipeline.models.registry import build_model\n"
        "made = build_model(sys.argv[1], seed=0)\n"
        "about = Provenance(sys.argv[1], False, 'random', '', 1000, (), made.preprocessing)\n"
        "Path(sys.argv[2]).write_bytes(trace(made.module, about).SerializeToString())\n"
    )
    path = folder / "model.onnx"
    subprocess.run([sys.executable, "-c", program, name, str(path)], check=True)
    return path


def data_inputs(model: onnx.ModelProto) -> list[str]:
    """The data inputs of every Conv and Gemm."""
    return list(dict.fromkeys(n.input[0] for n in model.graph.node if n.op_type in ("Conv", "Gemm")))


def noise(model: onnx.ModelProto, seed: int, images: int, batch: int) -> Iterator[npt.NDArray[np.float32]]:
    """Batches for a model."""
    generator = np.random.default_rng(seed)
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    for start in range(0, images, batch):
        yield generator.standard_normal((min(batch, images - start), *shape), dtype=np.float32)


def plain(path: Path, batches: list[npt.NDArray[np.float32]]) -> None:
    """Inference and nothing else."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in batches:
        session.run(None, {session.get_inputs()[0].name: batch})


def compare(path: Path, images: int, batch: int, chunks: int) -> dict[str, Any]:
    """Both sides alternately, then the ranges by every method."""
    model = onnx.load(path)
    names = data_inputs(model)
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    parts: list[dict[str, Histogram]] = []
    for chunk in range(-1, chunks):  # the first one warms up
        batches = list(noise(model, chunk + 1, batch if chunk < 0 else images // chunks, batch))
        for key in list(seconds)[:: 1 if chunk % 2 else -1]:
            started = time.perf_counter()
            if key == "plain":
                plain(path, batches)
            else:
                parts.append(collect_histograms(model, names, batches))
            if chunk >= 0:
                seconds[key].append(time.perf_counter() - started)
    whole = {name: union(part[name] for part in parts[1:]) for name in names}
    choosing = {}
    for method in METHODS:
        started = time.perf_counter()
        for histogram in whole.values():
            amax_of(histogram, RangeOptions(method))
        choosing[method] = time.perf_counter() - started
    totals = {key: sum(values) for key, values in seconds.items()}
    return {
        "images": images // chunks * chunks,
        "batch": batch,
        "tensors": len(names),
        "values": sum(h.count for h in whole.values()),
        "plain_s": round(totals["plain"], 2),
        "counted_s": round(totals["ours"], 2),
        "chunk_ratios": [round(a / b, 2) for a, b in zip(seconds["ours"], seconds["plain"], strict=True)],
        "ranges_s": {method: round(s, 2) for method, s in choosing.items()},
        "time_ratio": round((totals["ours"] + max(choosing.values())) / totals["plain"], 3),
    }


def peak(path: Path, images: int, batch: int) -> dict[str, int]:
    """Peak memory of one pass over all images, in a separate process."""
    arguments = ["--peak", str(path), "--images", str(images), "--batch", str(batch)]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    loaded, high = map(int, done.stdout.split()[-2:])
    return {"peak_bytes": high, "before_bytes": loaded}


def measure_peak(path: Path, images: int, batch: int) -> None:
    """Print the memory of this process before the pass, and its peak."""
    model = onnx.load(path)
    before = high_water_bytes()
    histograms = collect_histograms(model, data_inputs(model), noise(model, 0, images, batch))
    for histogram in histograms.values():
        amax_of(histogram, RangeOptions("entropy"))
    print(before, high_water_bytes())


def high_water_bytes() -> int:
    """The most memory that this process has held; what getrusage tells includes its parent's."""
    (line,) = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def main() -> None:
    """Measure everything, or one part in a separate process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--peak", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    if args.peak:
        measure_peak(args.peak, args.images, args.batch)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = exported(args.model, Path(folder))
        result = {
            "command": "python benchmarks/performance/calibrate.py",
            "device": cpu_name(),
            "cores": os.cpu_count(),
            "versions": versions(),
            "model": f"{args.model}, random weights",
            "time": compare(path, args.images, args.batch, args.chunks),
            "memory": peak(path, args.images, args.batch),
        }
    write_json(args.out, result)
    print(result["time"])
    print(result["memory"])


if __name__ == "__main__":
    main()
