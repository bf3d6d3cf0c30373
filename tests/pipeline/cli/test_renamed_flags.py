"""Options under their old names."""

from __future__ import annotations

import pytest

from maskplan.pipeline.cli.renamed_flags import with_new_flags


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["compare", "a", "b", "--confident"], ["compare", "a", "b", "--use-ci"]),
        (["calibrate", "m.onnx", "--rest=fp16"], ["calibrate", "m.onnx", "--float-dtype=fp16"]),
        (["calibrate", "m.onnx", "--rest", "fp16"], ["calibrate", "m.onnx", "--float-dtype", "fp16"]),
        (["mask", "m", "--method", "report"], ["mask", "m", "--method", "danhofer2024"]),
        (["mask", "m", "--method=report"], ["mask", "m", "--method=danhofer2024"]),
    ],
)
def test_old_names_become_the_new_ones_with_a_note(typed: list[str], expected: list[str]) -> None:
    renamed, notes = with_new_flags(typed)
    assert renamed == expected
    assert len(notes) == 1


def test_current_names_and_values_that_look_alike_stay() -> None:
    typed = ["check", "report", "--report", "report", "-o", "--use-ci"]
    assert with_new_flags(typed) == (typed, [])
