"""The log of learning as a CSV file."""

from __future__ import annotations

import csv
from pathlib import Path

from maskplan.pipeline.learning.metrics import MetricsLog, MetricsRow

ROW = MetricsRow(50, 0.5, 0.2, None, 1.0, 0.03, 0.9, 0.01, select_loss=0.04)


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "learning.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_appended_under_one_header(tmp_path: Path) -> None:
    for _ in range(2):
        log = MetricsLog(tmp_path)
        log.write(ROW)
        log.close()
    rows = read(tmp_path)
    assert [row["step"] for row in rows] == ["50", "50"]
    assert rows[0]["top1"] == ""
    assert rows[0]["select_loss"] == "0.04"


def test_a_file_that_an_earlier_version_began_keeps_its_columns(tmp_path: Path) -> None:
    (tmp_path / "learning.csv").write_text("step,loss\n1,0.5\n")
    log = MetricsLog(tmp_path)
    log.write(ROW)
    log.close()
    assert read(tmp_path) == [{"step": "1", "loss": "0.5"}, {"step": "50", "loss": "0.2"}]
