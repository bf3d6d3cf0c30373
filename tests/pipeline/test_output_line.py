"""`maskplan engine` on a network that is no classifier: two outputs, loose images, compared output by output."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from report_schema import validate_report
from safetensors.torch import load_file
from two_output_net import module, read_images, write_inputs

from maskplan.pipeline.cli.app import main
from maskplan.pipeline.data.dataset import open_images
from maskplan.pipeline.triton.deployed import read_golden

Cli = Callable[..., Any]
Outputs = dict[str, np.ndarray]

OPTIONS = ("--masks", "layerwise", "--no-compile")
METRIC = "def depth(outputs, targets):\n    return -abs(outputs['depth'] - 0.5).mean(axis=(1, 2, 3))\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the inputs, a finished run in `out`, and the repository `models`. Do not write to it."""
    folder = tmp_path_factory.mktemp("outputs")
    inputs = write_inputs(folder)
    where = ("--out", str(folder / "out"), "--repository", str(folder / "models"))
    assert main(["engine", *inputs, *OPTIONS, "--min-sqnr", "5", *where]) == 0
    return folder


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to go on with."""
    return Path(shutil.copytree(finished, tmp_path / "again", ignore=shutil.ignore_patterns("models")))


def command(folder: Path, *more: object) -> tuple[object, ...]:
    inputs = (f"{folder}/nets.py:unet", "--weights", folder / "w.pth", "--data", folder / "data")
    return ("engine", *inputs, "--recipe", folder / "recipe.toml", *OPTIONS, "--out", folder / "out", *more)


def val_images(folder: Path) -> torch.Tensor:
    val = open_images(folder / "data", 0).val
    return read_images([folder / "data" / val.images.name(int(i)) for i in val.indices])


def of_module(state: dict[str, Any], images: torch.Tensor) -> Outputs:
    with torch.no_grad():
        return {name: values.numpy() for name, values in module(state)(images).items()}


def of_file(path: Path, images: torch.Tensor) -> Outputs:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {"input": images.numpy()}), strict=True))


def assert_measured(found: list[dict[str, Any]], dense: Outputs, other: Outputs, rel: float = 1e-3) -> None:
    """The report's numbers of each output are NumPy's."""
    assert [(o["name"], o["kind"]) for o in found] == [("classes", "logits"), ("depth", "values")]
    for output in found:
        a, b = (values[output["name"]].astype(np.float64) for values in (dense, other))
        power = ((a - b) ** 2).sum() / (a**2).sum()
        rows = [values.reshape(len(values), -1) for values in (a, b)]
        cosines = (rows[0] * rows[1]).sum(1) / np.linalg.norm(rows[0], axis=1) / np.linalg.norm(rows[1], axis=1)
        assert output["samples"] == len(a)
        assert output["relative_error"] == pytest.approx(np.sqrt(power), rel=rel)
        assert output["sqnr_db"] == pytest.approx(-10 * np.log10(power), rel=rel)
        assert output["max_abs_diff"] == pytest.approx(np.abs(a - b).max(), rel=rel)
        assert output["cosine_min"] == pytest.approx(cosines.min(), rel=rel)
        same = 100 * (a.argmax(1) == b.argmax(1)).mean() if output["kind"] == "logits" else None
        assert output["agreement"] == (None if same is None else pytest.approx(same, abs=0.1))


def by_magnitude(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The two largest of each four along C, chosen anew."""
    changed = dict(state)
    for name in names:
        groups = state[name].movedim(1, -1)
        rows = groups.reshape(-1, 4)
        kept = torch.zeros_like(rows).scatter(1, rows.abs().topk(2, dim=1).indices, 1.0)
        changed[name] = (rows * kept).reshape(groups.shape).movedim(-1, 1)
    return changed


def test_the_report_has_what_the_modules_compute_on_the_same_images(finished: Path) -> None:
    report = validate_report(finished / "out" / "report.json")
    images, state = val_images(finished), torch.load(finished / "w.pth", weights_only=True)
    assert len(images) == 6
    dense = of_module(state, images)
    sparse = of_module(load_file(finished / "out" / "sparse.safetensors"), images)
    parity = report["parity"]
    assert (parity["verdict"], parity["unlabeled_images"], parity["top1_dense"]) == ("pass", 6, None)
    assert_measured(parity["by_output"], dense, sparse)
    methods = {method["name"]: method["outputs"] for method in parity["method_outputs"]}
    assert list(methods) == ["magnitude", "layerwise"]
    assert methods["layerwise"] == parity["by_output"]
    masked = [layer["name"] for layer in report["masks"]["masked"]]
    assert masked == ["down.weight", "head.weight"]
    assert_measured(methods["magnitude"], dense, of_module(by_magnitude(state, masked), images))
    assert report["engine"]["fidelity"]["max_abs_diff"] < 1e-5
    assert report["engine"]["fidelity"]["agreement"] == 100


def test_every_output_is_deployed_with_its_golden_array(finished: Path) -> None:
    version = finished / "models" / "nets_unet" / "1"
    golden = read_golden(version / "golden")
    assert golden.feeds["input"].shape == (1, 3, 16, 16)
    wanted = of_module(load_file(finished / "out" / "sparse.safetensors"), torch.from_numpy(golden.feeds["input"]))
    assert list(golden.outputs) == list(wanted) == ["classes", "depth"]
    for name, values in wanted.items():
        np.testing.assert_allclose(golden.outputs[name], values, rtol=1e-4, atol=1e-5)
    assert (version / "model.onnx").read_bytes() == (finished / "out" / "engine.onnx").read_bytes()


def test_a_limit_that_is_not_reached_fails_and_deploys_nothing(again: Path, cli: Cli) -> None:
    """The masks, files and engines are those of the finished run."""
    ran = cli(*command(again, "--min-sqnr", 40, "--repository", again / "models"))
    assert ran.code == 1
    report = json.loads((again / "out" / "report.json").read_text())
    worst = min(report["parity"]["by_output"], key=lambda o: o["sqnr_db"])
    assert f"{worst['name']}: SQNR in dB is {worst['sqnr_db']:.4g}; the minimum is 40" in ran.err
    assert report["parity"]["verdict"] == "fail"
    assert "build-sparse: unchanged" in ran.err
    assert not (again / "models").exists()


def test_the_users_metric_is_that_of_numpy(again: Path, cli: Cli) -> None:
    (again / "m.py").write_text(METRIC)
    images = val_images(again)
    dense, sparse = (of_file(again / "out" / name, images) for name in ("dense_engine.onnx", "engine.onnx"))
    wanted = [-np.abs(outputs["depth"] - 0.5).mean() for outputs in (dense, sparse)]
    drop = float(wanted[0] - wanted[1])
    ran = cli(*command(again, "--metric", f"{again}/m.py:depth", "--max-metric-drop", drop - 1e-3))
    assert (ran.code, f"parity: depth drops by {drop:.4g}; the limit is" in ran.err) == (1, True)
    metric = validate_report(again / "out" / "report.json")["parity"]["metric"]
    assert (metric["name"], metric["samples"]) == ("depth", 6)
    assert [metric["dense"], metric["sparse"]] == pytest.approx(wanted, rel=1e-4)
    assert metric["drop"] == pytest.approx(drop, abs=1e-5)
    low, high = metric["drop_ci95"]
    assert low < drop < high


def test_int8_is_compared_with_the_untouched_network(again: Path, cli: Cli) -> None:
    ran = cli(*command(again, "--precision", "int8", "--min-sqnr", 3))
    assert ran.code == 0, ran.err
    report = validate_report(again / "out" / "report.json")
    images = val_images(again)
    dense = of_module(torch.load(again / "w.pth", weights_only=True), images)
    # The integers of both runs are equal but for ties of rounding.
    assert_measured(report["parity"]["by_output"], dense, of_file(again / "out" / "engine.onnx", images), rel=0.02)
    assert report["engine"]["precision"] == "int8"
    assert report["calibration"]["quantized_layers"] > 0
    methods = {method["name"]: method["outputs"] for method in report["parity"]["method_outputs"]}
    assert {"dense, FP16", "dense, INT8", "layerwise", "layerwise, INT8"} <= set(methods)
    assert_measured(methods["dense, INT8"], dense, of_file(again / "out" / "dense.int8.onnx", images), rel=0.02)
