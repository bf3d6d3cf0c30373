"""What NVIDIA's compiler makes of our files and of other tools' files, of the same networks and the same images.

    python benchmarks/performance/compiled_placement.py --others OTHER_ENVIRONMENT/bin/python

writes compiled_placement.json next to this script and prints its tables. The other environment has
`nvidia-modelopt[onnx]` and `onnxconverter-common`, which need an older ONNX than maskplan; without --others only our
files are measured. Weights are random: what is compared is where types change, which does not depend on their values. Every
tool calibrates on the same images by the largest magnitude. The compiler is TensorRT-RTX, which needs no GPU.

Columns: convolutions and matrix products, how many of them are Int8, kernels that compute neither (`alone`), and among
these those that quantize, dequantize, convert types (`cast`) or move data (`reformat`); warnings; seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from maskplan.calibration.activations import collect_histograms
from maskplan.calibration.placement import PlaceOptions, place
from maskplan.calibration.qdq import insert_qdq
from maskplan.engines.trt.compile import compile_onnx
from maskplan.exporters.metadata import describe_onnx
from maskplan.exporters.onnx_export import trace
from maskplan.exporters.precision import to_fp16
from maskplan.pipeline.core.choices import CAST, DEQUANTIZE, NO_KERNEL, PRODUCT, QUANTIZE, REFORMAT
from maskplan.pipeline.core.compilation import CompileResult
from maskplan.pipeline.core.files import write_json
from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
from maskplan.pipeline.report.write import versions
from maskplan.pipeline.timing.compare_latency import cpu_name

NETWORKS = {
    "resnet50": 224,
    "mobilenet_v2": 64,
    "shufflenet_v2_x0_5": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "googlenet": 64,
}
IMAGES = 4
HERE = Path(__file__).parent
COLUMNS = ("products", "int8", "alone", QUANTIZE, DEQUANTIZE, CAST, REFORMAT, "kernels", "warnings", "build_s")


@dataclass(frozen=True)
class Network:
    """A network in FP32, with images to calibrate on."""

    name: str
    size: int
    model: onnx.ModelProto
    path: Path
    images: Path


def network(name: str, size: int, folder: Path) -> Network:
    """Export a network with random weights."""
    module, provenance = open_checkpoint(ModelOptions(name, "random", None, 0))
    preprocessing = replace(provenance.preprocessing, height=size, width=size)
    model = trace(module, replace(provenance, preprocessing=preprocessing))
    images = np.random.default_rng(0).standard_normal((IMAGES, preprocessing.channels, size, size), np.float32)
    found = Network(name, size, model, folder / f"{name}.onnx", folder / f"{name}.npy")
    onnx.save(model, found.path)
    np.save(found.images, images)
    return found


def quantized(net: Network, options: PlaceOptions, *, half: bool) -> onnx.ModelProto:
    """Our INT8 graph."""
    placement = place(net.model, options)
    tensors = [activation.tensor for activation in placement.activations]
    histograms = collect_histograms(net.model, tensors, [np.load(net.images)], where=net.path)
    model = insert_qdq(net.model, placement, {name: histogram.amax for name, histogram in histograms.items()})
    return to_fp16(model) if half else model


def classifier(net: Network) -> str:
    """The name of the last layer."""
    return str(place(net.model).weights[-1].node)


def our_files(net: Network) -> dict[tuple[str, str], Callable[[], onnx.ModelProto]]:
    """Makers of our files by type and row."""
    rows: dict[tuple[str, str], Callable[[], onnx.ModelProto]] = {("fp16", "maskplan"): lambda: to_fp16(net.model)}
    for kind, half in (("int8+fp32", False), ("int8+fp16", True)):
        for row, options in (
            ("maskplan", lambda: PlaceOptions()),
            ("maskplan --quantize-outputs", lambda: PlaceOptions(quantize_outputs=True)),
            ("maskplan --exclude CLASSIFIER", lambda: PlaceOptions(exclude=(classifier(net),))),
        ):
            rows[kind, row] = lambda options=options, half=half: quantized(net, options(), half=half)  # type: ignore[misc]
    return rows


OTHERS = {
    ("fp16", "onnxconverter-common"): "onnxconverter_fp16",
    ("fp16", "modelopt"): "modelopt_fp16",
    ("int8+fp32", "onnxruntime, defaults"): "onnxruntime_default",
    ("int8+fp32", "onnxruntime, for TensorRT"): "onnxruntime_tensorrt",
    ("int8+fp32", "modelopt"): "modelopt_int8_fp32",
    ("int8+fp16", "modelopt"): "modelopt_int8_fp16",
}


def convert(net: Network, folder: Path, python: Path) -> dict[str, Any]:
    """Write other tools' files; why tools failed, and the versions used."""
    command = [str(python), str(HERE / "other_tools.py"), str(net.path), str(net.images), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def counts(result: CompileResult) -> dict[str, Any]:
    """The columns of one file."""
    if not result.accepted:
        return {"accepted": False, "reason": "; ".join(map(str, result.problems))}
    if result.unread_lines:
        raise SystemExit(f"the compiler's log could not be read: {result.unread_lines[0]}")
    (profile,) = result.profiles
    kernels = len(profile.layers) - profile.roles.get(NO_KERNEL, 0)
    products = profile.roles.get(PRODUCT, 0)
    return {
        "accepted": True,
        "products": products,
        "int8": profile.products.get("Int8", 0),
        "alone": kernels - products,
        **{role: profile.roles.get(role, 0) for role in (QUANTIZE, DEQUANTIZE, CAST, REFORMAT)},
        "kernels": kernels,
        "warnings": sum(warning.count for warning in result.warnings),
        "build_s": result.build_s,
    }


def compiled(path: Path) -> dict[str, Any]:
    """Compile a file and count."""
    return counts(compile_onnx(describe_onnx(path)).result)


def measure(net: Network, folder: Path, python: Path | None) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """All rows of one network, and the other tools' versions."""
    rows = []
    for (kind, row), make in our_files(net).items():
        onnx.save(make(), folder / "ours.onnx")
        rows.append({"types": kind, "row": row, **compiled(folder / "ours.onnx")})
    others = convert(net, folder, python) if python else {"failed": {}, "versions": {}}
    for (kind, row), tool in OTHERS.items() if python else ():
        why = others["failed"].get(tool)
        found = compiled(folder / f"{tool}.onnx") if why is None else {"accepted": False, "reason": why}
        rows.append({"types": kind, "row": row, **found})
    about = {"network": net.name, "size": net.size}
    return [about | row for row in sorted(rows, key=lambda row: str(row["types"]))], others["versions"]


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    head = "".join(f"{column:>11}" for column in COLUMNS)
    for number, row in enumerate(rows):
        if number == 0 or (row["network"], row["types"]) != (rows[number - 1]["network"], rows[number - 1]["types"]):
            title = f"{row['network']} {row['size']}x{row['size']}, {row['types']}"
            print(f"\n{title:<42}{head}", flush=True)
        cells = (
            "".join(f"{row[column]:>11}" for column in COLUMNS)
            if row["accepted"]
            else f"  {' '.join(row['reason'].split())[:110]}"
        )
        print(f"  {row['row']:<40}{cells}")


def main() -> None:
    """Measure all networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--others", type=Path, help="Python of the other tools' environment")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    given = [f"--{name} PYTHON" for name in ("others",) if args.others] + (
        [f"--jobs {args.jobs}"] if args.jobs > 1 else []
    )
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/performance/compiled_placement.py", *given]),
        "device": cpu_name(),
        "versions": versions(),
        "other_versions": {},
        "images": IMAGES,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as made, ThreadPoolExecutor(args.jobs) as pool:
        work = []
        for name in args.networks:
            folder = Path(made) / name
            folder.mkdir()
            work.append(pool.submit(measure, network(name, NETWORKS[name], folder), folder, args.others))
        for done in work:
            rows, others = done.result()
            result["rows"] += rows
            result["other_versions"] |= others
            show(rows)
            write_json(args.out, result)


if __name__ == "__main__":
    main()
