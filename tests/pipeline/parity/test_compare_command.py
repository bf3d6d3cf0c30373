"""`maskplan compare`: what the gate measures reaches the report, the exit code and the error messages."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from color_models import (
    HOW,
    MADE,
    color_models,
    graph_of,
    spoilt,
    with_record,
)
from report_schema import validate_values

from maskplan.exporters.metadata import write_provenance
from maskplan.pipeline.data.dataset import open_folder, open_val
from maskplan.pipeline.data.image_sets import identify


def test_the_report_has_the_measured_numbers(cli: Callable[..., Any], toy_data: Path, tmp_path: Path) -> None:
    dense, sparse = color_models(tmp_path, MADE)
    ran = cli("compare", dense, sparse, "--data", toy_data, "--report", tmp_path / "report.json")
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["verdict"], report["images"], report["top1_dense"], report["agreement"]) == ("pass", 24, 100, 100)
    validate_values(report, "ParityReport")
    assert "100.00 dense, 100.00 sparse" in ran.out


def test_the_commands_thresholds_reach_the_gate(cli: Callable[..., Any], toy_data: Path, tmp_path: Path) -> None:
    dense, _ = color_models(tmp_path)
    wrong = graph_of(tmp_path / "wrong.onnx", np.zeros(3))
    options = ["--data", toy_data, "--max-top1-drop"]
    assert cli("compare", dense, wrong, *options, 60).code == 1
    assert cli("compare", dense, wrong, *options, 70).code == 0
    assert cli("compare", dense, wrong, *options, 70, "--min-agreement", 50).code == 1
    assert cli("compare", dense, wrong, *options, 70, "--min-agreement", 30).code == 0


def test_random_weights_fail_the_command_with_their_reason(
    cli: Callable[..., Any], toy_data: Path, tmp_path: Path
) -> None:
    dense, sparse = color_models(tmp_path, dataclasses.replace(MADE, trained=False))
    ran = cli("compare", dense, sparse, "--data", toy_data, "--report", tmp_path / "report.json")
    assert ran.code == 1
    assert "the weights are random" in ran.err
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] == "not_applicable"


def test_nan_fails_the_command_and_its_report_is_json(cli: Callable[..., Any], toy_data: Path, tmp_path: Path) -> None:
    dense, _ = color_models(tmp_path)
    bad = spoilt(tmp_path / "bad.onnx", math.nan)
    ran = cli("compare", dense, bad, "--data", toy_data, "--max-top1-drop", 100, "--report", tmp_path / "report.json")
    assert ran.code == 1
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert (report["verdict"], report["max_abs_diff"], report["cosine_min"]) == ("fail", None, None)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("shared", ["all", "one"])
def test_images_that_were_used_for_either_model_are_refused(
    side: int, shared: str, cli: Callable[..., Any], toy_data: Path, tmp_path: Path
) -> None:
    val = open_val(toy_data, (), 3)
    used = identify(val if shared == "all" else dataclasses.replace(val, indices=val.indices[7:8]))
    pair = color_models(tmp_path, MADE)
    with_record(pair[side], MADE)
    model = onnx.load(pair[side])
    del model.metadata_props[:]
    write_provenance(model, dataclasses.replace(MADE, image_sets=(dataclasses.replace(used, role="train"),)))
    pair[side].write_bytes(model.SerializeToString())
    report = tmp_path / "report.json"
    ran = cli("compare", *pair, "--data", toy_data, "--report", report)
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.startswith("error: val images were also used to make the model")
    assert not report.exists()


def test_training_images_that_are_not_compared_on_are_no_overlap(
    cli: Callable[..., Any], toy_data: Path, tmp_path: Path
) -> None:
    data = open_folder(toy_data, (), 3, seed=0)
    sets = (identify(data.train), identify(data.select))
    dense, sparse = color_models(tmp_path, dataclasses.replace(MADE, image_sets=sets))
    assert cli("compare", dense, sparse, "--data", toy_data).code == 0


def test_models_with_different_preprocessing_are_refused(
    cli: Callable[..., Any], toy_data: Path, tmp_path: Path
) -> None:
    dense, sparse = color_models(tmp_path)
    with_record(dense, MADE)
    with_record(sparse, dataclasses.replace(MADE, preprocessing=dataclasses.replace(HOW, mean=(0.5, 0.5, 0.5))))
    ran = cli("compare", dense, sparse, "--data", toy_data)
    assert ran.code == 3
    assert ran.err.startswith("error: the models need different preprocessing")
