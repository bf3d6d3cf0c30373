"""Cost of a step of mask learning, compared with an ordinary training step and with the papers' formulation.

    python benchmarks/performance/mask_step.py

writes mask_step.json next to this script; `--steps` measures only the whole steps, at batch 8 and 32. The step of
learning is the one that ships: channels-last, the dense teacher's forward pass, the correction of BatchNorm by it, sampling,
forward, backward and Adam on the gates. The ordinary step is forward and backward with weight gradients and no optimizer, in
NCHW and in channels-last; the ratio is to the faster one. All alternate in one process; peak memory is measured in separate
processes. The papers' formulation (unfold, mask, one matrix product) is implemented here from its description, vectorized
over all groups, and compared layer by layer.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.files import write_json
from maskplan.pipeline.learning.batch_correction import BatchCorrection
from maskplan.pipeline.learning.danhofer2024 import FlatGates, conv_by_unfolding
from maskplan.pipeline.learning.gates import Gates
from maskplan.pipeline.learning.masked_net import MaskedNet
from maskplan.pipeline.learning.options import LearnOptions
from maskplan.pipeline.learning.output_loss import distillation_loss
from maskplan.pipeline.masking.policy import select_layers
from maskplan.pipeline.models.layers import trace_layers
from maskplan.pipeline.models.registry import build_model
from maskplan.pipeline.report.write import versions
from maskplan.pipeline.timing.compare_latency import cpu_name

PATTERN = Pattern(2, 4)
LAYERS = ((64, 64, 56), (128, 128, 28), (256, 256, 14), (512, 512, 7))


def device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(work: Callable[[], None]) -> float:
    """Seconds until the work is done, including work on the GPU."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def ordinary(name: str, x: torch.Tensor, y: torch.Tensor, *, channels_last: bool = False) -> Callable[[], None]:
    """One step with weight gradients."""
    net = build_model(name, seed=0).module.to(x.device).train()
    if channels_last:
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()

    return step


def masked(name: str, x: torch.Tensor, y: torch.Tensor) -> tuple[Callable[[], None], int]:
    """One step of mask learning as it ships, and the bytes of the gates, their gradients and Adam's state."""
    made = build_model(name, seed=0)
    x = x.contiguous(memory_format=torch.channels_last)
    teacher = copy.deepcopy(made.module).eval().requires_grad_(False).to(x.device, memory_format=torch.channels_last)
    layers, _ = trace_layers(made.module, made.preprocessing)
    names = [layer.name for layer in select_layers(layers, PATTERN).masked]
    student = made.module.to(x.device, memory_format=torch.channels_last)
    net = MaskedNet(student, names, PATTERN, 3.0, hard=True).to(x.device)
    correction = BatchCorrection(teacher, student)
    adam = torch.optim.Adam(net.logits(), lr=0.1, fused=True)
    seeds = iter(range(10**9))

    def step() -> None:
        adam.zero_grad()
        with correction.observing():
            with torch.no_grad():
                target = teacher(x)
            logits, _ = net(x, 1.0, 0.3, [next(seeds) for _ in net.logits()])
        distillation_loss(logits, target, LearnOptions().distill_temperature).backward()
        adam.step()

    return step, 4 * sum(p.numel() * p.element_size() for p in net.logits())


def compare_steps(name: str, batch: int, repeats: int) -> dict[str, Any]:
    """Both steps alternately, and the peak memory of each."""
    x = torch.randn(batch, 3, 224, 224, device=device())
    y = torch.randint(0, 1000, (batch,), device=device())
    learning, own = masked(name, x, y)
    steps = {
        "nchw": ordinary(name, x, y),
        "channels_last": ordinary(name, x, y, channels_last=True),
        "masks": learning,
    }
    seconds: dict[str, list[float]] = {key: [] for key in steps}
    for i in range(repeats + 1):
        for key, step in steps.items():
            took = timed(step)
            if i:
                seconds[key].append(took)
    peaks = {key: peak_of(key, name, batch) for key in ("ordinary", "masks")}
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    fastest = min(medians["nchw"], medians["channels_last"])
    return {
        "model": name,
        "batch": batch,
        "repeats": repeats,
        "ordinary_nchw_s": round(medians["nchw"], 3),
        "ordinary_channels_last_s": round(medians["channels_last"], 3),
        "masks_s": round(medians["masks"], 3),
        "time_ratio": round(medians["masks"] / fastest, 3),
        "ordinary_peak_bytes": peaks["ordinary"],
        "masks_peak_bytes": peaks["masks"],
        "gates_gradients_adam_bytes": own,
        "extra_memory_ratio": round((peaks["masks"] - peaks["ordinary"]) / own, 3),
    }


def peak_of(key: str, name: str, batch: int) -> int:
    """Peak memory of two steps in a separate process."""
    command = [sys.executable, __file__, "--peak", key, "--model", name, "--batch", str(batch)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def peak(key: str, name: str, batch: int) -> int:
    """Peak memory of two steps in this process."""
    x = torch.randn(batch, 3, 224, 224, device=device())
    y = torch.randint(0, 1000, (batch,), device=device())
    step = ordinary(name, x, y) if key == "ordinary" else masked(name, x, y)[0]
    for _ in range(2):
        timed(step)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return high_water_bytes()


def high_water_bytes() -> int:
    """The most memory that this process has held; what getrusage tells includes its parent's."""
    (line,) = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def layer_step(kind: str, k: int, c: int, size: int, batch: int) -> Callable[[], None]:
    """Forward and backward of one masked 3x3 convolution, ours or in the papers' form."""
    x = torch.randn(batch, c, size, size, device=device())
    weight = torch.randn(k, c, 3, 3, device=device())
    if kind == "ours":
        x = x.to(memory_format=torch.channels_last)  # as in the learner
        gates: nn.Module = Gates(weight, PATTERN, 3.0).to(device())
    else:
        gates = FlatGates(weight, PATTERN, torch.Generator().manual_seed(0)).to(device())
    x.requires_grad_()
    generator = torch.Generator().manual_seed(1)

    def step() -> None:
        gates.zero_grad()
        x.grad = None
        if isinstance(gates, Gates):
            out = F.conv2d(x, gates.sample(weight, 1.0, 1), padding=1)
        else:
            assert isinstance(gates, FlatGates)
            out = conv_by_unfolding(x, weight * gates.sample(1.0, generator), 1, 1)
        out.sum().backward()

    return step


def compare_layers(batch: int) -> list[dict[str, Any]]:
    """Time and peak memory of both formulations."""
    rows = []
    for k, c, size in LAYERS:
        steps = {kind: layer_step(kind, k, c, size, batch) for kind in ("ours", "papers")}
        seconds: dict[str, list[float]] = {kind: [] for kind in steps}
        for i in range(6):
            for kind, step in steps.items():
                took = timed(step)
                if i:
                    seconds[kind].append(took)
        peaks = {}
        for kind in steps:
            arguments = ["--layer", kind, "--shape", f"{k},{c},{size}", "--batch", str(batch)]
            done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
            peaks[kind] = int(done.stdout.split()[-1])
        ours, papers = (statistics.median(seconds[kind]) for kind in ("ours", "papers"))
        rows.append(
            {
                "shape": [k, c, 3, 3],
                "size": size,
                "batch": batch,
                "ours_s": round(ours, 4),
                "papers_s": round(papers, 4),
                "speedup": round(papers / ours, 2),
                "ours_extra_bytes": peaks["ours"],
                "papers_extra_bytes": peaks["papers"],
                "memory_ratio": round(peaks["papers"] / max(peaks["ours"], 1), 2),
            }
        )
    return rows


def layer_peak(kind: str, shape: str, batch: int) -> int:
    """Memory that the steps of one layer add to the process, including the layer's tensors."""
    k, c, size = map(int, shape.split(","))
    layer_step(kind, 8, 8, 4, 1)()  # libraries and compilers allocate at their first use
    before = high_water_bytes()
    step = layer_step(kind, k, c, size, batch)
    for _ in range(2):
        timed(step)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return high_water_bytes() - before


def main() -> None:
    """Measure everything, or one part in a separate process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", choices=("ordinary", "masks"))
    parser.add_argument("--layer", choices=("ours", "papers"))
    parser.add_argument("--shape", default="64,64,56")
    parser.add_argument(
        "--steps", action="store_true", help="only the whole steps; the other sections stay as they are"
    )
    args = parser.parse_args()
    if args.peak:
        print(peak(args.peak, args.model, args.batch))
        return
    if args.layer:
        print(layer_peak(args.layer, args.shape, args.batch))
        return
    known = json.loads(Path(__file__).with_suffix(".json").read_text()) if args.steps else {}
    result = {
        "command": "python benchmarks/performance/mask_step.py",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "steps": [compare_steps(args.model, batch, args.repeats) for batch in (8, args.batch)],
        "layers": known.get("layers") or compare_layers(args.batch),
    }
    write_json(Path(__file__).with_suffix(".json"), result)
    print(json.dumps(result["steps"], indent=2))
    for row in result["layers"]:
        print(row)


if __name__ == "__main__":
    main()
