"""`compare` as CI calls it: files, saved results, damage that it must detect."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image
from report_schema import validate_values

from maskplan.engines.ort import OrtEngine
from maskplan.pipeline.core.reports import ParityReport
from maskplan.pipeline.core.serialization import decode

Cli = Callable[..., Any]


@pytest.fixture
def dense(finished_digits: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The dense ONNX file of the finished run, outside any CI job."""
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    return finished_digits / "dense.onnx"


def corrupted(source: Path, out: Path, value: float) -> Path:
    """One weight of the first convolution set to a value."""
    model = onnx.load(source)
    tensor = next(t for t in model.graph.initializer if len(t.dims) == 4)
    weights = numpy_helper.to_array(tensor).copy()
    weights.flat[0] = value
    tensor.CopyFrom(numpy_helper.from_array(weights, tensor.name))
    out.write_bytes(model.SerializeToString())
    return out


def report_of(path: Path) -> ParityReport:
    values = json.loads(path.read_text(), parse_constant=pytest.fail)
    validate_values(values, "ParityReport")
    return decode(ParityReport, values)


def test_equal_models_pass_without_a_flip(cli: Cli, dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    ran = cli(
        "compare", dense, dense, "--max-top1-drop", 0, "--max-flip-rate", 0, "--min-agreement", 100, "--report", out
    )
    assert ran.code == 0, ran.err
    found = report_of(out)
    assert found.flips is not None
    assert (found.flips.changed, found.top1_drop, found.max_abs_diff, found.verdict) == (0, 0, 0, "pass")
    assert "0 right to wrong, 0 wrong to right" in ran.out
    assert ran.out.endswith("\npass\n")


@pytest.mark.parametrize("value", [1e4, float("nan"), 3e38])
def test_one_corrupted_weight_fails(value: float, cli: Cli, dense: Path, tmp_path: Path) -> None:
    bad = corrupted(dense, tmp_path / "bad.onnx", value)
    ran = cli("compare", dense, bad, "--report", tmp_path / "r.json", "--junit", tmp_path / "r.xml")
    assert ran.code == 1
    assert ran.err.startswith("failed: ")
    found = report_of(tmp_path / "r.json")
    assert (found.verdict, found.images) == ("fail", 359)
    suite = ElementTree.parse(tmp_path / "r.xml").getroot()
    assert int(suite.get("failures", 0)) >= 1


def test_a_small_change_of_one_weight_fails_on_the_cosine(cli: Cli, dense: Path, tmp_path: Path) -> None:
    bad = corrupted(dense, tmp_path / "bad.onnx", 0.9)
    ran = cli("compare", dense, bad, "--max-top1-drop", 5, "--min-cosine", 0.9999999, "--report", tmp_path / "r.json")
    assert ran.code == 1
    assert "smallest cosine similarity" in ran.err
    assert cli("compare", dense, bad, "--max-top1-drop", 5, "--min-cosine", 0.5).code == 0


def test_saved_results_replace_the_dense_side(
    cli: Cli, dense: Path, finished_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse, saved = finished_digits / "engine.onnx", tmp_path / "dense.results"
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    assert cli("compare", dense, sparse, "--report", first, "--save-dense", saved).code == 0
    ran_on: list[str] = []
    infer = OrtEngine.infer
    monkeypatch.setattr(OrtEngine, "infer", lambda self, feeds: (ran_on.append(self._path.name), infer(self, feeds))[1])
    assert cli("compare", dense, sparse, "--report", second, "--dense-results", saved).code == 0
    assert set(ran_on) == {"engine.onnx"}
    assert report_of(second) == report_of(first)


def test_saved_results_of_another_model_or_other_images_are_refused(
    cli: Cli, dense: Path, finished_digits: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "dense.results"
    assert cli("compare", dense, dense, "--save-dense", saved).code == 0
    ran = cli("compare", finished_digits / "sparse.onnx", dense, "--dense-results", saved)
    assert (ran.code, ran.out) == (3, "")
    assert "the dense model is a different file" in ran.err
    ran = cli("compare", dense, dense, "--dense-results", saved, "--fixed-images", 7)
    assert ran.code == 3
    assert "7 fixed images are requested, 256 are saved" in ran.err


def test_a_recipe_gives_thresholds_and_the_command_line_overrides_them(cli: Cli, dense: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "gate.toml"
    recipe.write_text("[compare]\nmax_top1_drop = 0.5\nmin_cosine = 0.999\nmax_class_drop = 2\nconfident = true\n")
    out = tmp_path / "r.json"
    assert cli("compare", dense, dense, "--recipe", recipe, "--report", out).code == 1
    found = report_of(out)
    assert {c.name: c.limit for c in found.checks} == {"max_top1_drop": 0.5, "max_class_drop": 2, "min_cosine": 0.999}
    assert found.use_ci
    assert "too few images to decide: with 359 images" in str(found.reason)
    assert (
        cli("compare", dense, dense, "--recipe", recipe, "--use-point", "--max-top1-drop", 0, "--report", out).code == 0
    )
    found = report_of(out)
    assert (found.checks[0].limit, found.use_ci) == (0, False)
    recipe.write_text("[compare]\nmax_top1_dorp = 0.5\n")
    ran = cli("compare", dense, dense, "--recipe", recipe)
    assert ran.code == 3
    assert "did you mean 'max_top1_drop'" in ran.err


def test_drift_since_a_baseline_is_shown_and_written(
    cli: Cli, dense: Path, finished_digits: Path, tmp_path: Path
) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    assert cli("compare", dense, finished_digits / "engine.onnx", "--report", old).code == 0
    ran = cli("compare", dense, dense, "--report", new, "--baseline", old)
    assert ran.code == 0, ran.err
    rows = {row.name: row for row in report_of(new).drift}
    before = report_of(old)
    assert rows["top1_drop"].before == before.top1_drop
    assert rows["top1_drop"].now == 0
    assert rows["cosine_min"].change == pytest.approx(1 - (before.cosine_min or 0), abs=1e-5)
    assert "since baseline top1_drop" in ran.out
    # The line's own report holds one as well.
    ran = cli("compare", dense, dense, "--baseline", finished_digits / "report.json")
    assert ran.code == 0, ran.err
    assert "since baseline agreement" in ran.out


def test_annotations_and_a_summary_are_written_in_a_job_and_only_there(
    cli: Cli, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = corrupted(dense, tmp_path / "bad.onnx", 1e4)
    assert "::" not in cli("compare", dense, bad).out
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "s.md"))
    out = cli("compare", dense, bad).out
    (line,) = [line for line in out.splitlines() if line.startswith("::")]
    assert line.startswith("::error title=parity of bad.onnx::top-1 drops by")
    assert "| max_top1_drop | 1 |" in (tmp_path / "s.md").read_text()
    assert "::" not in cli("compare", dense, bad, "--no-github").out
    monkeypatch.delenv("GITHUB_ACTIONS")
    assert "::notice" in cli("compare", dense, dense, "--github").out


def test_images_without_classes_are_compared_without_accuracy(cli: Cli, dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "loose"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(50):
        Image.fromarray(generator.integers(0, 255, (8, 8), dtype=np.uint8)).save(folder / f"{i}.png")
    out = tmp_path / "r.json"
    ran = cli("compare", dense, dense, "--data", folder, "--report", out)
    assert ran.code == 1
    assert "no labeled images" in ran.err
    assert "50 images have no labels: accuracy is not judged" in ran.err
    assert "top-1" not in ran.out
    ran = cli("compare", dense, dense, "--data", folder, "--min-agreement", 100, "--report", out)
    assert ran.code == 0, ran.err
    found = report_of(out)
    assert (found.images, found.unlabeled_images, found.agreement, found.top1_drop) == (0, 50, 100, None)


def test_data_whose_folders_are_in_another_order_than_the_records_is_refused(
    cli: Cli, dense: Path, tmp_path: Path
) -> None:
    """`classes.txt` turns two digits round; the model's record names them in order."""
    folder = tmp_path / "data"
    names = [str(d) for d in range(10)]
    for name in names:
        (folder / "val" / name).mkdir(parents=True)
        Image.new("L", (8, 8), 20 * int(name)).save(folder / "val" / name / "a.png")
    (folder / "classes.txt").write_text("\n".join(["1", "0", *names[2:]]))
    ran = cli("compare", dense, dense, "--data", folder)
    assert (ran.code, ran.out) == (3, "")
    assert "the classes are not in the same order" in ran.err
    (folder / "classes.txt").write_text("\n".join(names))
    assert cli("compare", dense, dense, "--data", folder, "--max-top1-drop", 0).code == 0


def test_bisect_finds_the_corrupted_layer_and_plots_it(cli: Cli, dense: Path, tmp_path: Path) -> None:
    bad = corrupted(dense, tmp_path / "bad.onnx", 1e4)
    out, plot = tmp_path / "r.json", tmp_path / "depth.svg"
    ran = cli("compare", dense, bad, "--bisect", "--bisect-tolerance", 0.01, "--plot", plot, "--report", out)
    assert ran.code == 1
    depth = report_of(out).depth
    assert depth is not None
    assert (depth.first, depth.tolerance) == (depth.layers[0].node, 0.01)
    assert "first layer that differs by more than 0.01" in ran.out
    ElementTree.parse(plot)
    ran = cli("compare", dense, dense, "--bisect", "--report", out)
    assert ran.code == 0
    assert "differs by more than 1: none" in ran.out


def test_options_of_bisect_without_it_are_wrong_usage(cli: Cli, dense: Path, tmp_path: Path) -> None:
    assert cli("compare", dense, dense, "--plot", tmp_path / "depth.svg").code == 2
    assert cli("compare", dense, dense, "--bisect-tolerance", 0.1).code == 2


def test_print_polygraphy_compares_nothing(cli: Cli, dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    ran = cli("compare", dense, dense, "--print-polygraphy", "--report", out)
    assert ran.code == 0, ran.err
    assert ran.out.startswith("polygraphy run ")
    assert not out.exists()


# docs/ci.md


PAGE = Path(__file__).parents[3] / "docs" / "ci.md"


def workflow() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    (text,) = [part.partition("```")[0] for part in PAGE.read_text().split("```yaml\n")[1:]]
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def test_the_workflow_on_the_page_is_valid() -> None:
    found = workflow()
    # YAML 1.1 reads the key `on` as true.
    assert {"name", True, "jobs"} <= set(found)
    (job,) = found["jobs"].values()
    steps = job["steps"]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    assert [step["uses"].partition("@")[0] for step in steps if "uses" in step] == [
        "actions/checkout",
        "actions/setup-python",
        "actions/upload-artifact",
    ]
    # Reports are uploaded even if the gate failed.
    assert steps[-1]["if"] == "always()"


def shown_commands() -> list[str]:
    """Every command of maskplan on the page, continued lines joined."""
    text = PAGE.read_text().replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ").removeprefix(".venv/bin/") for line in text.splitlines()]
    return [" ".join(line.split()) for line in lines if line.startswith("maskplan ")]


def test_every_option_on_the_page_exists(cli: Cli) -> None:
    commands = shown_commands()
    assert len(commands) >= 5
    for command in commands:
        name, *words = command.split()[1:]
        known = cli(name, "--help").out
        for option in (word for word in words if word.startswith("--")):
            assert option in known, f"{name} has no {option}"


def gate_step() -> str:
    (job,) = workflow()["jobs"].values()
    (text,) = [step["run"] for step in job["steps"] if "run" in step and "maskplan compare" in step["run"]]
    return str(text)


def run_gate(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-eo", "pipefail", "-c", gate_step()],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_the_workflows_gate_runs_on_the_digits(finished_digits: Path, tmp_path: Path) -> None:
    """Run as written, in a folder with the engines and the report of an earlier release; it writes what the page says."""
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "digits_resnet").symlink_to(finished_digits)
    bin_folder = tmp_path / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "maskplan").symlink_to(Path(sys.executable).with_name("maskplan"))
    shutil.copy(finished_digits / "report.json", tmp_path / "released.json")
    done = run_gate(tmp_path, GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY=str(tmp_path / "s.md"))
    assert done.returncode == 0, done.stderr
    assert "::notice" in done.stdout
    assert "since baseline" in done.stdout
    (job,) = workflow()["jobs"].values()
    uploaded = next(step["with"]["path"] for step in job["steps"] if "upload" in step.get("uses", ""))
    assert all((tmp_path / name).is_file() for name in uploaded.split())
    ElementTree.parse(tmp_path / "parity.xml")
    assert "### parity of" in (tmp_path / "s.md").read_text()


def test_the_workflows_gate_needs_no_earlier_report(tmp_path: Path) -> None:
    command = tmp_path / ".venv" / "bin" / "maskplan"
    command.parent.mkdir(parents=True)
    command.write_text('#!/bin/sh\necho "$@"\n')
    command.chmod(0o755)
    done = run_gate(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("compare ")
    assert "--baseline" not in done.stdout
    (tmp_path / "released.json").touch()
    assert run_gate(tmp_path).stdout.endswith("--baseline released.json\n")
