"""trtexec's command lines, and its plans taken in."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from small_net import small_net

from engines.sidecar import read_engine
from engines.trt.options import TrtOptions
from engines.trt.trtexec import trtexec_lines
from exporters.metadata import describe_onnx
from pipeline.artifacts import Profile
from pipeline.cli.app import main

PROFILES = (Profile(1, 1, 1), Profile(1, 8, 16))
DEFAULTS_OF_11 = {"--useCudaGraph", "--useSpinWait", "--separateProfileRun", "--noDataTransfers"}


def lines(source: Path, major: int, *, sparse: bool = True, **options: object) -> list[list[str]]:
    chosen = TrtOptions(**options)  # type: ignore[arg-type]
    found = trtexec_lines(describe_onnx(source), PROFILES, sparse, chosen, source.with_name("e.plan"), major)
    return [shlex.split(line) for line in found]


@pytest.mark.parametrize("major", [10, 11])
def test_a_line_for_each_profile(source: Path, major: int) -> None:
    first, second = lines(source, major)
    assert first[:2] == ["trtexec", f"--onnx={source}"]
    assert f"--saveEngine={source.with_name('e.b1.plan')}" in first
    assert f"--exportLayerInfo={source.with_name('e.b8.plan')}.layers.json" in second
    shapes = ["--minShapes=input:1x3x8x8", "--optShapes=input:8x3x8x8", "--maxShapes=input:16x3x8x8"]
    assert set(shapes) <= set(second)
    assert {"--sparsity=enable", "--noTF32", "--profilingVerbosity=detailed", "--builderOptimizationLevel=3"} <= set(
        first
    )
    assert not any("force" in word for word in first)


def test_versions_have_their_own_spelling_and_time_alike(source: Path) -> None:
    older, newer = (set(lines(source, major)[0]) for major in (10, 11))
    assert older - newer == {"--stronglyTyped", *DEFAULTS_OF_11}
    assert newer <= older


def test_a_plan_alone_has_the_name_given_and_a_fixed_batch_no_shapes(source: Path) -> None:
    fixed = small_net(source.with_name("fixed.onnx"), batch=4)
    (line,) = trtexec_lines(describe_onnx(fixed), PROFILES[:1], True, TrtOptions(), source.with_name("e.plan"), 11)
    words = shlex.split(line)
    assert f"--saveEngine={source.with_name('e.plan')}" in words
    assert not [word for word in words if "Shapes" in word]


def test_options_become_flags(source: Path) -> None:
    found = set(
        lines(
            source,
            10,
            sparse=False,
            tf32=True,
            optimization_level=5,
            workspace_bytes=3 * 2**20,
            timing_cache=Path("a b.cache"),
            version_compatible=True,
            hardware_compatible=True,
            refittable=True,
            stripped=True,
        )[0]
    )
    assert "--noTF32" not in found
    assert {
        "--sparsity=disable",
        "--builderOptimizationLevel=5",
        "--memPoolSize=workspace:3M",
        "--timingCacheFile=a b.cache",
        "--versionCompatible",
        "--hardwareCompatibilityLevel=ampere+",
        "--refit",
        "--stripWeights",
    } <= found


def test_the_command_prints_them_and_builds_nothing(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(source), "--print-trtexec", "10", "--profile", "1:4:8", "--sparse"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("trtexec ")
    assert "--stronglyTyped" in line
    assert {p.name for p in source.parent.iterdir()} == {source.name}
    assert main(["build", str(source), "--print-trtexec", "9"]) == 3


def test_a_plan_of_trtexec_is_taken_in_with_its_evidence(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The layer information is written by hand in the documented keys; the kernel's name is one that a user quoted."""
    kernel = (
        "sm80_xmma_fprop_avdt_sparse_int8int8_tilesize64x64x64_tapsperload3_threadspercta128_r3s3_u1v1_scalebias_relu"
    )
    layer = {
        "Name": "mix",
        "LayerType": "CaskConvolution",
        "OutMaps": 16,
        "Groups": 1,
        "TacticName": kernel,
        "HasSparseWeights": 1,
        "Metadata": "[ONNX Layer: mix]",
        "Inputs": [{"Name": "b", "Dimensions": [1, 16, 8, 8], "Format/Datatype": "Int8"}],
    }
    plan, info = source.with_name("theirs.plan"), source.with_name("theirs.json")
    plan.write_bytes(b"a plan")
    info.write_text(json.dumps({"Layers": [layer], "Bindings": ["input", "logits"]}))
    common = ["build", str(source), "--import", str(plan), "--profile", "1:8:16", "-o", str(source.with_name("e.plan"))]
    assert main(common) == 3
    assert "--layer-info" in capsys.readouterr().err
    told = ["--layer-info", str(info), "--trt-version", "10.13.3.9", "--compute-capability", "9.0"]
    assert main([*common, *told]) == 0
    record = read_engine(source.with_name("e.plan"))
    assert record.path.read_bytes() == b"a plan"
    assert (record.runtime_version, record.compute_capability) == ("10.13.3.9", "9.0")
    assert record.profiles == (Profile(1, 8, 16),)
    assert [(x.name, x.state, x.kernel) for x in record.layers] == [("mix", "sparse", kernel)]
    assert record.notes
    record.path.unlink()
    for gone in (info, plan):
        gone.unlink()
        assert main([*common, *told]) == 3
        message = capsys.readouterr().err
        assert f"file not found\n  where: {gone}" in message
        assert "give the files that trtexec wrote" in message
        assert not record.path.exists()
        plan.write_bytes(b"a plan")
        info.write_text("{}")
    assert main([*common, *told]) == 3
    assert "the layer information cannot be read" in capsys.readouterr().err
    assert not record.path.exists()
