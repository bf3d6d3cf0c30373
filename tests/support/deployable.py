"""Small engines to deploy (real ones of ONNX Runtime, and fake TensorRT plans), and a deployment killed at every step."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from triton_messages import parsed

from maskplan.engines.build import BuildOptions, build_engine
from maskplan.engines.sidecar import read_engine, write_sidecar
from maskplan.exporters.metadata import describe_onnx, write_provenance
from maskplan.pipeline.core.artifacts import EngineFile, Preprocessing, Profile, Provenance, TensorSpec

PREPROCESSING = Preprocessing(3, 8, 8, 0, "bilinear", (0.0,) * 3, (1.0,) * 3)
LABELS = ("blue", "green", "red", "grün-ish", "5")
PROVENANCE = Provenance("folder_less", True, "weights.pth", "0" * 64, 5, LABELS, PREPROCESSING)


# Runs a function on copies of a repository, killed at its first change to the file system, at its second and so on, until it
# ends unharmed; prints how many were killed.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
{imports}

base, copies = map(Path, sys.argv[1:3])
CHANGES = {{"os.rename", "os.mkdir", "os.rmdir", "os.remove"}}


def dies(at):
    left = at

    def hook(event, arguments):
        nonlocal left
        left -= event in CHANGES
        if not left:
            left = -1  # the next call is an event as well
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


for at in range(1, 100):
    models = Path(shutil.copytree(base, copies / str(at)))
    child = os.fork()
    if not child:
        dies(at)
        {call}
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) == 0:
        break
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, status
print(at - 1)
"""


def source(
    path: Path,
    made: Provenance | None = PROVENANCE,
    *,
    batch: int | str = "batch",
    classes: int = 5,
    name: str = "logits",
    broken: bool = False,
) -> Path:
    """A model file; a broken one returns infinities."""
    weight = np.random.default_rng(classes).normal(size=(192, classes)).astype(np.float32)
    weight[0] = np.inf if broken else weight[0]
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["input"], ["f"]), helper.make_node("MatMul", ["f", "w"], [name])],
        "net",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, classes])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if made is not None:
        write_provenance(model, made)
    path.write_bytes(model.SerializeToString())
    return path


def built(
    folder: Path,
    made: Provenance | None = PROVENANCE,
    profiles: tuple[Profile, ...] = (Profile(1, 1, 1), Profile(1, 8, 32)),
    **shape: Any,
) -> Path:
    """An engine with its sidecar."""
    folder.mkdir(exist_ok=True)
    options = BuildOptions("onnxruntime", profiles)
    return build_engine(
        describe_onnx(source(folder / "model.onnx", made, **shape)), options, folder / "engine.onnx"
    ).path


def record(**changed: Any) -> EngineFile:
    values: dict[str, Any] = {
        "path": Path("engine.plan"),
        "sha256": "0" * 64,
        "bytes": 1,
        "backend": "tensorrt",
        "precision": "fp16",
        "runtime_version": "10.3.0",
        "device": "GPU",
        "compute_capability": "9.0",
        "device_memory_bytes": None,
        "sparse_weights": True,
        "typing": "strong",
        "profiles": (Profile(1, 8, 16),),
        "inputs": (TensorSpec("input", "float32", (None, 3, 8, 8)),),
        "outputs": (TensorSpec("logits", "float32", (None, 5)),),
        "onnx_sha256": "0" * 64,
        "build_s": 1.0,
        "provenance": PROVENANCE,
    }
    return EngineFile(**{**values, **changed})


def plan(path: Path, data: bytes | None = None, **changed: Any) -> Path:
    """What deploying sees of a TensorRT plan: bytes, and a sidecar that tells the rest."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data or f"ftrt {path.name}".encode())
    write_sidecar(record(path=path, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), **changed))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def killed(base: Path, copies: Path, imports: str, call: str) -> list[Path]:
    """Repositories left by a function that was killed; the last is of one that was not."""
    program = KILLED.format(imports=imports, call=call)
    done = subprocess.run([sys.executable, "-c", program, base, copies], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [copies / str(at) for at in range(1, int(done.stdout) + 2)]


def assert_served(folder: Path) -> tuple[int, ...]:
    """Everything that the config names is there and whole; the versions."""
    config = parsed((folder / "config.pbtxt").read_text())
    versions = tuple(config.version_policy.specific.versions)
    files = list(config.cc_model_filenames.values()) or ["model.onnx"]
    for version in versions:
        for name in files:
            read_engine(folder / str(version) / name)
    for output in config.output:
        assert not output.label_filename or (folder / output.label_filename).is_file()
    assert versions
    return versions
