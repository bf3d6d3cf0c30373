"""What commands import: everything after export works without torch, and TensorRT is looked for only when asked."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_line import NO_TORCH

# Prints which of the named packages were asked for; the packages named first are refused.
WATCHED = """
import sys

refused, watched = (set(sys.argv.pop(1).split(",")) for _ in range(2))
asked = set()


class Watcher:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in watched:
            asked.add(top)
        if top in refused:
            raise ModuleNotFoundError(f"{name} is not here", name=name)


sys.meta_path.insert(0, Watcher())
from maskplan.pipeline.cli.app import main

code = main(sys.argv[1:])
print("asked for:", " ".join(sorted(asked)), file=sys.stderr)
sys.exit(code)
"""
HEAVY = "torch,torchvision,timm,onnxruntime,polygraphy,tensorrt,pycuda,matplotlib,sklearn,scipy,numba"


def run(refused: str, watched: str, *arguments: object, cwd: Path) -> tuple[int, str, set[str]]:
    """Exit code, narration, and the watched packages that were asked for."""
    command = [sys.executable, "-c", WATCHED, refused, watched, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    narration, _, asked = done.stderr.rpartition("asked for:")
    return done.returncode, narration, set(asked.split())


@pytest.mark.parametrize(
    "command",
    [
        "check engine.onnx --report r.json --junit r.xml",
        "check sparse.fp16.onnx",
        "prune dense.onnx -o p.onnx",
        "build sparse.onnx --backend onnxruntime -o b.onnx",
        "inspect engine.onnx",
        "compare dense_engine.onnx engine.onnx",
        "compare dense.onnx sparse.onnx --report r.json",
        "time dense_engine.onnx engine.onnx --batch 1 --seconds 0.1",
        "deploy engine.onnx --repository models",
    ],
)
def test_everything_after_export_works_without_torch(command: str, digits: Path) -> None:
    code, narration, asked = run(NO_TORCH, "torch,tensorrt,pycuda", *command.split(), cwd=digits)
    assert code == 0, narration
    # Libraries may look for torch on their own account; nothing looks for TensorRT.
    assert asked <= {"torch"}


def test_the_blocker_blocks(digits: Path) -> None:
    """The tests above would pass as well if nothing were blocked."""
    code, narration, asked = run(NO_TORCH, "torch", "compare", "dense.safetensors", "engine.onnx", cwd=digits)
    assert (code, asked) == (3, {"torch"})
    assert "PyTorch is not installed" in narration


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


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        ((), set()),
        (("--help",), set()),
        (("engine", "--help"), set()),
        (("check", "--help"), set()),
        (("check", "engine.onnx"), set()),
        (("inspect", "engine.onnx"), set()),
        (("deploy", "engine.onnx", "--repository", "models"), {"onnxruntime"}),
        (("build", "sparse.onnx", "--backend", "onnxruntime", "-o", "b.onnx"), {"onnxruntime"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_commands_import_no_more_than_they_need(arguments: tuple[str, ...], allowed: set[str], digits: Path) -> None:
    _, _, asked = run("none", HEAVY, *arguments, cwd=digits)
    assert asked <= allowed


def test_the_line_looks_for_tensorrt_only_to_choose_and_loads_nothing_of_it(digits: Path, tmp_path: Path) -> None:
    """`auto` asks whether it is installed; a package that cannot be loaded must not be touched."""
    trap = tmp_path / "trap"
    for package in ("tensorrt", "pycuda"):
        (trap / package).mkdir(parents=True)
        (trap / package / "__init__.py").write_text("raise SystemError('loaded')")
    program = f"""
import sys
sys.path.insert(0, {str(trap)!r})
from maskplan.pipeline.cli.app import main
code = main(sys.argv[1:])
assert not {{"tensorrt", "pycuda"}} & set(sys.modules)
sys.exit(code)
"""
    shutil.rmtree(digits / ".maskplan")
    for backend in ("onnxruntime", "auto"):
        command = [sys.executable, "-c", program, "build", "sparse.onnx", "--backend", backend, "-o", f"{backend}.onnx"]
        done = subprocess.run(command, cwd=digits, capture_output=True, text=True, check=False)
        if backend == "auto" and Path("/proc/driver/nvidia/version").exists():
            continue
        assert done.returncode == 0, done.stderr
        assert (digits / f"{backend}.onnx").is_file()
