"""`maskplan engine model.onnx`: the whole line on a network of two outputs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from any_network import box_head
from onnx import numpy_helper
from report_schema import validate_report

from maskplan.pipeline.cli.app import main

RECIPE = '[time]\nseconds = 0.05\nbatches = [1, 2]\n[model]\noutputs = ["scores:logits"]\n'
METRIC = "def m(o, t):\n    return -abs(o['boxes']).mean(axis=(1, 2)) {}\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    box_head(tmp_path / "net.onnx")
    save(tmp_path, "train", 0)
    save(tmp_path, "val", 1)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "m.py").write_text(METRIC.format(""))
    return tmp_path


def save(folder: Path, role: str, seed: int, target: float = 0.0) -> None:
    values = np.random.default_rng(seed).standard_normal((16, 3, 16, 16), np.float32)
    (folder / "data").mkdir(exist_ok=True)
    np.savez(folder / "data" / f"{role}.npz", x=values, t=np.full(16, target))


def line(source: Path, *more: str, data: bool = True) -> int:
    given = ["--data", str(source / "data")] if data else []
    files = ["--out", str(source / "out"), "--recipe", str(source / "recipe.toml")]
    return main(["engine", str(source / "net.onnx"), *given, *files, *more])


def ran(capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Names of the stages that ran."""
    return {text.split(":")[0] for text in capsys.readouterr().err.splitlines() if text.endswith(" s")}


def test_the_report_tells_what_the_masks_keep_and_not_what_is_unknown(source: Path) -> None:
    assert line(source) == 0
    page, report = (source / "out" / "report.html").read_text(), validate_report(source / "out" / "report.json")
    dense, sparse = (stored(source / "out" / name) for name in ("dense.onnx", "sparse.onnx"))
    assert {m["name"] for m in report["masks"]["masked"]} == {"w2", "w3"}
    for mask in report["masks"]["masked"]:
        groups = np.abs(np.moveaxis(dense[mask["name"]], 1, -1).reshape(-1, 4)).astype(np.float64)
        best = np.sort(groups, axis=1)[:, 2:].sum() / groups.sum()
        kept = np.abs(dense[mask["name"]])[sparse[mask["name"]] != 0].sum(dtype=np.float64) / groups.sum()
        assert (mask["kept"], mask["kept_best"]) == (pytest.approx(kept), pytest.approx(best))
        assert kept < best
    # How often an operator runs is not known.
    assert report["masks"]["masked_macs_percent"] is None
    assert "multiply-accumulates are in masked layers" not in page
    assert '<a href="#outputs">' in page


def stored(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def test_stages_run_again_only_for_what_they_depend_on(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--metric", f"{source / 'm.py'}:m", "--max-metric-drop", "100"]
    assert line(source, *options, "--repository", str(source / "models")) == 0
    assert ran(capsys) >= {"export-dense", "prune", "check", "build-dense", "build-sparse", "compare", "time", "report"}
    out = source / "out"
    for name in ("dense.onnx", "sparse.onnx", "engine.onnx", "dense_engine.onnx", "report.json", "report.html"):
        assert (out / name).is_file(), name
    report = validate_report(out / "report.json")
    assert report["masks"]["method"] == "layerwise"
    assert report["parity"]["verdict"] == "pass"
    kinds = [("boxes", "values"), ("scores", "logits")]
    assert [(o["name"], o["kind"]) for o in report["parity"]["by_output"]] == kinds
    assert [(o["name"], o["kind"]) for o in report["model"]["outputs"]] == kinds
    assert "boxes" in (out / "report.html").read_text()
    assert (source / "models" / "net" / "1" / "model.onnx").is_file()

    assert line(source, *options) == 0
    assert not ran(capsys) - {"report"}
    (source / "m.py").write_text(METRIC.format("+ 1"))
    assert line(source, *options) == 0
    assert ran(capsys) - {"report"} == {"compare"}
    save(source, "val", 1, target=1.0)
    assert line(source, *options) == 0
    assert ran(capsys) - {"report"} == {"compare"}
    save(source, "val", 2)
    assert line(source, *options) == 0
    assert ran(capsys) - {"report"} == {"compare", "time"}
    save(source, "train", 3)
    assert line(source, *options) == 0
    assert ran(capsys) >= {"prune", "check", "build-sparse", "compare", "time"}


def test_shared_data_is_refused_before_the_masks_are_made(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(source, "val", 0)
    assert line(source) == 3
    assert "val images were also used" in (error := capsys.readouterr().err)
    assert "train.npz and val.npz" in error
    # Masks by magnitude use no data.
    assert line(source, "--masks", "magnitude", "--min-sqnr", "0") == 0


def test_options_that_do_not_apply_are_refused(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert line(source, "--permute", "--refine") == 3
    assert "--permute, --refine" in capsys.readouterr().err
    assert line(source, "--masks", "learned") == 3
    assert line(source, "--masks", "layerwise", data=False) == 3
    assert line(source, "--precision", "int8", data=False) == 3


@pytest.mark.slow
def test_without_data_and_in_int8(source: Path) -> None:
    assert line(source, data=False) == 0
    report = validate_report(source / "out" / "report.json")
    assert (report["masks"]["method"], report["parity"]["verdict"]) == ("magnitude", "not_applicable")
    assert line(source, "--precision", "int8", "--update", "--min-sqnr", "0") == 0
    report = validate_report(source / "out" / "report.json")
    # The stem and the scores, which the recipe calls logits; boxes are values, and the layers before them stay in floats.
    assert report["calibration"]["quantized_layers"] == 2
    assert "box" in {name for name, _ in report["calibration"]["in_float"]}
    assert (source / "out" / "sparse.int8.onnx").is_file()


@pytest.mark.slow
def test_pytorch_is_not_imported(source: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from maskplan.pipeline.cli.app import main\n"
        f"sys.exit(main({['engine', str(source / 'net.onnx'), '--data', str(source / 'data'), '--update', '--out']!r}"
        f" + [{str(source / 'out')!r}, '--recipe', {str(source / 'recipe.toml')!r}, '--min-sqnr', '0']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
