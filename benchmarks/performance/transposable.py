"""Transposable masks: cost and kept magnitude of each solver, compared with networkx's minimum-cost flow.

    python benchmarks/performance/transposable.py

writes transposable.json next to this script. Tiles are normal and seeded; those for networkx are integers, for which it
finds the optimum exactly. Times of one tile are CPU time of one thread, ours the minimum of several rounds; times of a
network are wall and CPU time of all cores. Compilation is not included.
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
from importlib import metadata
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import numpy.typing as npt
from transposable_approximate import approximate_tiles
from transposable_entropic import entropic_tiles

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.files import write_json
from maskplan.pipeline.masking.magnitude import kept_magnitude, magnitude_mask
from maskplan.pipeline.masking.transposable import TileSolver, require_tiles, solve_tiles, transposed_violations
from maskplan.pipeline.masking.transposable_flow import solve_by_flow
from maskplan.pipeline.masking.transposable_table import solve_by_table
from maskplan.pipeline.models.registry import build_model
from maskplan.pipeline.report.write import versions
from maskplan.pipeline.timing.compare_latency import cpu_name

EXACT, ENTROPIC, APPROXIMATE = METHODS = ("exact", "entropic", "approximate")
TWO_FOUR, FOUR_EIGHT = Pattern(2, 4), Pattern(4, 8)
SCALE = 2**20
ROUNDS = 5

Tiles = npt.NDArray[np.float64]


def solver_of(method: str, pattern: Pattern) -> TileSolver:
    """The solver of tiles by the name of its method."""
    exact = solve_by_table if pattern.m <= 4 else solve_by_flow
    return {EXACT: exact, ENTROPIC: entropic_tiles, APPROXIMATE: approximate_tiles}[method]


def masks_of(weights: dict[str, Any], pattern: Pattern, method: str, threads: int | None = None) -> dict[str, Any]:
    """Masks of whole weights by one method."""
    require_tiles(weights, pattern)
    return solve_tiles(weights, pattern, solver_of(method, pattern), threads=threads)


def random_tiles(count: int, m: int, seed: int) -> Tiles:
    """Magnitudes of normal weights, as integers."""
    tiles: Tiles = np.rint(np.abs(np.random.default_rng(seed).standard_normal((count, m, m))) * SCALE)
    return tiles


def best_by_networkx(tile: Tiles, n: int) -> int:
    """What the best mask keeps."""
    m = len(tile)
    graph = networkx.DiGraph()
    graph.add_node("s", demand=-n * m)
    graph.add_node("t", demand=n * m)
    for i in range(m):
        graph.add_edge("s", i, capacity=n, weight=0)
        graph.add_edge(m + i, "t", capacity=n, weight=0)
        for j in range(m):
            graph.add_edge(i, m + j, capacity=1, weight=-int(tile[i, j]))
    return -int(networkx.min_cost_flow_cost(graph))


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def compare_with_networkx(pattern: Pattern, count: int) -> dict[str, Any]:
    """The same tiles by networkx and by our solvers."""
    tiles = random_tiles(count, pattern.m, seed=0)
    best: list[int] = []
    peer_s = cpu_seconds(lambda: best.extend(best_by_networkx(tile, pattern.n) for tile in tiles)) / count
    row: dict[str, Any] = {"pattern": str(pattern), "tiles": count, "networkx_us": round(peer_s * 1e6, 1)}
    for name in METHODS:
        solve = solver_of(name, pattern)
        kept = solve(tiles, pattern)
        values = (tiles * kept).sum(axis=(1, 2))
        seconds = min(cpu_seconds(lambda: solve(tiles, pattern)) for _ in range(ROUNDS)) / count  # noqa: B023
        below = 1 - values / np.array(best)
        row[name] = {
            "us": round(seconds * 1e6, 3),
            "speedup": round(peer_s / seconds, 1),
            "same_optimum": int(np.count_nonzero(values == np.array(best))),
            "below_optimum_mean_percent": round(100 * float(below.mean()), 4),
            "below_optimum_max_percent": round(100 * float(below.max()), 3),
            "kept_share_mean": round(float(kept.mean()), 4),
        }
    return row


def bound(pattern: Pattern, count: int) -> dict[str, Any]:
    """What the 2-approximation drops, as a multiple of what the exact mask drops."""
    rng = np.random.default_rng(1)
    m = pattern.m
    kinds = {
        "normal": np.abs(rng.standard_normal((count, m, m))),
        "uniform": rng.random((count, m, m)),
        "heavy_tailed": np.abs(rng.standard_t(2, (count, m, m))),
        "small_whole_numbers": rng.integers(0, 4, (count, m, m)).astype(np.float64),
    }
    row: dict[str, Any] = {"pattern": str(pattern), "tiles_a_kind": count}
    for name, tiles in kinds.items():
        optimum = (tiles * ~solver_of(EXACT, pattern)(tiles, pattern)).sum(axis=(1, 2))
        dropped = (tiles * ~approximate_tiles(tiles, pattern)).sum(axis=(1, 2))
        some = optimum > 0
        # Where the optimum drops no magnitude, the approximation drops none either.
        assert not dropped[~some].any()
        ratios = dropped[some] / optimum[some]
        row[name] = {
            "worst": round(float(ratios.max()), 4),
            "mean": round(float(ratios.mean()), 4),
            "above_two": int(np.count_nonzero(ratios > 2 * (1 + 1e-12))),
        }
    return row


def network(name: str, pattern: Pattern, method: str) -> dict[str, Any]:
    """All convolutions of a network with seeded random weights whose K and C are multiples of M."""
    module = build_model(name, seed=0).module
    weights = {
        key: value.detach().numpy()
        for key, value in module.state_dict().items()
        if value.ndim == 4 and value.shape[0] % pattern.m == 0 and value.shape[1] % pattern.m == 0
    }
    masks_of(dict(list(weights.items())[:1]), pattern, method)
    walls, cpus = [], []
    for _ in range(ROUNDS):
        wall, cpu = time.perf_counter(), time.process_time()
        masks = masks_of(weights, pattern, method)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    assert all(transposed_violations(mask, pattern) == (0, 0) for mask in masks.values())
    total = sum(float(np.abs(w).sum(dtype=np.float64)) for w in weights.values())

    def kept(of: Callable[[str], npt.NDArray[np.bool_]]) -> float:
        return (
            sum(kept_magnitude(w, of(k)) * float(np.abs(w).sum(dtype=np.float64)) for k, w in weights.items()) / total
        )

    return {
        "model": name,
        "pattern": str(pattern),
        "method": method,
        "layers": len(weights),
        "weights": sum(w.size for w in weights.values()),
        "tiles": sum(w.size for w in weights.values()) // pattern.m**2,
        "wall_s": round(min(walls), 3),
        "wall_median_s": round(statistics.median(walls), 3),
        "cpu_s": round(min(cpus), 3),
        "kept": round(kept(masks.__getitem__), 4),
        "kept_along_c_only": round(kept(lambda k: magnitude_mask(weights[k], pattern)), 4),
    }


def size(weights: int, pattern: Pattern, method: str) -> dict[str, Any]:
    """One weight of about this many entries, in this process: time per entry, and memory beyond weight and mask."""
    side = round(weights**0.5 / pattern.m) * pattern.m
    weight = np.random.default_rng(0).standard_normal((side, side), np.float32)
    masks_of({"small": weight[: 16 * pattern.m, : 16 * pattern.m]}, pattern, method)
    before = memory_bytes("VmRSS")
    wall = time.perf_counter()
    mask = masks_of({"weight": weight}, pattern, method)["weight"]
    wall = time.perf_counter() - wall
    # An upper bound: loading libraries may have taken more memory than it kept.
    extra = memory_bytes("VmHWM") - before - mask.nbytes
    rounds = max(ROUNDS, min(50, 10**7 // weight.size))
    cpus = [cpu_seconds(lambda: masks_of({"weight": weight}, pattern, method, threads=1)) for _ in range(rounds)]
    return {
        "weights": weight.size,
        "cpu_ns_a_weight": round(min(cpus) / weight.size * 1e9, 2),
        "wall_s_all_cores": round(wall, 4),
        "weight_and_mask_bytes": weight.nbytes + mask.nbytes,
        "extra_bytes": max(extra, 0),
    }


def memory_bytes(key: str) -> int:
    """A value of this process's memory in bytes, by its name in /proc/self/status."""
    (line,) = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(key)]
    return int(line.split()[1]) * 1024


def sizes(pattern: Pattern, method: str) -> dict[str, Any]:
    """Each size in a separate process."""
    found = []
    for exponent in (5, 6, 7, 8):
        arguments = ["--size", str(10**exponent), "--pattern", str(pattern), "--method", method]
        done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    times = [row["cpu_ns_a_weight"] for row in found]
    return {
        "pattern": str(pattern),
        "method": method,
        "slowest_by_fastest": round(max(times) / min(times), 3),
        "sizes": found,
    }


def main() -> None:
    """Measure everything, or one size in a separate process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--method", choices=METHODS, default=APPROXIMATE)
    args = parser.parse_args()
    if args.size:
        n, _, m = args.pattern.partition(":")
        print(json.dumps(size(args.size, Pattern(int(n), int(m)), args.method)))
        return
    load = os.getloadavg()[0]
    result = {
        "command": "python benchmarks/performance/transposable.py",
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "versions": versions() | {name: metadata.version(name) for name in ("numba", "networkx")},
        "networks": [
            network("resnet50", TWO_FOUR, EXACT),
            network("resnet50", FOUR_EIGHT, EXACT),
            network("resnet50", FOUR_EIGHT, ENTROPIC),
            network("resnet50", TWO_FOUR, APPROXIMATE),
        ],
        "tiles": [
            compare_with_networkx(TWO_FOUR, 1000),
            compare_with_networkx(FOUR_EIGHT, 1000),
            compare_with_networkx(Pattern(8, 16), 200),
        ],
        "bound": [bound(TWO_FOUR, 10_000), bound(FOUR_EIGHT, 10_000)],
        "scaling": [sizes(TWO_FOUR, APPROXIMATE), sizes(FOUR_EIGHT, APPROXIMATE), sizes(TWO_FOUR, EXACT)],
    }
    # Other load on the machine raises wall times, and CPU times where threads share a core.
    result["load_before_and_after"] = [round(load, 1), round(os.getloadavg()[0], 1)]
    write_json(Path(__file__).with_suffix(".json"), result)
    for part in ("networks", "tiles", "bound", "scaling"):
        for row in result[part]:
            print(json.dumps(row))


if __name__ == "__main__":
    main()
