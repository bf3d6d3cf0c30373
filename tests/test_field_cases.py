"""Networks made after public bug reports, from a folder beside the repository, with the right value of each.

Cases of the same kinds that need no other folder are in the tests of each command; these are the originals.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

CASES = Path(__file__).parents[2] / "shared" / "field" / "onnx"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CASES.is_dir(), reason="the folder of field cases is not beside the repository"),
]

Run = Callable[..., Any]


@pytest.fixture
def case(tmp_path: Path, cli: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Run]:
    """Makes a case's files in the current folder, and returns the command line."""

    def make(name: str) -> Run:
        command = [sys.executable, str(CASES / f"{name}.py")]
        subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(CASES)}, check=True, capture_output=True)
        monkeypatch.chdir(tmp_path)
        return cli

    return make


def save(name: str, *shape: int, count: int = 8, **more: Any) -> str:
    """Arrays for the input `x`."""
    arrays = {"x": np.random.default_rng(0).random((count, *shape), dtype=np.float32), **more}
    np.savez(name, **arrays)
    return name


def answers(path: str, feeds: dict[str, Any], *, optimized: bool = True) -> list[Any]:
    options = onnxruntime.SessionOptions()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return list(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds))


def deployed(cli: Run, model: str) -> str:
    """The config of an engine in a new repository."""
    shutil.rmtree("models", ignore_errors=True)
    ran = cli("build", model, "-o", "engine.onnx")
    assert ran.code == 0, ran.err
    ran = cli("deploy", "engine.onnx", "--repository", "models", "--name", "net")
    assert ran.code == 0, ran.err
    return Path("models/net/config.pbtxt").read_text()


def test_a_dimension_of_minus_one_is_dynamic(case: Callable[[str], Run]) -> None:
    cli, configs = case("paddle_minus_one"), []
    for model in ("m.onnx", "ok.onnx"):
        ran = cli("calibrate", model, "--data", save("d.npz", 3, 32, 32), "-o", "int8.onnx")
        assert ran.code == 0, ran.err
        configs.append(deployed(cli, model))
    assert configs[0] == configs[1]
    assert "max_batch_size: 8" in configs[0]
    assert "-1:-1:-1" not in cli("inspect", "engine.onnx").out


def test_no_time_is_that_of_another_size(case: Callable[[str], Run]) -> None:
    cli = case("time_dynamic_hw")
    assert cli("build", "dyn.onnx", "-o", "engine.onnx").code == 0
    ran = cli("time", "engine.onnx", "engine.onnx", "--seconds", "0.1", "--batch", "1")
    assert ran.code == 3
    assert "--shape" in ran.err
    ran = cli("time", "engine.onnx", "engine.onnx", "--seconds", "0.1", "--batch", "1", "--shape", "3x64x64")
    assert ran.code == 0, ran.err


def test_every_weight_behind_other_operators_is_quantized(case: Callable[[str], Run]) -> None:
    cli = case("weight_behind_identity")
    ran = cli("calibrate", "m.onnx", "--data", save("d.npz", 3, 32, 32), "-o", "int8.onnx", "--report", "r.json")
    assert ran.code == 0, ran.err
    listed = {row["node"] for row in json.loads(Path("r.json").read_text())["layers"]}
    products = ("plain", "conv_identity", "conv_reshape", "conv_hwio", "matmul_transposed", "gemm_cast")
    assert listed >= set(products)
    x = np.random.default_rng(1).random((4, 3, 32, 32), dtype=np.float32)
    dense, quantized = (answers(f, {"x": x})[0] for f in ("m.onnx", "int8.onnx"))
    assert np.abs(dense - quantized).max() < 0.05 * np.abs(dense).max()


def test_a_table_stays_dense_and_a_pattern_needs_a_match(case: Callable[[str], Run]) -> None:
    cli = case("fixed_kernel_prune")
    ran = cli("prune", "m.onnx", "-o", "sparse.onnx")
    assert (ran.code, "bins stays dense" in ran.out) == (0, True)
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load("sparse.onnx").graph.initializer}
    np.testing.assert_array_equal(stored["bins"].ravel(), np.arange(16))
    assert cli("prune", "m.onnx", "--allow-dense", "/head/dfl/Conv", "-o", "sparse.onnx").code == 0
    assert cli("prune", "m.onnx", "--allow-dense", "/head/nothing", "-o", "sparse.onnx").code == 3


def test_a_detector_goes_through_the_line(case: Callable[[str], Run]) -> None:
    cli = case("detector_multi_output")
    Path("data").mkdir()
    save("data/train.npz", 3, 64, 64, count=24)
    np.savez("data/val.npz", x=np.random.default_rng(5).random((8, 3, 64, 64), dtype=np.float32))
    options = ("--data", "data", "--precision", "int8", "--repository", "models", "--out", "out", "--min-sqnr", "3")
    ran = cli("engine", "m.onnx", "--backend", "onnxruntime", *options)
    assert ran.code == 0, ran.err
    report = json.loads(Path("out/report.json").read_text())
    assert [o["name"] for o in report["parity"]["by_output"]] == ["boxes", "scores"]
    assert Path("models/m/1/golden/output.1.npy").is_file()


def test_int8_beside_fp16_of_concatenated_branches_runs(case: Callable[[str], Run]) -> None:
    cli = case("concat_fp16")
    data = save("d.npz", 3, 32, 32)
    ran = cli("calibrate", "m.onnx", "--data", data, "--float-dtype", "fp16", "-o", "int8.onnx")
    assert ran.code == 0, ran.err
    ran = cli("compare", "m.onnx", "int8.onnx", "--data", data, "--min-sqnr", "10")
    assert ran.code == 0, ran.err
    assert cli("build", "int8.onnx", "-o", "engine.onnx").code == 0


def test_thresholds_of_nms_stay_fp32(case: Callable[[str], Run]) -> None:
    cli = case("fp16_nms")
    ran = cli("calibrate", "m.onnx", "--import-trt-cache", "c.cache", "--float-dtype", "fp16", "-o", "int8.onnx")
    assert ran.code == 0, ran.err
    onnx.checker.check_model("int8.onnx", full_check=True)


def test_a_small_constant_does_not_vanish_in_fp16(case: Callable[[str], Run]) -> None:
    cli = case("fp16_epsilon")
    ran = cli("convert-precision", "m.onnx", "-o", "half.onnx")
    assert ran.code == 0, ran.err
    black = {"x": np.zeros((1, 3, 32, 32), np.float32)}
    first, second = (answers(f, black, optimized=False)[0] for f in ("m.onnx", "half.onnx"))
    np.testing.assert_allclose(second, first, atol=1e-2)


def test_arithmetic_of_sizes_stays_fp32(case: Callable[[str], Run]) -> None:
    cli = case("fp16_shape_arithmetic")
    assert cli("convert-precision", "m.onnx", "-o", "half.onnx").code == 0
    for batch in range(1, 257):
        x = np.zeros((batch, 3, 28, 28), np.float32)
        assert answers("half.onnx", {"x": x})[0].shape == (batch, 2)


def test_a_baked_batch_is_found(case: Callable[[str], Run]) -> None:
    cli = case("baked_batch")
    save("d.npz", 3, 32, 32)
    for model in ("m.onnx", "m1.onnx", "m2.onnx"):
        ran = cli("compare", model, model, "--data", "d.npz", "--min-sqnr", "60")
        assert ran.code == 0, ran.err
        assert "max_batch_size: 0" in deployed(cli, model)


def test_rows_of_all_detections_are_no_batch(case: Callable[[str], Run]) -> None:
    assert "max_batch_size: 0" in deployed(case("deploy_nms_rows"), "m.onnx")


@pytest.mark.parametrize("model", ["scalar_second.onnx", "scalar_first.onnx", "noshape.onnx"])
def test_scalars_and_unknown_shapes_are_deployed_with_a_golden_pair(model: str, case: Callable[[str], Run]) -> None:
    config = deployed(case("deploy_scalar_unknown"), model)
    assert "dims: [  ]" not in config
    assert Path("models/net/1/golden/golden.json").is_file()


def test_weights_behind_q_and_dq_are_checked(case: Callable[[str], Run]) -> None:
    cli = case("qat_export")
    assert cli("check", "sparse_qat.onnx").code == 0
    assert cli("check", "dense_qat.onnx").code == 1


def test_what_cannot_be_seen_is_unknown(case: Callable[[str], Run]) -> None:
    cli = case("qoperator")
    for model in ("qop.onnx", "dyn.onnx", "opt.onnx"):
        ran = cli("check", model, "--strict", "--report", "r.json")
        assert ran.code == 1, model
        assert json.loads(Path("r.json").read_text())["verdict"] != "pass"
    assert json.loads(Path("r.json").read_text())["unknown"] > 0
    assert cli("prune", "m.onnx", "-o", "sparse.onnx").code == 0


def test_a_normalized_weight_is_no_masked_one(case: Callable[[str], Run]) -> None:
    cli = case("weight_norm_hint")
    ran = cli("check", "m.onnx")
    assert ran.code == 1
    assert "mask" not in ran.out + ran.err
    assert cli("prune", "m.onnx", "-o", "sparse.onnx").code == 0
    assert cli("check", "sparse.onnx", "--strict").code == 0
