"""The backend tensorrt-rtx: what it takes and refuses, its plans and records; nothing claims sparse kernels."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from plan_builds import build
from small_net import small_net
from tensorrt_hosts import HAS_GPU, NEEDS_RTX

from maskplan.engines.build import choose_backend, why_not_runnable
from maskplan.engines.sidecar import read_engine
from maskplan.engines.trt.build import _flag_effect, _flag_note
from maskplan.engines.trt.options import TrtOptions
from maskplan.engines.trt.versions import LIBRARIES, import_library, require_buildable, require_supported
from maskplan.pipeline.core.errors import HostError, InputError

RTX = "tensorrt-rtx"
Cli = Callable[..., Any]


def left(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@NEEDS_RTX
def test_a_plan_says_that_the_sparse_flag_changed_nothing_and_claims_no_sparse_layer(source: Path) -> None:
    record = build(source, backend=RTX)
    assert record.sparse_flag == "same_bytes"
    assert any("takes no sparse weights ahead of time" in note for note in record.notes)
    assert record.layers == ()
    assert (record.compute_capability, record.device_memory_bytes) == (None, None)
    without = build(source, backend=RTX, sparse=False)
    assert (without.sparse_flag, without.notes) == (None, ())
    assert without.sha256 == record.sha256


@pytest.mark.parametrize(
    ("with_flag", "without_flag", "effect", "words"),
    [
        ((b"a",), (b"a",), "same_bytes", "has the same bytes"),
        ((b"__mye1 a",), (b"__mye2 a",), "same_content", "differs only in the numbers"),
        ((b"8 __mye1 a", b"9 __mye10 a"), (b"9 __mye11 a", b"8 __mye2 a"), "same_content", "takes no sparse weights"),
        ((b"a",) * 6, (b"b",) * 6, "other_bytes", "builds another plan with the sparse flag"),
        ((b"a", b"c", b"a", b"a", b"a", b"a"), (b"b",) * 6, None, "with the same options differ"),
        ((b"a",) * 6, (b"b", b"b", b"c", b"b", b"b", b"b"), None, "with the same options differ"),
    ],
)
def test_what_the_sparse_flag_changes_is_told_from_builds_that_differ_anyway(
    with_flag: tuple[bytes, ...], without_flag: tuple[bytes, ...], effect: str | None, words: str
) -> None:
    """The compiler numbers its own tensors, and not always in the same way; the numbers' length moves the rest."""
    later = {True: list(with_flag[1:]), False: list(without_flag)}
    assert _flag_effect(with_flag[0], lambda sparse: later[sparse].pop(0)) == effect
    library: Any = ModuleType("tensorrt_rtx")
    library.__version__ = "9.9"
    (note,) = _flag_note(LIBRARIES[RTX], library, True, effect)  # type: ignore[arg-type]
    assert words in note
    assert "9.9" in note


@NEEDS_RTX
def test_targets_narrow_the_plan_and_are_kept_in_its_record(source: Path) -> None:
    usual = build(source, backend=RTX, sparse=False)
    record = build(source, backend=RTX, sparse=False, targets=("sm86", "sm120"))
    assert record.targets == ("sm86", "sm120")
    assert record.device == "GPUs of compute capability 8.6, 12.0"
    assert record.sha256 != usual.sha256
    assert read_engine(record.path) == record
    with pytest.raises(InputError, match=r"found: sm90; TensorRT-RTX .* knows sm75, sm80"):
        build(source, backend=RTX, targets=("sm90", "sm86"))


@pytest.mark.parametrize("targets", [("8.6",), ("sm86", "SM89"), ("",), ("current",)])
def test_what_is_no_kind_of_gpu_is_refused(targets: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="not a kind of GPU"):
        TrtOptions(targets=targets)


def test_what_a_library_does_not_take_is_refused_at_once_with_reason_and_fix() -> None:
    options = TrtOptions(
        version_compatible=True, hardware_compatible=True, optimization_level=5, timing_cache=Path("t"), tf32=True
    )
    with pytest.raises(InputError) as caught:
        require_supported(RTX, options, implicit_int8=True)
    told = str(caught.value)
    for name in (
        "version-compatible",
        "hardware-compatible",
        "optimization-level",
        "timing-cache",
        "int8-mode implicit",
    ):
        assert told.count(f"--{name}") == 3, name
    assert "tf32" not in told
    require_supported("tensorrt", options)
    require_supported(RTX, TrtOptions(tf32=True, workspace_bytes=1, targets=("sm86",)))
    with pytest.raises(InputError, match="TensorRT does not take --target"):
        require_supported("tensorrt", TrtOptions(targets=("sm86",)))


@pytest.mark.parametrize("option", ["refittable", "strip_plan"])
def test_what_needs_a_driver_is_refused_without_one(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from maskplan.engines.trt import versions

    options = TrtOptions(**{option: True})  # type: ignore[arg-type]
    for has_driver in (False, True):
        monkeypatch.setattr(versions, "has_driver", lambda has_driver=has_driver: has_driver)
        if has_driver:
            require_supported(RTX, options)
        else:
            with pytest.raises(InputError, match="without an NVIDIA driver"):
                require_supported(RTX, options)


@NEEDS_RTX
@pytest.mark.parametrize("option", ["optimization_level", "hardware_compatible"])
def test_options_that_are_refused_as_without_effect_are_so(
    source: Path, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were this to fail with a later version, the table has to change."""
    from maskplan.engines.trt import build as module

    usual = build(source, backend=RTX, sparse=False).sha256
    monkeypatch.setattr(module, "require_supported", lambda *_, **__: None)
    for value in {"optimization_level": (0, 5), "hardware_compatible": (True,)}[option]:
        assert build(source, backend=RTX, sparse=False, **{option: value}).sha256 == usual


@NEEDS_RTX
def test_the_command_builds_shows_and_inspects(source: Path, cli: Cli, tmp_path: Path) -> None:
    ran = cli("build", source, "--backend", RTX, "--target", "sm86,sm89", "--profile", "1:2:4")
    assert ran.code == 0, ran.err
    assert ran.err == ""
    plan = tmp_path / "net.engine.rtx.plan"
    assert ran.out.startswith(f"{plan}: fp16 on tensorrt-rtx ")
    assert "takes no sparse weights ahead of time" in ran.out
    assert left(tmp_path) == {"net.onnx", plan.name, f"{plan.name}.json"}
    told = cli("inspect", plan)
    assert told.code == 0
    assert "sparse weights, targets sm86, sm89" in told.out
    assert "no evidence of layers: the kernels are chosen on the GPU that loads the plan" in told.out
    if not HAS_GPU:
        assert "runs here  no: a plan of TensorRT-RTX runs on a GPU only: no NVIDIA driver on this host" in told.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--print-trtexec", "10"), "--print-trtexec: only for TensorRT"),
        (("--timing-cache", "c", "--strip-plan"), "TensorRT-RTX does not take --timing-cache"),
        (("--int8-mode", "implicit", "--data", "."), "all its networks are strongly typed"),
        (("--print-polygraphy", "--version-compatible"), "TensorRT-RTX does not take --version-compatible"),
    ],
)
def test_the_command_refuses_and_leaves_nothing(
    source: Path, cli: Cli, arguments: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    ran = cli("build", source, "--backend", RTX, *arguments, "-o", tmp_path / "e.rtx.plan")
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.startswith("error: ")
    assert ran.err.count("error:") == 1
    assert told in ran.err
    assert left(tmp_path) == {"net.onnx"}


@pytest.mark.skipif(HAS_GPU, reason="plans may run here")
@NEEDS_RTX
def test_without_a_gpu_a_plan_is_neither_run_nor_deployed_and_the_message_says_why(
    source: Path, cli: Cli, tmp_path: Path
) -> None:
    plan = build(source, backend=RTX, sparse=False).path
    for command in (("compare", plan, plan), ("time", plan, plan)):
        ran = cli(*command)
        assert (ran.code, ran.out) == (3, "")
        assert "a plan of TensorRT-RTX runs on a GPU only" in ran.err
    ran = cli("deploy", plan, "--repository", tmp_path / "models")
    assert ran.code == 3
    assert "Triton has no backend for tensorrt-rtx" in ran.err
    ran = cli(
        "engine", "digits_resnet", "--backend", RTX, "--repository", tmp_path / "models", "--out", tmp_path / "out"
    )
    assert ran.code == 3
    assert "Triton has no backend for tensorrt-rtx" in ran.err
    assert not (tmp_path / "models").exists()
    assert not (tmp_path / "out").exists()
    ran = cli("compare", plan, plan, "--print-polygraphy")
    assert ran.code == 0, ran.err
    assert ran.out.count("POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy run") == 2


@NEEDS_RTX
@pytest.mark.parametrize("options", [("--tf32",), ("--tf32", "--target", "sm86,sm120", "--workspace-mib", "64"), ()])
def test_polygraphy_builds_the_same_plan_by_the_printed_command(
    source: Path, cli: Cli, tmp_path: Path, options: tuple[str, ...]
) -> None:
    ours, theirs = tmp_path / "ours.rtx.plan", tmp_path / "theirs.rtx.plan"
    arguments = ("build", source, "--backend", RTX, *options)
    assert cli(*arguments, "-o", ours).code == 0
    printed = cli(*arguments, "-o", theirs, "--print-polygraphy")
    assert printed.code == 0, printed.err
    # Only what was built is compared: polygraphy itself is this environment's.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", printed.out], capture_output=True, text=True, env=os.environ | {"PATH": path}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if "--tf32" not in options:
        # Polygraphy cannot turn TF32 off here, and says so above the command; in this graph of FP16 that is all.
        assert printed.out.startswith("# Polygraphy leaves TF32 on")
        assert cli(*arguments, "--tf32", "-o", ours).code == 0
    assert theirs.read_bytes() == ours.read_bytes()
    assert shlex.split(printed.out.splitlines()[-1])[:2] == ["POLYGRAPHY_USE_TENSORRT_RTX=1", "polygraphy"]


def test_it_is_never_chosen_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("auto")[0] != RTX
    assert choose_backend(RTX) == (RTX, "requested")


def test_it_is_never_imported_unasked(source: Path, tmp_path: Path) -> None:
    """A package of that name that would tell; `inspect` of a plan needs no driver and loads nothing without one."""
    trap = tmp_path / "trap" / "tensorrt_rtx"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text("raise SystemError('imported')\n")
    program = f"""
import sys
sys.path.insert(0, {str(trap.parent)!r})
from maskplan.pipeline.cli.app import main
import maskplan.pipeline.run
codes = [main(arguments.split()) for arguments in (
    "build {source} --backend onnxruntime -o {tmp_path}/e.onnx",
    "build {source} --backend tensorrt-rtx --timing-cache c",
    "inspect {tmp_path}/e.onnx",
)]
assert codes == [0, 3, 0], codes
assert not [name for name in sys.modules if name.startswith("tensorrt")]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_missing_half_installed_and_old_packages_are_one_message(
    source: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(HostError, match=r"TensorRT-RTX is not installed\n(.|\n)*pip install 'maskplan\[rtx\]'"):
        import_library(RTX)
    with pytest.raises(HostError, match="TensorRT-RTX is not installed"):
        require_buildable(RTX, TrtOptions())
    monkeypatch.delitem(sys.modules, "tensorrt_rtx")
    package = tmp_path / "packages" / "tensorrt_rtx"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('libtensorrt_rtx.so.1: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(package.parent)
    ran = cli("build", source, "--backend", RTX, "-o", tmp_path / "e.rtx.plan")
    assert ran.code == 3
    assert ran.err.startswith("error: TensorRT-RTX is not installed completely")
    assert "libtensorrt_rtx.so.1" in ran.err
    assert left(tmp_path) == {"net.onnx", "packages"}
    old = ModuleType("tensorrt_rtx")
    old.__version__ = "1.3.0.35"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", old)
    with pytest.raises(HostError, match=r"TensorRT-RTX 1\.3\.0\.35, required is 1\.4 or newer"):
        import_library(RTX)


@NEEDS_RTX
def test_a_plan_of_another_version_is_built_again_by_the_line(source: Path) -> None:
    from dataclasses import replace

    from maskplan.engines.build import is_foreign

    record = build(source, backend=RTX, sparse=False)
    assert not is_foreign(record)
    assert is_foreign(replace(record, runtime_version="1.6.1.120"))


@NEEDS_RTX
def test_an_fp32_graph_compiles_and_the_sidecar_has_only_what_was_found(tmp_path: Path) -> None:
    record = build(small_net(tmp_path / "net.onnx"), backend=RTX)
    values = json.loads((tmp_path / "engine.plan.json").read_text())
    assert (record.precision, values["backend"], values["sparse_flag"]) == ("fp32", RTX, "same_bytes")
    assert "targets" not in values


@pytest.mark.skipif(HAS_GPU, reason="plans may run here")
@NEEDS_RTX
def test_why_a_plan_does_not_run_is_known_without_loading_it(source: Path) -> None:
    reason = why_not_runnable(build(source, backend=RTX, sparse=False))
    assert reason == "a plan of TensorRT-RTX runs on a GPU only: no NVIDIA driver on this host"
