"""The published JSON Schema: current, valid, and strict enough to notice a changed report."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_schema import PUBLISHED, validate_report, validate_values

from maskplan.pipeline.report.schema import report_schema
from maskplan.pipeline.report.write import SCHEMA


def test_the_published_schema_is_the_generated_one(capsys: pytest.CaptureFixture[str]) -> None:
    from maskplan.pipeline.report.schema import main

    main()
    printed = capsys.readouterr().out
    update = "run: python -m maskplan.pipeline.report.schema > docs/report.schema.json"
    assert printed == PUBLISHED.read_text(), update
    assert json.loads(printed) == report_schema()


def test_a_finished_run_conforms(finished_digits: Path) -> None:
    assert validate_report(finished_digits / "report.json")["schema"] == SCHEMA


def _set(*place: str | int, value: Any) -> Callable[[Any], None]:
    def edit(values: Any) -> None:
        for key in place[:-1]:
            values = values[key]
        values[place[-1]] = value

    return edit


def _drop(*place: str) -> Callable[[Any], None]:
    def edit(values: Any) -> None:
        for key in place[:-1]:
            values = values[key]
        del values[place[-1]]

    return edit


@pytest.mark.parametrize(
    ("edit", "where"),
    [
        (_set("schema", value=1), r"\$\.schema"),
        (_set("surprise", value=1), "surprise"),
        (_set("parity", "surprise", value=1), r"\$\.parity.*surprise"),
        (_drop("timing"), "timing"),
        (_drop("parity", "top1_drop"), r"\$\.parity.*top1_drop"),
        (_set("parity", "verdict", value="maybe"), r"\$\.parity\.verdict"),
        (_set("parity", "images", value=1.5), r"\$\.parity\.images"),
        (_set("parity", "drop_ci95", value=[1.0]), r"\$\.parity\.drop_ci95"),
        (_set("parity", "drop_ci95", value=[1.0, 2.0, 3.0]), r"\$\.parity\.drop_ci95"),
        (_set("timing", "batches", 0, "speedup", value=None), r"\$\.timing\.batches\[0\]\.speedup"),
        (_set("conformance", "weights", 0, "verdict", value="fine"), r"\$\.conformance\.weights\[0\]\.verdict"),
        (_set("engine", "sparsity", "requested", value="no"), r"\$\.engine\.sparsity\.requested"),
        (_set("model", "precision", value="fp64"), r"\$\.model\.precision"),
        (_set("recipe", "learn", "epochs", value="many"), r"\$\.recipe\.learn\.epochs"),
        (_set("masks", "image_sets", 0, "sketch", value=[]), "sketch"),
        (_set("permutation", value={"reason": None}), r"\$\.permutation"),
        (_set("compile", value={"reason": None}), r"\$\.compile"),
        (_drop("compile"), "compile"),
    ],
)
def test_a_changed_key_type_or_choice_is_a_violation(
    edit: Callable[[Any], None], where: str, finished_digits: Path
) -> None:
    values = copy.deepcopy(json.loads((finished_digits / "report.json").read_text()))
    edit(values)
    with pytest.raises(AssertionError, match=where):
        validate_values(values)


def test_an_annotation_without_a_json_form_is_refused() -> None:
    from maskplan.pipeline.report.schema import _schema_of

    with pytest.raises(TypeError, match="no JSON Schema"):
        _schema_of(set[int], {})
