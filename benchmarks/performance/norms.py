"""Cost and tightness of the spectral norms of a network's layers.

    python benchmarks/performance/norms.py [SECTION ...]

measures the named sections, all by default, and writes them to norms.json next to this script; other sections of the
file are kept. Weights are torchvision's random initialization; masks are 2:4 by magnitude. Each part runs in a separate
process for its memory. Wall time depends on the load of the machine, which is recorded too; CPU time is that of the
process. Only layers whose norm is not exact are compared. Power iteration gives a lower bound that has not fully
converged, so each bound exceeds the norm by at most the given ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torchvision

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.files import write_json
from maskplan.pipeline.masking.magnitude import magnitude_mask
from maskplan.pipeline.report.write import versions
from maskplan.pipeline.stability.axis import Axis
from maskplan.pipeline.stability.conv_spectrum import symbols
from maskplan.pipeline.stability.norms import Norm, conv_norm, conv_update_factor, linear_norm, power_iteration
from maskplan.pipeline.timing.compare_latency import cpu_name

NETWORKS = ("resnet50", "vgg16")
POWER_STEPS = 30
GRAM_STEPS = 5


@dataclass(frozen=True)
class Layer:
    """A weight and, for a convolution, the arguments of `conv_norm`."""

    name: str
    weight: npt.NDArray[np.float32]
    options: dict[str, Any]


def layers(network: str, weights: str) -> list[Layer]:
    """All convolutions and linear layers at 224x224, `dense` or `masked` where 2:4 is possible."""
    torch.manual_seed(0)
    net = getattr(torchvision.models, network)(weights=None).eval()
    found = []

    def note(name: str, module: torch.nn.Module, inputs: Any) -> None:
        weight = module.weight.detach().numpy()
        options: dict[str, Any] = {}
        if isinstance(module, torch.nn.Conv2d):
            given = ("stride", "padding", "dilation", "groups")
            options = {"size": tuple(inputs[0].shape[2:]), **{key: getattr(module, key) for key in given}}
        if weights == "masked" and weight.shape[1] % 4 == 0:
            weight = np.where(magnitude_mask(weight, Pattern(2, 4)), weight, np.float32(0))
        found.append(Layer(name, weight, options))

    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, inputs, name=name: note(name, module, inputs))
    with torch.inference_mode():
        net(torch.zeros(1, 3, 224, 224))
    return found


def norm(layer: Layer) -> Norm:
    return conv_norm(layer.weight, **layer.options) if layer.options else linear_norm(layer.weight)


def measure_norms(network: str, weights: str) -> dict[str, Any]:
    """Every layer's norm once."""
    given = layers(network, weights)
    load, before = os.getloadavg()[0], high_water_bytes()
    started, cpu = time.perf_counter(), time.process_time()
    found = {layer.name: norm(layer) for layer in given}
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {
        "layers": len(found),
        "by": dict(Counter(each.method for each in found.values())),
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "load_before": round(load, 2),
        "threads": torch.get_num_threads(),
        "peak_bytes": high_water_bytes(),
        "peak_bytes_before": before,
        "norms": {name: each.value for name, each in found.items()},
        "not_exact": [name for name, each in found.items() if not each.exact],
    }


def measure_lower(network: str, weights: str) -> dict[str, Any]:
    """Power iteration on the convolutions larger than 1x1."""
    given = wide(network, weights)
    return {layer.name: power_iteration(layer.weight, **layer.options, steps=POWER_STEPS) for layer in given}


def measure_gram(network: str, weights: str) -> dict[str, Any]:
    """Other upper bounds: Gram iteration at every frequency of the same torus, and the unfolded kernel's."""
    started, cpu = time.perf_counter(), time.process_time()
    gram = {}
    for layer in wide(network, weights):
        kernel = torch.from_numpy(layer.weight[None].astype(np.float64))
        stacks = symbols(kernel, *axes(layer))
        gram[layer.name] = max(float(gram_bound(stack, GRAM_STEPS).max()) for stack in stacks)
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    unfolded = {
        layer.name: float(
            conv_update_factor(layer.weight.shape[2:], layer.options["stride"])
            * linear_norm(layer.weight.reshape(len(layer.weight), -1)).value
        )
        for layer in wide(network, weights)
    }
    return {"gram": gram, "gram_wall_s": round(wall, 1), "gram_cpu_s": round(cpu, 1), "unfolded": unfolded}


def gram_bound(matrices: torch.Tensor, steps: int) -> torch.Tensor:
    """Upper bounds of spectral norms by Gram iteration (Delattre et al. 2024): |G_T|_F^(1/2^T), T times G <- G G^*.

    At most min(P, Q)^(1/2^(T+1)) times too high. Takes (B, P, Q) to (B,).
    """
    # The factors divided out so far, as the logarithm of the bound.
    logarithm = torch.zeros(len(matrices), dtype=torch.float64)
    current = matrices
    for step in range(steps + 1):
        size = torch.linalg.matrix_norm(current)
        logarithm += torch.log(size) / 2**step
        current = current / torch.where(size > 0, size, 1.0)[:, None, None]
        if step < steps:
            tall = current.shape[1] > current.shape[2]
            current = current.mH @ current if tall else current @ current.mH
    return torch.exp(logarithm)


def wide(network: str, weights: str) -> Iterator[Layer]:
    """Convolutions with more than one tap."""
    for layer in layers(network, weights):
        if layer.options and layer.weight.shape[2:] != (1, 1):
            yield layer


def axes(layer: Layer) -> tuple[Axis, Axis]:
    given = (layer.options[key] for key in ("stride", "padding", "dilation"))
    rows, columns = map(Axis, layer.options["size"], layer.weight.shape[2:], *given)
    return rows, columns


def high_water_bytes() -> int:
    """The most memory that this process has held; what getrusage tells includes its parent's."""
    (line,) = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


PARTS = {"norms": measure_norms, "lower": measure_lower, "gram": measure_gram}


def part(name: str, network: str, weights: str) -> dict[str, Any]:
    """One part in a separate process."""
    done = subprocess.run(
        [sys.executable, __file__, "--part", name, network, weights], stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def section(network: str) -> dict[str, Any]:
    """Cost with dense and masked weights, tightness with masked ones."""
    results = {weights: part("norms", network, weights) for weights in ("dense", "masked")}
    lower, others = part("lower", network, "masked"), part("gram", network, "masked")
    upper, names = results["masked"]["norms"], results["masked"]["not_exact"]
    raised = [name for name, value in upper.items() if value > results["dense"]["norms"][name]]
    if below := [name for name in lower if not lower[name] <= upper[name] <= others["gram"][name]]:
        raise AssertionError(f"a lower bound exceeds an upper bound: {below}")
    details = ("norms", "not_exact")
    return {
        **{weights: {key: each[key] for key in each if key not in details} for weights, each in results.items()},
        "masked_norm_above_dense": len(raised),
        "compared": {
            "layers": len(names),
            "power_steps": POWER_STEPS,
            "torus_to_power": ratios(upper, lower, names),
            "gram_to_torus": {"steps": GRAM_STEPS, **ratios(others["gram"], upper, names)},
            "gram_wall_s": others["gram_wall_s"],
            "gram_cpu_s": others["gram_cpu_s"],
            "unfolded_to_torus": ratios(others["unfolded"], upper, names),
        },
    }


def ratios(high: dict[str, float], low: dict[str, float], names: list[str]) -> dict[str, float]:
    found = [high[name] / low[name] for name in names]
    return {"median": round(statistics.median(found), 4), "max": round(max(found), 4)}


def main() -> None:
    """Measure sections, or do one part of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        name, network, weights = args.part
        print(json.dumps(PARTS[name](network, weights)))
        return
    if unknown := set(args.sections) - set(NETWORKS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    path = Path(__file__).with_suffix(".json")
    result = json.loads(path.read_text()) if path.exists() else {}
    for name in args.sections or NETWORKS:
        found = section(name)
        result[name] = {
            "command": f"python benchmarks/performance/norms.py {name}",
            "device": cpu_name(),
            "cores": os.cpu_count(),
            "versions": {**versions(), "torch": torch.__version__, "torchvision": metadata.version("torchvision")},
            **found,
        }
        write_json(path, result)
        print(json.dumps({name: found}, indent=2))


if __name__ == "__main__":
    main()
