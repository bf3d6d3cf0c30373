"""What commands import: every stage after export works without torch, and TensorRT is imported only when requested."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from small_line import NO_TORCH

from maskplan.exporters.metadata import describe_onnx

# Runs commands one after the other in one process, where some packages cannot be imported. Prints a line of JSON for
# each: the command, its exit code, its stderr, and the watched packages that it was the first to import.
WATCH = """
import contextlib, io, json, sys

refused, watched, commands = sys.argv[1].split(","), sys.argv[2].split(","), json.loads(sys.argv[3])
asked = set()


class Watcher:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in watched:
            asked.add(top)
        if top in refused:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)


sys.meta_path.insert(0, Watcher())
from maskplan.pipeline.cli.app import main

for command in commands:
    asked.clear()
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        code = main(command.split())
    print(json.dumps([command, code, err.getvalue(), sorted(asked)]))
"""
HEAVY = "torch,torchvision,timm,onnxruntime,polygraphy,tensorrt,tensorrt_rtx,pycuda,matplotlib,sklearn,scipy,numba"

AFTER_EXPORT = (
    "check engine.onnx --report r.json --junit r.xml",
    "check sparse.fp16.onnx",
    "prune dense.onnx -o p.onnx",
    "prune dense.onnx --data noise.npz --method layerwise --update -o p.onnx",
    "build sparse.onnx --backend onnxruntime -o b.onnx",
    "inspect engine.onnx",
    "compare dense_engine.onnx engine.onnx",
    "compare dense.onnx sparse.onnx --report r.json",
    "time dense_engine.onnx engine.onnx --batch 1 --seconds 0.1",
    "deploy engine.onnx --repository models",
)


def run_watched(
    commands: Sequence[str], *, refused: str, watched: str, cwd: Path
) -> dict[str, tuple[int, str, set[str]]]:
    """Exit code, stderr and imported packages of each command."""
    command = [sys.executable, "-c", WATCH, refused, watched, json.dumps(commands)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines] == list(commands)
    return {name: (code, err, set(asked)) for name, code, err, asked in lines}


def test_every_command_after_export_works_without_torch(digits: Path) -> None:
    # The last one needs torch: without it the test would pass as well if nothing were blocked.
    needs_torch = "compare dense.safetensors engine.onnx"
    (spec,) = describe_onnx(digits / "dense.onnx").inputs
    np.savez(digits / "noise.npz", **{spec.name: np.random.default_rng(0).normal(size=(8, *spec.shape[1:]))})
    ran = run_watched((*AFTER_EXPORT, needs_torch), refused=NO_TORCH, watched="torch,tensorrt,pycuda", cwd=digits)
    code, err, asked = ran.pop(needs_torch)
    assert (code, asked) == (3, {"torch"})
    assert "PyTorch is not installed" in err
    for command, (code, err, asked) in ran.items():
        assert code == 0, f"{command}: {err}"
        # Other libraries may try to import torch; nothing may try to import TensorRT.
        assert asked <= {"torch"}, command


def test_the_api_of_conformance_works_without_torch(finished_digits: Path) -> None:
    program = f"""
import sys
sys.modules["torch"] = sys.modules["onnxruntime"] = None
from maskplan.exporters.conformance import check_2to4, require_2to4
report = check_2to4({str(finished_digits / "engine.onnx")!r})
print(report.weights[0].verdict, require_2to4({str(finished_digits / "engine.onnx")!r}).verdict)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == "pass"


def test_commands_import_no_more_than_they_need(digits: Path) -> None:
    without_heavy = ("--help", "engine --help", "check --help", "check engine.onnx", "inspect engine.onnx")
    with_onnxruntime = ("deploy engine.onnx --repository models", "build sparse.onnx --backend onnxruntime -o b.onnx")
    ran = run_watched((*without_heavy, *with_onnxruntime), refused="none", watched=HEAVY, cwd=digits)
    assert {command: asked for command, (_, _, asked) in ran.items() if asked - {"onnxruntime"}} == {}
    assert {command: ran[command][2] for command in without_heavy if ran[command][2]} == {}
    assert all(code == 0 for code, _, _ in ran.values())


def test_choosing_a_backend_looks_for_tensorrt_without_importing_it(digits: Path, tmp_path: Path) -> None:
    """`auto` checks whether it is installed; here, importing it would end the command."""
    trap = tmp_path / "trap"
    for package in ("tensorrt", "pycuda"):
        (trap / package).mkdir(parents=True)
        (trap / package / "__init__.py").write_text("raise SystemError('loaded')")
    backends = ["onnxruntime"]
    if not Path("/proc/driver/nvidia/version").exists():
        backends.append("auto")
    program = f"""
import sys
sys.path.insert(0, {str(trap)!r})
from maskplan.pipeline.cli.app import main
codes = [main(["build", "sparse.onnx", "--backend", name, "-o", name + ".onnx"]) for name in {backends}]
assert not {{"tensorrt", "pycuda"}} & set(sys.modules)
assert not any(codes)
"""
    shutil.rmtree(digits / ".maskplan")
    done = subprocess.run([sys.executable, "-c", program], cwd=digits, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all((digits / f"{name}.onnx").is_file() for name in backends)
