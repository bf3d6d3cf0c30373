"""A user's metric counts by its function, its file and what that imports."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.stages.compare import metric_key


@pytest.fixture
def metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "iou_of_this_test.py").write_text("SMOOTHING = 1.0\n")
    (tmp_path / "metric.py").write_text("import iou_of_this_test\n\n\ndef mean(outputs, targets):\n    return 1.0\n")
    monkeypatch.setitem(sys.modules, "iou_of_this_test", None)
    del sys.modules["iou_of_this_test"]
    return f"{tmp_path}/metric.py:mean"


@pytest.mark.parametrize("name", ["iou_of_this_test.py", "metric.py"])
def test_a_change_of_the_metric_or_of_what_it_imports_is_seen(metric: str, name: str) -> None:
    before = metric_key(metric)
    assert metric_key(metric) == before
    file = Path(metric.rpartition(":")[0]).with_name(name)
    file.write_text(file.read_text() + "OTHER = 2\n")
    assert metric_key(metric) != before


def test_another_function_is_another_metric(metric: str) -> None:
    assert metric_key(metric) != metric_key(metric.replace(":mean", ":median"))


def test_a_metric_that_cannot_be_imported_is_named(metric: str) -> None:
    Path(metric.rpartition(":")[0]).write_text("import no_module_of_this_name\n")
    with pytest.raises(InputError, match="cannot be imported"):
        metric_key(metric)
