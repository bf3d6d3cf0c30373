"""Everything that we want to know once a GPU is at hand, in one call of less than nine minutes, in one JSON file.

    python benchmarks/gpu.py --data DIR_OF_CIFAR10 [--out gpu.json] [--minutes 8.5] [--parts host probe ...]

Each part runs in a process of its own with a share of the time, and what it has found is saved as it comes, so that a part
that hangs or crashes costs only itself. `--dry-run` tries every part on a CPU with tiny sizes and, without --data, made-up
images; what needs a GPU is then recorded as an error.

| part | finds |
|---|---|
| `host` | GPU, driver, versions, and any library of TensorRT on the machine |
| `probe` | whether cuSPARSELt takes masked weights, and how fast it is (maskplan probe) |
| `step` | seconds of a training step and of a step of mask learning |
| `rtx` | whether plans of TensorRT-RTX run; outputs, latency and kernels with and without the sparse flag |
| `accuracy` | dense, magnitude and learned masks on networks of full width, as far as time allows |
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskplan.pipeline.core.files import write_json

HERE = Path(__file__).parent
# Shares of the whole time. `accuracy` comes last and gets what the others leave.
SHARES = {"host": 0.08, "probe": 0.12, "step": 0.14, "rtx": 0.22, "accuracy": 0.44}
Found = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What a part is given.

    Attributes:
        dry_run: Tiny sizes, on the CPU.
        data: Folder of CIFAR-10.
        deadline: On the clock of `time.monotonic`.
        save: Keeps what was found so far.
    """

    dry_run: bool
    data: Path
    deadline: float
    save: Callable[[Found], None]

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()


def host(task: Task) -> None:
    """The machine, and what of TensorRT is on it."""
    import torch

    from maskplan.pipeline.report.write import versions
    from maskplan.pipeline.timing.compare_latency import cpu_name

    found: Found = {"cpu": cpu_name(), "cores": os.cpu_count(), "versions": versions(), "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        memory = torch.cuda.get_device_properties(0).total_memory
        found |= {"gpu": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}", "bytes": memory}
        found["cusparselt"] = torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        found["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    task.save(found)
    folders = [Path(p) for p in (*sys.path, *os.environ.get("LD_LIBRARY_PATH", "").split(":")) if p]
    folders += [] if task.dry_run else [Path(p) for p in ("/usr/lib", "/usr/local", "/opt", "/lib")]
    task.save(found | {"libraries": libraries(folders, task.deadline - 2)})


def libraries(folders: list[Path], until: float) -> list[str]:
    """Files called libnvinfer* or libtensorrt* below folders."""
    seen = set()
    for top in folders:
        for folder, _, names in os.walk(top):
            seen |= {f"{folder}/{name}" for name in names if name.startswith(("libnvinfer", "libtensorrt"))}
            if time.monotonic() > until:
                return [*sorted(seen), "(stopped: out of time)"]
    return sorted(seen)


def probe(task: Task) -> None:
    """The sizes of ResNet-50's stages, with magnitude masks on random weights."""
    import numpy as np

    from maskplan.engines.cusparselt import find_cusparselt_host
    from maskplan.engines.probe import ProbeOptions
    from maskplan.engines.probe import probe as probe_weights
    from maskplan.exporters.layer_shapes import LayerShape
    from maskplan.pipeline.core.artifacts import Pattern
    from maskplan.pipeline.core.serialization import encode
    from maskplan.pipeline.masking.magnitude import magnitude_mask

    sizes = [(16, 8)] if task.dry_run else [(64, 56), (128, 28), (256, 14), (512, 7)]
    shapes = {f"{c}x{c} 3x3": LayerShape(c, c, 3, 3, size, size, pads=(1, 1, 1, 1)) for c, size in sizes}
    shapes |= {f"{4 * c}x{c} 1x1": LayerShape(4 * c, c, 1, 1, size, size) for c, size in sizes}
    generator, weights = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        weight = generator.standard_normal((shape.k, shape.c, shape.r, shape.s)).astype(np.float32)
        weights[name] = np.where(magnitude_mask(weight, Pattern(2, 4)), weight, np.float32(0))
    machine = dense_host() if task.dry_run else find_cusparselt_host()
    found: Found = {}
    for dtype in ("fp16", "int8"):
        options = ProbeOptions((1,) if task.dry_run else (1, 8, 32), dtype, repeats=2 if task.dry_run else 100)
        found[dtype] = encode(probe_weights(weights, shapes, options, machine))
        task.save(found)


def dense_host() -> Any:
    """A CPU whose sparse product is the dense one, to try the script."""
    import torch

    from maskplan.engines.cusparselt import SparseHost

    def multiply(packed: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        return torch._int_mm(packed, dense.contiguous()) if packed.dtype == torch.int8 else packed @ dense

    def time_ms(runs: Any, warm_up: int, repeats: int) -> dict[str, float]:
        return {name: 1000 * seconds_of(run, repeats) for name, run in runs.items()}

    return SparseHost("CPU (dense)", "0.0", torch.__version__, "none", "none", "cpu", lambda m: m, multiply, time_ms)


def seconds_of(run: Callable[[], object], repeats: int) -> float:
    """The fastest of some runs."""
    took = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        took.append(time.perf_counter() - started)
    return min(took)


def step(task: Task) -> None:
    """Training steps and the step of mask learning that ships."""
    sys.path.append(str(HERE / "performance"))
    import torch
    from mask_step import masked, ordinary, timed

    found: Found = {}
    cases = [("resnet18", 2, 32)] if task.dry_run else [("resnet50", 32, 224), ("resnet50", 128, 224)]
    for name, batch, size in cases:
        x = torch.randn(batch, 3, size, size, device=device())
        y = torch.randint(0, 1000, (batch,), device=device())
        steps = {
            "ordinary, nchw": ordinary(name, x, y),
            "ordinary, channels_last": ordinary(name, x, y, channels_last=True),
            "masks": masked(name, x, y)[0],
        }
        took: dict[str, list[float]] = {key: [] for key in steps}
        for repeat in range(2 if task.dry_run else 12):
            for key, run in steps.items():
                seconds = timed(run)
                if repeat:
                    took[key].append(seconds)
        found[f"{name}, batch {batch}"] = {f"{key}, s": round(sorted(v)[len(v) // 2], 5) for key, v in took.items()}
        task.save(found)


def device() -> str:
    """The GPU, if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def accuracy(task: Task) -> None:
    """Train each network densely in two fifths of its time, learn its masks in two fifths, and measure on `val`."""
    sys.path.append(str(HERE / "accuracy"))
    from gpu_accuracy import measure_network

    names = ["resnet20"] if task.dry_run else ["resnet56", "vgg16_bn", "shufflenet_v2_x1_0"]
    found: Found = {}
    for number, name in enumerate(names):
        share = min(task.left_s, 20) if task.dry_run else task.left_s / (len(names) - number)

        def save(row: Found, name: str = name) -> None:
            found[name] = row
            task.save(found)

        measure_network(name, task.data, share, device(), save, batch=32 if task.dry_run else 512)


def rtx(task: Task) -> None:
    """Plans of a masked and a dense ResNet-50: compiled here, then run, timed, and their kernels recorded."""
    sys.path.append(str(HERE / "performance"))
    from gpu_plans import measure_plans

    name, size, batches = ("resnet18", 32, (1,)) if task.dry_run else ("resnet50", 224, (1, 8, 32))
    measure_plans(name, size, batches, task.save, lambda: task.left_s > 10)


PARTS: dict[str, Callable[[Task], None]] = {p.__name__: p for p in (host, probe, step, rtx, accuracy)}


def toy_cifar(folder: Path) -> None:
    """Noise in the format of CIFAR-10."""
    import io

    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for name, count in (("train", 160), ("test", 40)):
        blobs = []
        for _ in range(count):
            buffer = io.BytesIO()
            Image.fromarray(generator.integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(buffer, "JPEG")
            blobs.append(buffer.getvalue())
        np.savez(
            folder / f"cifar10_{name}.npz",
            jpeg=np.frombuffer(b"".join(blobs), np.uint8),
            offset=np.cumsum([0, *map(len, blobs)]),
            label=np.arange(count) % 10,
            classes=np.array([str(i) for i in range(10)]),
        )


def run_part(name: str, args: argparse.Namespace, seconds: float, fragment: Path) -> Found:
    """One part in a process of its own; what it found, its error, and its duration."""
    command = [sys.executable, __file__, "--part", name, "--fragment", str(fragment), "--seconds", f"{seconds:.1f}"]
    command += ["--data", str(args.data)] + (["--dry-run"] if args.dry_run else [])
    started = time.monotonic()
    with subprocess.Popen(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, printed = process.communicate(timeout=seconds)
            error = None if process.returncode == 0 else last_lines(printed) or f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            error = f"stopped after {seconds:.0f} s"
    found = json.loads(fragment.read_text()) if fragment.is_file() else {}
    return {"seconds": round(time.monotonic() - started, 1), "error": error, "found": found}


def last_lines(text: str) -> str:
    """The end of what a failed process printed."""
    return " | ".join(line.strip() for line in text.strip().splitlines()[-3:])


def main() -> None:
    """Run all parts, or, as a process of one part, that part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10 as .npz files")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dry-run", action="store_true")
    for hidden in ("--part", "--fragment", "--seconds"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        fragment = Path(args.fragment)
        deadline = time.monotonic() + 0.92 * float(args.seconds)
        PARTS[args.part](Task(args.dry_run, args.data, deadline, lambda found: write_json(fragment, found)))
        # All is saved; libraries of GPUs may hang or crash when a process ends in the ordinary way.
        sys.stderr.flush()
        os._exit(0)
    end = time.monotonic() + 60 * args.minutes
    given = [f"--minutes {args.minutes:g}"] + (["--dry-run"] if args.dry_run else [])
    result: Found = {"command": " ".join(["python benchmarks/gpu.py", *given]), "minutes": args.minutes, "parts": {}}
    with tempfile.TemporaryDirectory() as made:
        if args.data is None:
            if not args.dry_run and "accuracy" in args.parts:
                parser.error("--data is needed for accuracy; or leave it out with --parts")
            args.data = Path(made)
            toy_cifar(args.data)
        for number, name in enumerate(args.parts):
            rest = sum(SHARES[part] for part in args.parts[number:])
            seconds = (end - time.monotonic()) * SHARES[name] / rest
            result["parts"][name] = run_part(name, args, seconds, Path(made) / f"{name}.json")
            write_json(args.out, result)
            print(f"{name}: {result['parts'][name]['error'] or 'done'}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
