"""Numbers beside those of an earlier report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.files import write_json
from maskplan.pipeline.core.reports import DriftRow, ParityReport
from maskplan.pipeline.core.serialization import decode, encode
from maskplan.pipeline.parity.baseline import read_baseline, with_drift

NOW = ParityReport("pass", None, 400, 91.0, 99.0, 90.25, 98.5, 0.75, (0.2, 1.3), 97.75, 0.5, 0.99, 1.0, flip_rate=2.25)
THEN = replace(NOW, top1_sparse=90.75, top1_drop=0.25, agreement=99.0, flip_rate=1.0, max_abs_diff=None)


def changes(report: ParityReport) -> dict[str, DriftRow]:
    return {row.name: row for row in report.drift}


@pytest.mark.parametrize("whole", [True, False])
def test_changes_are_now_minus_then(whole: bool, tmp_path: Path) -> None:
    """Of compare's own report, and of the line's, which holds one."""
    write_json(tmp_path / "r.json", {"schema": 1, "parity": encode(THEN)} if whole else encode(THEN))
    found = with_drift(NOW, read_baseline(tmp_path / "r.json"))
    rows = changes(found)
    assert rows["top1_sparse"] == DriftRow("top1_sparse", 90.75, 90.25, -0.5)
    assert rows["top1_drop"] == DriftRow("top1_drop", 0.25, 0.75, 0.5)
    assert rows["agreement"].change == pytest.approx(-1.25)
    assert rows["top1_dense"].change == 0
    assert rows["max_abs_diff"] == DriftRow("max_abs_diff", None, 0.5, None)
    assert found.notes == ()
    assert (found.verdict, found.reason) == (NOW.verdict, NOW.reason)


def test_a_report_of_an_older_release_lacks_numbers_and_is_taken(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"verdict": "pass", "top1_drop": 0.5, "images": 400, "agreement": "high"}')
    rows = changes(with_drift(NOW, read_baseline(tmp_path / "r.json")))
    assert rows["top1_drop"].change == pytest.approx(0.25)
    assert rows["agreement"] == DriftRow("agreement", None, 97.75, None)


def test_other_images_are_noted() -> None:
    assert "400" in with_drift(NOW, encode(replace(THEN, images=300))).notes[0]
    digests = [replace(r, images_sha256=c * 64) for r, c in ((NOW, "1"), (THEN, "2"))]
    assert with_drift(digests[0], encode(digests[1])).notes == ("the baseline was measured on different images",)
    assert with_drift(digests[0], encode(digests[0])).notes == with_drift(NOW, encode(digests[1])).notes == ()


def test_a_report_with_drift_can_be_read_again() -> None:
    found = with_drift(NOW, encode(THEN))
    assert decode(ParityReport, json.loads(json.dumps(encode(found)))) == found


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"parity": 3}', '{"parity": {}}', '{"verdict": "pass"}'])
def test_what_is_no_report_is_one_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(InputError, match=r"baseline") as caught:
        read_baseline(tmp_path / "r.json")
    assert "r.json" in str(caught.value)


def test_a_missing_report_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="file not found"):
        read_baseline(tmp_path / "r.json")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1" + "0" * 400, "1" + "0" * 4000])
def test_what_is_no_finite_number_counts_as_lacking(number: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(f'{{"verdict": "pass", "top1_drop": {number}, "images": 400}}')
    rows = changes(with_drift(NOW, read_baseline(tmp_path / "r.json")))
    assert rows["top1_drop"] == DriftRow("top1_drop", None, NOW.top1_drop, None)
