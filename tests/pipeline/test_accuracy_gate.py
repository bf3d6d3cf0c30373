"""A run whose masks cost too much accuracy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from digits_run import LEARN
from small_line import read_json, stages_of

from maskplan.pipeline.cli.app import main


@dataclass(frozen=True)
class Failed:
    """A run whose masks cost too much accuracy."""

    code: int
    out: Path
    repository: Path


@pytest.fixture(scope="module")
def failed(finished_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Failed:
    """Magnitude masks without recalibration cost the digits about 30 points; do not write to it."""
    folder = tmp_path_factory.mktemp("failed")
    out = Path(shutil.copytree(finished_digits, folder / "out"))
    (folder / "r.toml").write_text(f"{LEARN}[recalibrate]\nimages = 0\n[time]\nseconds = 0.1\n")
    arguments = ["engine", "--masks", "magnitude", "--recipe", f"{folder}/r.toml", "--out", str(out)]
    return Failed(main([*arguments, "--repository", f"{folder}/models"]), out, folder / "models")


def test_lost_accuracy_ends_the_run_with_exit_code_1(failed: Failed) -> None:
    assert failed.code == 1


def test_lost_accuracy_is_reported_in_full(failed: Failed) -> None:
    report = read_json(failed.out / "report.json")

    parity = report["parity"]
    assert parity["verdict"] == "fail"
    assert "the limit is 1" in parity["reason"]
    assert 10 < parity["top1_drop"] < 60
    assert parity["top1_drop"] == pytest.approx(parity["top1_dense"] - parity["top1_sparse"])
    assert parity["drop_ci95"][0] < parity["top1_drop"] < parity["drop_ci95"][1]
    assert report["conformance"]["verdict"] == "pass"
    assert report["masks"]["method"] == "magnitude"
    assert "accuracy is not kept" in (failed.out / "report.html").read_text()


def test_an_engine_that_lost_accuracy_is_not_deployed(failed: Failed) -> None:
    assert not failed.repository.exists()


def test_lost_accuracy_says_so_each_time(failed: Failed, cli: Callable[..., Any], tmp_path: Path) -> None:
    out = Path(shutil.copytree(failed.out, tmp_path / "out"))
    (tmp_path / "r.toml").write_text(f"{LEARN}[recalibrate]\nimages = 0\n[time]\nseconds = 0.1\n")

    ran = cli("engine", "--masks", "magnitude", "--recipe", tmp_path / "r.toml", "--out", out)

    assert stages_of(ran.err).made == ()
    assert ran.code == 1
    assert "failed: parity: top-1 drops by" in ran.err
    assert "  fix:   try --masks learned; --permute" in ran.err
    assert "maskplan deploy" not in ran.out


def test_recalibration_is_what_the_digits_need(finished_digits: Path) -> None:
    parity = read_json(finished_digits / "report.json")["parity"]

    assert parity["verdict"] == "pass"
    assert parity["reason"] is None
    drops = {row["name"]: row["drop"] for row in parity["methods"]}
    assert drops["magnitude, recalibrated"] < drops["magnitude"] - 10
