"""Channel permutation of whole networks: groups moved and fixed, magnitude kept under 2:4, and unchanged outputs.

    python benchmarks/performance/permute_networks.py [MODEL ...]

measures the named models, all by default, and writes them to permute_networks.json next to this script; other models in
the file are kept. Weights are random, including the parameters of norms, whose statistics come from noise, so that a
misplaced channel changes the outputs. Outputs are compared in float64. Wall time depends on the load of the machine,
which is recorded too; CPU time is that of the process.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskplan.pipeline.core.artifacts import Pattern, Preprocessing
from maskplan.pipeline.core.files import write_json
from maskplan.pipeline.masking.policy import LayerPolicy
from maskplan.pipeline.models.checkpoint import ModelOptions, load_module, open_checkpoint
from maskplan.pipeline.models.layers import sample_input
from maskplan.pipeline.permutation.permute import PermuteOptions, permute
from maskplan.pipeline.permutation.record import FIXED, MOVED, UNREAD, Permuted
from maskplan.pipeline.permutation.search import SearchOptions, search
from maskplan.pipeline.report.write import versions
from maskplan.pipeline.timing.compare_latency import cpu_name

MODELS = (
    "resnet18",
    "resnet50",
    "vgg16_bn",
    "shufflenet_v2_x1_0",
    "densenet121",
    "convnext_tiny",
    "efficientnet_b0",
    "timm/efficientnet_b0",
)
PATTERN = Pattern(2, 4)
# ConvNeXt consists of linear layers, which are not masked by default.
ALSO_LINEAR = ("convnext_tiny",)


def measure(model: str, effort: float, include_linear: bool) -> dict[str, Any]:
    """One network at its own image size."""
    options = ModelOptions(model, "random")
    module, provenance = open_checkpoint(options)
    randomize_norms(module, provenance.preprocessing)
    load = os.getloadavg()[0]
    started, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        done = permute(
            module,
            provenance,
            PATTERN,
            LayerPolicy(include_linear),
            PermuteOptions(effort=effort),
            Path(folder) / "permuted.safetensors",
            Path(folder) / "permutation.safetensors",
        )
        wall, cpu = time.perf_counter() - started, time.process_time() - cpu
        difference = compare(module, load_module(options, done.checkpoint), provenance.preprocessing)
    return {
        "command": f"python benchmarks/performance/permute_networks.py {model}",
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "load_before": round(load, 2),
        "versions": versions(),
        "masked": "convolutions and linear layers" if include_linear else "convolutions",
        "effort": effort,
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "outputs_differ_float64": difference,
        **figures(done),
    }


def randomize_norms(module: nn.Module, preprocessing: Preprocessing) -> None:
    """Random scales and shifts, then statistics from noise, so that the outputs depend on the image."""
    generator = torch.Generator().manual_seed(1)
    norms = [layer for layer in module.modules() if "norm" in type(layer).__name__.lower()]
    running = [layer for layer in norms if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for layer in norms:
            for name, tensor in layer.named_parameters(recurse=False):
                if name == "weight":
                    tensor.uniform_(0.5, 1.5, generator=generator)
                else:
                    tensor.normal_(0, 0.3, generator=generator)
        for layer in running:
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
        module(sample_input(preprocessing, 4, seed=3))
    module.eval()


def compare(before: nn.Module, after: nn.Module, preprocessing: Preprocessing) -> float:
    """The largest change of the outputs on noise, relative to the largest difference between two images."""
    sample = sample_input(preprocessing, 2, seed=5).double()
    with torch.no_grad():
        one, other = (copy.deepcopy(module).double().eval()(sample) for module in (before, after))
    return float((one - other).abs().max() / (one[0] - one[1]).abs().max())


def figures(done: Permuted) -> dict[str, Any]:
    groups = done.permutation.groups
    can_gain = [g for g in groups if g.state not in (FIXED, UNREAD)]
    rose = [g for g in can_gain if g.state == MOVED and g.kept_after > g.kept_before]
    alone = [g.efficacy for g in rose if g.efficacy is not None]
    reasons: Counter[tuple[str, str]] = Counter()
    for group in groups:
        if group.reason is not None:
            reasons[group.state, group.reason] += group.channels
    return {
        "groups_that_can_gain": len(can_gain),
        "groups_risen": len(rose),
        "risen_percent": round(100 * len(rose) / max(len(can_gain), 1), 1),
        "groups_sharing_quadruples": len(rose) - len(alone),
        "groups_unread": sum(g.state == UNREAD for g in groups),
        "groups_fixed": sum(g.state == FIXED for g in groups),
        "channels_moved": sum(g.channels for g in rose),
        "kept_before": round(done.kept_before, 3),
        "kept_after": round(done.kept_after, 3),
        "kept_gain_percent": round(100 * (done.kept_after / done.kept_before - 1), 3),
        "efficacy": round(done.efficacy, 2),
        "stayed": [
            {"state": state, "reason": reason, "channels": channels} for (state, reason), channels in reasons.items()
        ],
    }


def main() -> None:
    """Measure the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of any kind; by default {', '.join(MODELS)}")
    parser.add_argument("--effort", type=float, default=1.0, help="of the search")
    args = parser.parse_args()
    # Compile before anything is timed.
    search(torch.rand(16, 16).numpy(), SearchOptions(effort=1e-3, restarts=1))
    path = Path(__file__).with_suffix(".json")
    result = json.loads(path.read_text()) if path.exists() else {}
    for model in args.models or MODELS:
        for linear in (False, True) if model in ALSO_LINEAR else (False,):
            name = f"{model}, linear layers too" if linear else model
            result[name] = measure(model, args.effort, linear)
            write_json(path, result)
            print(json.dumps({name: result[name]}, indent=2), flush=True)


if __name__ == "__main__":
    main()
