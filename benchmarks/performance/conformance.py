"""The 2:4 check and pruning compared with Polygraphy's, on the same loaded models in one run.

    python benchmarks/performance/conformance.py

writes conformance.json next to this script. It takes minutes, nearly all of them in Polygraphy; `--quick` omits VGG-16
and the 4 GB model and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from maskplan.engines.base import quiet_polygraphy
from maskplan.exporters.conformance import CheckOptions, check_2to4
from maskplan.exporters.onnx_export import export_onnx
from maskplan.exporters.prune import prune_model, prune_onnx
from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.files import write_json
from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
from maskplan.pipeline.recipe import Recipe
from maskplan.pipeline.report.write import versions
from maskplan.pipeline.timing.compare_latency import cpu_name

STRICT = CheckOptions(strict=True)
PATTERN = Pattern(2, 4)

# Runs a check in a separate process and prints its anonymous memory before, and its peak during the check.
PROBE = """
import sys, threading, time
from maskplan.exporters.conformance import CheckOptions, check_2to4
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
before, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.0005)
thread = threading.Thread(target=watch)
thread.start()
check_2to4(sys.argv[1], CheckOptions(strict=True))
peak[0] = max(peak[0], anonymous())
done.set()
thread.join()
print(before, peak[0])
"""


def best(work: Callable[[], Any], repeats: int = 5) -> tuple[float, Any]:
    """Seconds of the fastest run, and the result of the last one."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return min(seconds), result


def peak_memory(path: Path) -> dict[str, int]:
    """Anonymous bytes of a process that checks a file: with everything imported, and at the peak."""
    ran = subprocess.run([sys.executable, "-c", PROBE, str(path)], capture_output=True, text=True, check=True)
    before, peak = (int(word) for word in ran.stdout.split())
    return {"imported_bytes": before, "peak_bytes": peak}


def compare_with_polygraphy(name: str, folder: Path) -> dict[str, Any]:
    """Export one model, then check and prune it with both tools."""
    from polygraphy.tools.sparse import SparsityPruner

    path = folder / f"{name}.onnx"
    module, provenance = open_checkpoint(ModelOptions(name, "random"))
    export_onnx(module, provenance, Recipe().export, {"fp32": path})
    model = onnx.load(path)
    dense_s, report = best(lambda: check_2to4(path, STRICT))

    ours = onnx.ModelProto()
    ours.CopyFrom(model)
    started = time.perf_counter()
    prune_model(ours, PATTERN)
    prune_s = time.perf_counter() - started
    started = time.perf_counter()
    theirs = SparsityPruner(model).prune()
    their_prune_s = time.perf_counter() - started
    kept_differently = differences(model, ours, theirs)
    sparse = path.with_suffix(".sparse.onnx")
    onnx.save(ours, sparse)
    del model, ours, theirs

    # On a pruned model: on a dense one Polygraphy stops at the first violation.
    load_s, pruned = best(lambda: onnx.load(sparse))
    model_s, _ = best(lambda: check_2to4(pruned, STRICT))
    path_s, pruned_report = best(lambda: check_2to4(sparse, STRICT))
    their_check_s, _ = best(lambda: SparsityPruner(pruned).check(), repeats=1)
    return {
        "file_bytes": path.stat().st_size,
        "weights": len(report.weights),
        "load_s": load_s,
        "check_loaded_s": model_s,
        "check_file_s": path_s,
        "check_dense_file_s": dense_s,
        "verdict": pruned_report.verdict,
        "polygraphy_check_s": their_check_s,
        "check_speedup": their_check_s / model_s,
        "prune_s": prune_s,
        "polygraphy_prune_s": their_prune_s,
        "prune_speedup": their_prune_s / prune_s,
        "kept_differently": kept_differently,
        "memory": peak_memory(path),
    }


def differences(model: onnx.ModelProto, ours: onnx.ModelProto, theirs: onnx.ModelProto) -> dict[str, int]:
    """Groups that the tools prune differently, in weights that both pruned, and groups with ties."""
    eligible = {w.name: w.axis for w in check_2to4(model, STRICT).weights if w.axis is not None}
    their_values = {t.name: numpy_helper.to_array(t) for t in theirs.graph.initializer if t.name in eligible}
    originals = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.name in eligible}
    elements = differing = tied = 0
    for tensor in ours.graph.initializer:
        if tensor.name not in their_values:
            continue
        mine, other = numpy_helper.to_array(tensor) != 0, their_values[tensor.name] != 0
        elements += mine.size
        axis = eligible[tensor.name]
        magnitude = np.moveaxis(np.abs(originals[tensor.name]), axis, -1).reshape(-1, 4)
        ordered = np.sort(magnitude, axis=-1)
        ties = ordered[:, 1] == ordered[:, 2]
        unequal = (np.moveaxis(mine ^ other, axis, -1).reshape(-1, 4)).any(axis=-1)
        tied += int(ties.sum())
        differing += int((unequal & ~ties).sum())
    return {"elements": elements, "groups_with_ties": tied, "groups_kept_differently_without_ties": differing}


def external_4gb(folder: Path) -> dict[str, Any]:
    """A chain of big convolutions with 4 GB of external data: checked, pruned, and deleted."""
    count, channels = 64, 4096
    nodes, tensors = [], []
    weight = np.random.default_rng(0).standard_normal((channels, channels, 1, 1), dtype=np.float32)
    data = folder / "big.data"
    with data.open("wb") as file:
        for i in range(count):
            tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=weight.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", data.name), ("offset", str(file.tell())), ("length", str(weight.nbytes))):
                entry = tensor.external_data.add()
                entry.key, entry.value = key, value
            weight.tofile(file)
            tensors.append(tensor)
            nodes.append(helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"x{i + 1}"], f"conv{i}"))
    shape = ["n", channels, 8, 8]
    ends = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, shape) for i in (0, count)]
    graph = helper.make_graph(nodes, "big", ends[:1], ends[1:], tensors)
    path = folder / "big.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    check_s, report = best(lambda: check_2to4(path, STRICT), repeats=2)
    memory = peak_memory(path)
    started = time.perf_counter()
    prune_onnx(path, folder / "big.sparse.onnx", PATTERN)
    prune_s = time.perf_counter() - started
    pruned = check_2to4(folder / "big.sparse.onnx", STRICT)
    return {
        "data_bytes": data.stat().st_size,
        "check_s": check_s,
        "violating": report.violating,
        "memory": memory,
        "prune_s": prune_s,
        "pruned_verdict": pruned.verdict,
    }


def main() -> None:
    """Run all rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    quiet_polygraphy()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = ("resnet50",) if quick else ("resnet50", "vgg16")
        rows: dict[str, Any] = {}
        for model in models:
            rows[model] = compare_with_polygraphy(model, folder)
            print(model, json.dumps(rows[model], indent=2), flush=True)
        if not quick:
            rows["4 GB of external data"] = external_4gb(folder)
            print(json.dumps(rows["4 GB of external data"], indent=2), flush=True)
    if not quick:
        result = {
            "command": "python benchmarks/performance/conformance.py",
            "device": cpu_name(),
            "versions": versions(),
            "rows": rows,
        }
        write_json(Path(__file__).with_suffix(".json"), result)


if __name__ == "__main__":
    main()
