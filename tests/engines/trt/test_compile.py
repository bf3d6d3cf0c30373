"""NVIDIA's compiler on small graphs: the real one, and processes that end in every other way."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from compiled_graphs import graph, needs_rtx

from maskplan.engines.sidecar import read_engine
from maskplan.engines.trt import compile as compiling
from maskplan.engines.trt.compile import compile_onnx, installed_version
from maskplan.engines.trt.compile_process import CompileRequest, build_problem, compile_here
from maskplan.engines.trt.compile_shapes import fix_shapes
from maskplan.engines.trt.options import TrtOptions
from maskplan.engines.trt.versions import is_installed
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.core.artifacts import OnnxModel, Profile, TensorSpec
from maskplan.pipeline.core.compilation import CompileResult
from maskplan.pipeline.core.errors import HostError, InputError


def here(model: OnnxModel, *profiles: Profile) -> CompileResult:
    fixed, chosen = fix_shapes(model, profiles, {})
    return compile_here(CompileRequest(fixed, chosen, True, TrtOptions(), None)).result


@needs_rtx
def test_a_plan_is_written_with_its_sidecar_and_has_the_same_bytes_again(tmp_path: Path) -> None:
    model, out = graph(tmp_path / "net.onnx"), tmp_path / "net.rtx.plan"
    compiled = compile_onnx(model, [Profile(1, 1, 1), Profile(1, 8, 8)], out=out)
    result = compiled.result
    assert result.accepted
    assert result.problems == ()
    assert (result.onnx, result.onnx_sha256, result.compiler) == ("net.onnx", model.sha256, "TensorRT-RTX")
    assert result.version == installed_version()
    assert [profile.profile for profile in result.profiles] == ["1:1:1", "1:8:8"]
    for profile in result.profiles:
        assert profile.products == {"Float": 1}
        (product,) = [layer for layer in profile.layers if layer.role == "product"]
        assert product.nodes == ("layer.conv", "layer.relu")
    written = read_engine(out)
    assert (written.backend, written.sha256, written.bytes) == ("tensorrt-rtx", result.sha256, result.size_bytes)
    assert here(model, Profile(1, 1, 1), Profile(1, 8, 8)).sha256 == result.sha256


@needs_rtx
@pytest.mark.parametrize(
    ("case", "node", "op", "reason", "fix"),
    [
        ("unsupported", "layer.unique", "Unique", "not supported", "other operators"),
        ("made_up", "layer.fancy", "FancyNorm", "no operator and no plugin", "remove this operator"),
        ("unnamed", "with the output 'y'", "FancyNorm", "no operator and no plugin", "remove this operator"),
        ("mixed_types", "layer.add", "Add", "types Float and Half", "Cast"),
        ("fixed_batch_inside", "layer.reshape", "Reshape", "would change volume 4096 to 512", "batches of the profile"),
        ("asymmetric", "layer.quantize", "QuantizeLinear", "zero point is not supported", "quantize symmetrically"),
    ],
)
def test_a_refusal_names_the_node_the_reason_and_a_way_out(
    case: str, node: str, op: str, reason: str, fix: str, tmp_path: Path
) -> None:
    result = here(graph(tmp_path / "net.onnx", case))
    assert not result.accepted
    assert (result.profiles, result.sha256, result.size_bytes) == ((), None, None)
    (problem,) = result.problems
    assert (problem.node, problem.op) == (node, op)
    assert reason in problem.reason
    assert fix in problem.fix
    for inside in ("_src", "cudaError", "Error Code", "Invalid Node"):
        assert inside not in problem.reason


@needs_rtx
def test_a_type_that_it_does_not_know_is_said(tmp_path: Path) -> None:
    problems = here(graph(tmp_path / "net.onnx", dtype="STRING")).problems
    assert "of a type that the library does not know" in problems[0].reason


def test_shapes_are_completed_or_asked_for(tmp_path: Path) -> None:
    model = graph(tmp_path / "net.onnx", shape=("batch", 8, "h", "w"))
    with pytest.raises(InputError, match="--shape input:1x8x224x224") as caught:
        fix_shapes(model, (), {})
    assert "input is ?x8x?x?" in str(caught.value)
    fixed, profiles = fix_shapes(model, (), {"input": (2, 8, 32, 48)})
    assert (fixed.inputs[0].shape, profiles) == ((None, 8, 32, 48), (Profile(2, 2, 2),))
    assert fix_shapes(model, [Profile(1, 4, 8)], {"input": (2, 8, 32, 48)})[1] == (Profile(1, 4, 8),)
    for wrong in ({"input": (1, 3, 32, 32)}, {"input": (1, 8, 32)}, {"inptu": (1, 8, 32, 32)}):
        with pytest.raises(InputError, match="cannot be compiled for these shapes"):
            fix_shapes(model, (), wrong)


def test_inputs_of_fixed_shape_need_no_profile_and_take_no_other_batch(tmp_path: Path) -> None:
    model = graph(tmp_path / "net.onnx", shape=(4, 8, 8, 8))
    fixed, profiles = fix_shapes(model, (), {})
    assert (fixed.inputs, profiles) == ((), ())
    assert fix_shapes(model, [Profile(4, 4, 4)], {})[1] == ()
    with pytest.raises(InputError, match="a fixed batch of 4, not 1:8:8"):
        fix_shapes(model, [Profile(1, 8, 8)], {})
    scalar = replace(model, inputs=(TensorSpec("x", "float32", (None, 8)), TensorSpec("s", "float32", ())))
    assert fix_shapes(scalar, (), {}) == (replace(scalar, inputs=scalar.inputs[:1]), (Profile(1, 8, 8),))


@needs_rtx
def test_a_graph_of_fixed_shape_is_compiled_without_a_profile(tmp_path: Path) -> None:
    result = here(graph(tmp_path / "net.onnx", shape=(4, 8, 8, 8)))
    assert [profile.profile for profile in result.profiles] == [None]


def process(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """A process that runs `code` in place of the compiler's."""
    monkeypatch.setattr(compiling, "is_installed", lambda package: True)
    monkeypatch.setattr(compiling, "_COMMAND", (sys.executable, "-c", f"import os, sys\n{code}"))


@pytest.mark.parametrize(
    ("code", "ended"),
    [
        ("os.abort()", "SIGABRT"),
        (f"os.kill(os.getpid(), {int(signal.SIGSEGV)})", "SIGSEGV"),
        ("os._exit(134)", "exit code 134"),
    ],
)
def test_a_crash_of_the_library_is_a_refusal(
    code: str, ended: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process(monkeypatch, f"print('terminate called', file=sys.stderr, flush=True)\n{code}")
    result = compile_onnx(graph(tmp_path / "net.onnx")).result
    assert not result.accepted
    assert result.problems[0].reason == f"the compiler crashed ({ended}): terminate called"


def test_a_process_without_memory_is_the_hosts_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process(monkeypatch, f"os.kill(os.getpid(), {int(signal.SIGKILL)})")
    with pytest.raises(HostError, match="probably out of memory"):
        compile_onnx(graph(tmp_path / "net.onnx"))


def test_a_fault_of_ours_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process(monkeypatch, "raise KeyError('ours')")
    with pytest.raises(RuntimeError, match="KeyError: 'ours'"):
        compile_onnx(graph(tmp_path / "net.onnx"))


def test_an_interrupt_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process(monkeypatch, "import time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)")
    monkeypatch.chdir(tmp_path)

    def interrupted(running: Any, request: bytes) -> None:
        while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
            pass
        raise KeyboardInterrupt

    monkeypatch.setattr(compiling.subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compile_onnx(graph(tmp_path / "net.onnx"))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_library_that_is_missing_or_there_in_part_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = graph(tmp_path / "net.onnx")
    with monkeypatch.context() as patched:
        patched.setattr("importlib.util.find_spec", lambda name: None)
        assert not is_installed("tensorrt_rtx")
        with pytest.raises(HostError, match=r"TensorRT-RTX is not installed[\s\S]*maskplan\[rtx\]"):
            compile_onnx(model)
    package = tmp_path / "part" / "tensorrt_rtx"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from tensorrt_rtx_libs_that_are_missing import *\n")
    monkeypatch.syspath_prepend(str(package.parent))
    with pytest.raises(HostError, match=r"TensorRT-RTX[\s\S]*tensorrt_rtx_libs_that_are_missing[\s\S]*pip install"):
        compile_onnx(model)


@needs_rtx
def test_a_file_that_its_parser_cannot_hold_is_refused_before_it_is_read(tmp_path: Path) -> None:
    model = replace(graph(tmp_path / "net.onnx"), bytes=2**31)
    with pytest.raises(InputError, match=r"2\.1 GB; its parser reads at most 2 GB[\s\S]*save_as_external_data"):
        compile_onnx(model)


@needs_rtx
def test_data_outside_the_files_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(8 * 8 * 9 * 4))
    (tmp_path / "inner").mkdir()
    path = tmp_path / "inner" / "net.onnx"
    graph(path)
    model = onnx.load(path)
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../secret.bin")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="external data cannot be read"):
        here(describe_onnx(path))


def test_int8_in_versions_before_1_7_is_explained(tmp_path: Path) -> None:
    found = (
        "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([myelin_graph.h:1259: attachExceptionMsgToGraph]"
        " MyelinCheckException: cudnn_impl.cpp:89: CHECK(dtype == myelinTypeFloat || dtype == myelinTypeHalf ||"
        " dtype == myelinTypeBF16 || dtype == myelinTypeFP8E4M3) failed.  In compileGraph at /_src/codeGenerator.cpp:1962)"
    )
    model = replace(graph(tmp_path / "net.onnx"), precision="int8")
    assert build_problem(model, found).reason == "this version compiles no convolutions in INT8"


def test_the_longest_name_in_a_message_is_the_node(tmp_path: Path) -> None:
    model = graph(tmp_path / "net.onnx")
    assert build_problem(model, "IShuffleLayer layer.relu: failed").node == "layer.relu"
    assert build_problem(model, "layer.relu.1: failed").node is None
    reshaping = graph(tmp_path / "reshape.onnx", "fixed_batch_inside")
    assert build_problem(reshaping, "layer.reshape, fed by layer.conv: failed").node == "layer.reshape"
