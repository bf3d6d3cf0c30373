"""`engine --backend tensorrt-rtx` without a GPU: real plans, measured on ONNX Runtime, and every place says so."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from digits_run import LEARN
from report_schema import validate_report
from tensorrt_hosts import HAS_GPU, NEEDS_RTX

from maskplan.engines.ort import PLANS_DID_NOT_RUN
from maskplan.engines.sidecar import read_engine
from maskplan.pipeline.core.files import sha256_of

Cli = Callable[..., Any]

pytestmark = [NEEDS_RTX, pytest.mark.skipif(HAS_GPU, reason="plans may run here")]

QUICK = LEARN + '[time]\nbatches = [1, 4]\nseconds = 0.2\n\n[tensorrt]\ntargets = ["sm86", "sm120"]\n'


def test_plans_are_built_and_their_onnx_files_measured(digits: Path, cli: Cli, tmp_path: Path) -> None:
    """The folder is that of a finished run on ONNX Runtime: all stages before the build are reused."""
    recipe = tmp_path / "quick.toml"
    recipe.write_text(QUICK)
    command = ("engine", "digits_resnet", "--backend", "tensorrt-rtx", "--out", digits, "--recipe", recipe)
    ran = cli(*command)
    assert ran.code == 0, ran.err
    assert "mask: unchanged" in ran.err
    assert PLANS_DID_NOT_RUN in ran.err
    assert PLANS_DID_NOT_RUN in ran.out
    assert "fp16 on tensorrt-rtx, measured on onnxruntime" in ran.out
    assert "takes no sparse weights ahead of time" in ran.out
    assert "maskplan deploy" not in ran.out
    for name in ("dense", "sparse"):
        plan = read_engine(digits / ("engine.rtx.plan" if name == "sparse" else "dense_engine.rtx.plan"))
        assert plan.onnx_sha256 == sha256_of(digits / f"{name}.fp16.onnx")
        assert [str(p) for p in plan.profiles] == ["1:1:1", "1:4:4"]
        assert plan.targets == ("sm86", "sm120")

    validate_report(digits / "report.json")
    report = json.loads((digits / "report.json").read_text())
    assert (report["engine"]["backend"], report["engine"]["ran_on"]) == ("tensorrt-rtx", "onnxruntime")
    assert report["engine"]["fidelity"] is None
    # The compiler numbers its own tensors differently now and then.
    assert report["engine"]["sparse_flag"] in ("same_bytes", "same_content")
    assert report["engine"]["sparsity"]["layers"] == []
    assert PLANS_DID_NOT_RUN in report["timing"]["note"]
    assert "no sparse kernels" in report["timing"]["note"]
    assert PLANS_DID_NOT_RUN in report["parity"]["notes"]
    assert report["parity"]["verdict"] == "pass"
    page = (digits / "report.html").read_text()
    assert PLANS_DID_NOT_RUN[1:] in page
    assert "not measured: the plan did not run" in page
    assert "The sparse model, run by ONNX Runtime," in page
    assert "takes no sparse weights ahead of time" in page

    again = cli(*command)
    assert again.code == 0, again.err
    assert "build-sparse: unchanged" in again.err
    assert "time: unchanged" in again.err


@pytest.mark.parametrize(
    ("recipe", "installed", "told"),
    [
        ("[tensorrt]\ntiming_cache = 't.cache'\n", True, "TensorRT-RTX does not take --timing-cache"),
        ("", False, "TensorRT-RTX is not installed"),
    ],
)
def test_what_the_build_would_refuse_is_refused_before_the_first_stage(
    cli: Cli, tmp_path: Path, recipe: str, installed: bool, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not installed:
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    file = tmp_path / "recipe.toml"
    file.write_text(recipe)
    out = tmp_path / "out"
    ran = cli("engine", "digits_resnet", "--backend", "tensorrt-rtx", "--out", out, "--recipe", file)
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.startswith(f"error: {told}")
    assert not out.exists()
