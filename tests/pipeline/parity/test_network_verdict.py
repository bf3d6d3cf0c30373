"""The gate of networks that are not classifiers, and the user's metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.output_reports import MetricParity, OutputParity
from maskplan.pipeline.parity.by_output import NetworkComparison, OutputRows
from maskplan.pipeline.parity.network_verdict import network_report
from maskplan.pipeline.parity.options import CompareOptions
from maskplan.pipeline.parity.user_metric import load_metric, measure


def output(name: str = "y", **changed: Any) -> OutputParity:
    known: dict[str, Any] = {
        "name": name,
        "kind": "logits",
        "samples": 20,
        "relative_error": 0.1,
        "relative_error_ci95": (0.08, 0.12),
        "sqnr_db": 20.0,
        "sqnr_ci95_db": (18.0, 22.0),
        "cosine_min": 0.99,
        "max_abs_diff": 0.5,
        "agreement": 95.0,
        "agreement_ci95": (90.0, 98.0),
        "unmatched": 0,
    }
    return OutputParity(**known | changed)


def judged(
    *outputs: OutputParity, metric: MetricParity | None = None, finite: bool = True, is_noise: bool = False, **limits
):
    compared = NetworkComparison(outputs or (output(),), finite)
    return network_report(compared, metric, 20, [], CompareOptions(**limits), is_noise=is_noise)


@pytest.mark.parametrize(
    ("name", "passing", "failing", "failing_at_worst"),
    [
        ("min_sqnr_db", 20, 20.1, 19),
        ("max_relative_error", 0.1, 0.09, 0.11),
        ("min_agreement", 95, 96, 92),
        ("min_cosine", 0.99, 0.995, None),
    ],
)
def test_each_limit(name: str, passing: float, failing: float, failing_at_worst: float | None) -> None:
    assert judged(**{name: passing}).verdict == "pass"
    assert judged(**{name: failing}).verdict == "fail"
    assert judged(**{name: passing}, use_ci=True).verdict == ("pass" if failing_at_worst is None else "fail")
    if failing_at_worst is not None:
        assert judged(**{name: failing_at_worst}).verdict == "pass"
        assert judged(**{name: failing_at_worst}, use_ci=True).verdict == "fail"


def test_the_worst_output_decides() -> None:
    report = judged(output("a"), output("b", sqnr_db=12.0), output("c", sqnr_db=30.0), min_sqnr_db=15)
    assert report.verdict == "fail"
    assert report.reason is not None
    assert report.reason.startswith("b: SQNR in dB is 12")


def test_without_an_interval_nothing_passes_by_its_worse_end() -> None:
    single = output(samples=1, relative_error_ci95=None, sqnr_ci95_db=None)
    assert judged(single, min_sqnr_db=10).verdict == "pass"
    assert judged(single, min_sqnr_db=10, use_ci=True).verdict == "fail"
    metric = MetricParity("mean_ap", 1, 0.5, 0.5, 0.0, None)
    assert judged(metric=metric, max_metric_drop=0.1).verdict == "pass"
    assert judged(metric=metric, max_metric_drop=0.1, use_ci=True).verdict == "fail"


def test_equal_outputs_pass_every_limit() -> None:
    equal = output(relative_error=0.0, relative_error_ci95=(0.0, 0.0), sqnr_db=None, sqnr_ci95_db=None)
    assert judged(equal, min_sqnr_db=200, max_relative_error=0, use_ci=True).verdict == "pass"


def test_what_cannot_be_measured_fails() -> None:
    assert judged(output(sqnr_db=None, relative_error=None), min_sqnr_db=0).verdict == "fail"
    assert judged(finite=False).verdict == "fail"


def test_verdicts_that_need_more() -> None:
    assert judged().verdict == "not_applicable"
    noise = judged(min_sqnr_db=10, is_noise=True)
    assert (noise.verdict, noise.unlabeled_images) == ("not_applicable", 0)
    assert judged(min_sqnr_db=30, is_noise=True).verdict == "fail"
    # Limits that only apply to classes are named, and pass nothing.
    report = judged(max_flip_rate=1, max_class_drop=1, max_top5_drop=1)
    assert report.verdict == "not_applicable"
    assert {c.name for c in report.checks if c.passed is None} == {"max_flip_rate", "max_class_drop", "max_top5_drop"}


METRICS = """
from __future__ import annotations
from dataclasses import dataclass

import numpy as np


@dataclass
class Score:
    value: float


def mean(outputs, targets):
    return Score(-np.mean([np.abs(np.asarray(a) - t).mean() for a, t in zip(outputs["y"], targets["t"])])).value


def each(outputs, targets):
    return [-np.abs(np.asarray(a) - t).mean() for a, t in zip(outputs["y"], targets["t"])]


def rare(outputs, targets):
    return float("nan") if not (targets["t"] == 0).any() else 1.0


def nothing(outputs, targets):
    return float("nan")


def failing(outputs, targets):
    return outputs["boxes"]


def pair(outputs, targets):
    return [1.0, 2.0]
"""


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    (tmp_path / "metrics.py").write_text(METRICS)
    return tmp_path / "metrics.py"


def measured(metrics: Path, name: str, *, ragged: bool = False) -> MetricParity:
    generator = np.random.default_rng(2)
    rows = [generator.standard_normal(2 + (i % 3 if ragged else 0)) for i in range(30)]
    dense, sparse = OutputRows({"y": rows}), OutputRows({"y": [row + 0.2 for row in rows]})
    return measure(load_metric(f"{metrics}:{name}"), name, dense, sparse, {"t": np.arange(30)}, 30)


@pytest.mark.parametrize("ragged", [False, True])
def test_per_sample_and_whole_metrics_agree(metrics: Path, ragged: bool) -> None:
    whole, each = measured(metrics, "mean", ragged=ragged), measured(metrics, "each", ragged=ragged)
    assert each.drop == pytest.approx(each.dense - each.sparse)
    np.testing.assert_allclose([whole.dense, whole.sparse], [each.dense, each.sparse])
    assert whole.drop_ci95 is not None
    assert each.drop_ci95 is not None
    np.testing.assert_allclose(whole.drop_ci95, each.drop_ci95, atol=0.02)


def test_a_metric_that_some_resamples_lack_has_no_interval(metrics: Path) -> None:
    assert measured(metrics, "rare").drop_ci95 is None


@pytest.mark.parametrize(
    ("name", "message"), [("nothing", "found: nan"), ("failing", "KeyError: 'boxes'"), ("pair", "shape (2,)")]
)
def test_metrics_that_return_no_numbers(metrics: Path, name: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        measured(metrics, name)
    assert message in str(error.value)


def test_files_that_cannot_be_loaded(metrics: Path) -> None:
    (metrics.parent / "script.py").write_text("raise SystemExit(0)")
    for spec in (f"{metrics}:none", f"{metrics.parent}/no.py:mean", "metrics", f"{metrics.parent}/script.py:mean"):
        with pytest.raises(InputError, match="metric"):
            load_metric(spec)
