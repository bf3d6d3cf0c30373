"""Quality and cost of searches, each section with the published figures that it is compared with.

    python benchmarks/performance/mask_search.py [SECTION ...]

measures the named sections, all by default, and writes them to mask_search.json next to this script; other sections of
the file are kept. Each section records its command, device and versions, because sections may be measured separately.
Wall time depends on the load of the machine, which is recorded too; CPU time is that of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.files import write_json
from maskplan.pipeline.permutation.search import SearchOptions, kept, search, steps
from maskplan.pipeline.report.write import versions
from maskplan.pipeline.timing.compare_latency import cpu_name

# Search efforts on Apex's matrix.
EFFORTS = (0.25, 1.0, 2.0, 4.0, 8.0, 16.0)
SEEDS = range(2, 22)
# From the README of Apex's search: efficacy, seconds and device.
APEX = (
    ("exhaustive, 12 columns at a time", 36.6, 0.86, "V100"),
    ("exhaustive, 8 columns at a time, 100 escapes", 35.5, 0.152, "V100"),
    ("exhaustive, 8 columns at a time, 100 escapes", 35.5, 465.7, "CPU"),
    ("1000 bounded regressions of single swaps", 36.0, 20.2, "V100"),
    ("100,000 random permutations", 14.1, 11.5, "V100"),
)


def permutation() -> dict[str, Any]:
    """The matrix that Apex publishes figures for, similar matrices, and all of ResNet-50."""
    warm_up()
    return {"apex_matrix": apex_matrix(), "other_seeds": other_seeds(), "resnet50": resnet50()}


def uniform(seed: int) -> npt.NDArray[np.float64]:
    """(128, 64), as Apex makes its own with seed 1."""
    np.random.seed(seed)
    return np.random.rand(128, 64)


def warm_up() -> None:
    """Compile before anything is timed."""
    search(uniform(1), SearchOptions(effort=1e-3, restarts=1))


def apex_matrix() -> dict[str, Any]:
    """Efficacy and seconds on one core for some efforts, over seeds of the search."""
    scores = uniform(1)
    rows = []
    for effort in EFFORTS:
        options = [SearchOptions(effort=effort, seed=seed, restarts=1) for seed in range(10)]
        results = [timed(scores, each) for each in options]
        rows.append({"effort": effort, "steps": steps(*scores.shape, effort), **summary(results)})
    return {
        "kept_as_given": round(kept(scores, 2, 4), 3),
        "kept_bound": round(kept(scores, 32, 64), 3),
        "cores": 1,
        "rows": rows,
        "published": [dict(zip(("search", "efficacy", "seconds", "device"), row, strict=True)) for row in APEX],
    }


def other_seeds() -> dict[str, Any]:
    """One search each of matrices that were not used for tuning."""
    effort = 4.0
    results = [timed(uniform(seed), SearchOptions(effort=effort, restarts=1)) for seed in SEEDS]
    return {"matrices": f"seeds {SEEDS[0]} to {SEEDS[-1]}", "cores": 1, "effort": effort, **summary(results)}


def timed(scores: npt.NDArray[np.float64], options: SearchOptions) -> tuple[float, float, float]:
    """Efficacy, seconds, CPU seconds."""
    started, cpu = time.perf_counter(), time.process_time()
    found = search(scores, options)
    return found.efficacy, time.perf_counter() - started, time.process_time() - cpu


def summary(results: list[tuple[float, float, float]]) -> dict[str, Any]:
    efficacy, wall, cpu = zip(*results, strict=True)
    return {
        "searches": len(results),
        "efficacy_mean": round(statistics.mean(efficacy), 3),
        "efficacy_min": round(min(efficacy), 3),
        "efficacy_max": round(max(efficacy), 3),
        "wall_s_max": round(max(wall), 3),
        "cpu_s_mean": round(statistics.mean(cpu), 3),
        "cpu_s_max": round(max(cpu), 3),
    }


def resnet50() -> dict[str, Any]:
    """Every convolution that 2:4 could have, as if each could move alone, in a process of its own for its memory."""
    done = subprocess.run([sys.executable, __file__, "--resnet50"], stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def search_resnet50() -> dict[str, Any]:
    """Layers side by side on two cores, a chain each: random weights of the real shapes, the dearest first."""
    import torch
    from torchvision.models import resnet50 as net

    torch.manual_seed(0)
    weights = [module.weight.detach() for module in net().modules() if isinstance(module, torch.nn.Conv2d)]
    layers = [weight.abs().permute(0, 2, 3, 1).flatten(0, 2).numpy() for weight in weights if weight.shape[1] % 4 == 0]
    layers.sort(key=np.size, reverse=True)
    warm_up()
    load, before = os.getloadavg()[0], high_water_bytes()
    started, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda scores: search(scores, SearchOptions(restarts=1)), layers))
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    shapes = sorted({scores.shape for scores in layers})
    rows = []
    for shape in shapes:
        same = [each.efficacy for each, scores in zip(found, layers, strict=True) if scores.shape == shape]
        rows.append(
            {"rows": shape[0], "columns": shape[1], "layers": len(same), "efficacy": round(statistics.mean(same), 2)}
        )
    total, room = (sum(getattr(each, name) - each.kept_before for each in found) for name in ("kept", "kept_bound"))
    return {
        "layers": len(layers),
        "improved": sum(each.kept > each.kept_before for each in found),
        "threads": 2,
        "effort": SearchOptions().effort,
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "load_before": round(load, 2),
        "peak_bytes": high_water_bytes(),
        "peak_bytes_before": before,
        "kept_gain_percent": round(100 * total / sum(each.kept_before for each in found), 3),
        "efficacy": round(100 * total / room, 2),
        "shapes": rows,
    }


def high_water_bytes() -> int:
    """The most memory that this process has held; what getrusage tells includes its parent's."""
    (line,) = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {"permutation": permutation}


def main() -> None:
    """Measure sections, or one part of a section in a separate process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--resnet50", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.resnet50:
        print(json.dumps(search_resnet50()))
        return
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    path = Path(__file__).with_suffix(".json")
    result = json.loads(path.read_text()) if path.exists() else {}
    for name in args.sections or SECTIONS:
        load = os.getloadavg()[0]
        found = SECTIONS[name]()
        result[name] = {
            "command": f"python benchmarks/performance/mask_search.py {name}",
            "device": cpu_name(),
            "cores": os.cpu_count(),
            "load_before": round(load, 2),
            "versions": {**versions(), "numba": metadata.version("numba")},
            **found,
        }
        write_json(path, result)
        print(json.dumps({name: found}, indent=2))


if __name__ == "__main__":
    main()
