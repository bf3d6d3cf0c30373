"""The printed Polygraphy commands: run by Polygraphy itself, and compared word by word."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from small_net import small_net

from maskplan.engines.build import BuildOptions, build_engine
from maskplan.engines.sidecar import write_sidecar
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.core.artifacts import EngineFile
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.files import sha256_of
from maskplan.pipeline.models.checkpoint import ModelOptions, load_checkpoint
from maskplan.pipeline.parity.print_polygraphy import OUTPUTS, polygraphy_command

SHAPE = (3, 8, 8)


def changed(path: Path, out: Path, factor: float, *, renamed: bool = False) -> Path:
    """A copy whose head is multiplied, with other names for its ends if asked."""
    model = onnx.load(path)
    (head,) = (tensor for tensor in model.graph.initializer if tensor.name == "head")
    head.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(head) * np.float32(factor), "head"))
    if renamed:
        model.graph.input[0].name = model.graph.node[0].input[0] = "pictures"
        model.graph.output[0].name = model.graph.node[-1].output[0] = "scores"
    out.write_bytes(model.SerializeToString())
    return out


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_polygraphy_runs_the_command_and_compares_the_outputs(tmp_path: Path) -> None:
    """Equal models pass; then the second command alone, on the saved outputs, fails for different ones."""
    dense = small_net(tmp_path / "a dense net.onnx")
    sparse = changed(dense, tmp_path / "it's sparse.onnx", 1, renamed=True)
    command = polygraphy_command(dense, sparse, SHAPE)
    equal = run(command, tmp_path)
    assert equal.returncode == 0, equal.stdout + equal.stderr
    assert (tmp_path / OUTPUTS).is_file()
    assert "Passed: 32/32 iterations" in equal.stdout + equal.stderr
    _, second = command.split(" && ")
    changed(dense, sparse, 3, renamed=True)
    different = run(second, tmp_path)
    assert different.returncode == 1, different.stdout + different.stderr
    assert "Passed: 0/32 iterations" in different.stdout + different.stderr


@pytest.mark.slow
def test_polygraphy_fails_outputs_that_are_nan(tmp_path: Path) -> None:
    dense = small_net(tmp_path / "dense.onnx")
    ran = run(polygraphy_command(dense, changed(dense, tmp_path / "nan.onnx", np.nan), SHAPE), tmp_path)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "invalid values" in ran.stdout + ran.stderr


@pytest.mark.slow
def test_relative_paths_and_graphs_of_a_fixed_batch_run_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run(fixed_batch_command(), tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def fixed_batch_command() -> str:
    small_net(Path("-dense.onnx"), batch=4)
    small_net(Path("-sparse.onnx"), "float16", batch=4)
    return polygraphy_command(Path("-dense.onnx"), Path("-sparse.onnx"), SHAPE)


def test_a_fixed_batch_and_a_name_with_a_leading_dash_are_written_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for half, name in zip(fixed_batch_command().split(" && "), ("./-dense.onnx", "./-sparse.onnx"), strict=True):
        words = shlex.split(half)
        assert words[2] == name
        assert "input:[4,3,8,8]" in words


def test_two_onnx_files_give_this_command(tmp_path: Path) -> None:
    dense, sparse = small_net(tmp_path / "d.onnx"), small_net(tmp_path / "s.onnx")
    noise = "--input-shapes 'input:[1,3,8,8]' --seed 1 --val-range '[-1.732,1.732]' --iterations 32 --validate"
    first = f"polygraphy run {dense} --onnxrt {noise} --save-outputs dense_outputs.json"
    second = f"polygraphy run {sparse} --onnxrt {noise} --load-outputs dense_outputs.json"
    second += " --compare-func simple --check-error-stat max --atol 0.1 --rtol 0.1"
    assert polygraphy_command(dense, sparse, SHAPE) == f"{first} && {second}"


def engine_of(onnx_file: Path, out: Path) -> EngineFile:
    return build_engine(describe_onnx(onnx_file), BuildOptions("onnxruntime"), out)


def plan_of(onnx_file: Path, out: Path) -> Path:
    """A file with the record of a TensorRT plan; nothing here opens it."""
    record = engine_of(onnx_file, onnx_file.with_name("e.onnx"))
    out.write_bytes(b"plan")
    write_sidecar(replace(record, path=out, sha256=sha256_of(out), backend="tensorrt"))
    return out


def test_plans_run_on_tensorrt_and_engines_of_onnx_runtime_on_it(tmp_path: Path) -> None:
    dense = small_net(tmp_path / "d.onnx")
    plan = plan_of(dense, tmp_path / "d.plan")
    engine = engine_of(dense, tmp_path / "e.onnx").path
    first, second = (shlex.split(half) for half in polygraphy_command(plan, engine, SHAPE).split(" && "))
    assert first[:6] == ["polygraphy", "run", str(plan), "--trt", "--model-type", "engine"]
    assert second[:4] == ["polygraphy", "run", str(engine), "--onnxrt"]
    assert "--model-type" not in second
    assert first[7] == second[5] == "input:[1,3,8,8]"


def test_polygraphy_knows_every_flag_for_a_plan(tmp_path: Path) -> None:
    """Without TensorRT it can only write the script that it would run."""
    plan = plan_of(small_net(tmp_path / "d.onnx"), tmp_path / "d.plan")
    first, _ = polygraphy_command(plan, plan, SHAPE).split(" && ")
    ran = run(f"{first} --gen-script script.py", tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    script = (tmp_path / "script.py").read_text()
    assert "EngineFromBytes" in script
    assert "TrtRunner" in script


def test_a_checkpoint_is_to_be_exported_first(tmp_path: Path) -> None:
    dense = small_net(tmp_path / "d.onnx")
    checkpoint = load_checkpoint(ModelOptions("digits_resnet"), tmp_path / "w.safetensors").path
    for pair in ((dense, checkpoint), (checkpoint, dense)):
        with pytest.raises(InputError, match="maskplan export") as caught:
            polygraphy_command(*pair, SHAPE)
        assert caught.value.where == checkpoint


@pytest.mark.parametrize("name", ["none.onnx", "none.plan", "none.pth", "a:b.onnx"])
def test_what_polygraphy_could_not_open_is_one_error(name: str, tmp_path: Path) -> None:
    dense = small_net(tmp_path / "d.onnx")
    if ":" in name:
        small_net(tmp_path / name)
    with pytest.raises(InputError) as caught:
        polygraphy_command(dense, tmp_path / name, SHAPE)
    assert name in str(caught.value)
    assert caught.value.fix
