"""`maskplan engine` on networks of torchvision and timm that are no classifiers, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import field_nets
import pytest
from report_schema import validate_report

Cli = Callable[..., Any]

RECIPE = "[time]\nseconds = 0.01\nbatches = [1]\nwarm_up = 1\nmin_repeats = 1\n[compare]\nfixed_images = 2\n"
NAMED = "lraspp_mobilenet_v3_large"
FACTORIES = ("fcn", "deeplab", "resnet_features", "mobilenet_features", "convnext_features")


@pytest.mark.slow
@pytest.mark.parametrize("network", [NAMED, *FACTORIES])
def test_a_network_goes_to_its_engine(network: str, cli: Cli, tmp_path: Path) -> None:
    if "features" in network:
        pytest.importorskip("timm", reason="timm is not installed")
    (tmp_path / "nets.py").write_text(field_nets.SOURCE)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    model = network if network == NAMED else f"{tmp_path / 'nets.py'}:{network}"
    out = tmp_path / "out"
    recipe = ("--recipe", tmp_path / "recipe.toml", "--no-compile")
    ran = cli("engine", model, "--weights", "random", "--masks", "magnitude", *recipe, "--out", out)
    assert ran.code == 0, ran.err
    report = validate_report(out / "report.json")
    kinds = ["out:logits"] if network == NAMED else field_nets.KINDS[network]
    parity = report["parity"]
    assert [f"{o['name']}:{o['kind']}" for o in parity["by_output"]] == kinds
    # Random weights have no accuracy to keep, and are compared on noise.
    assert (parity["verdict"], parity["unlabeled_images"]) == ("not_applicable", 0)
    # Outputs of layers before the first mask are equal.
    errors = [output["relative_error"] for output in parity["by_output"]]
    assert 0 <= min(errors) <= max(errors) < 2
    assert errors[-1] > 0
    assert report["conformance"]["verdict"] == "pass"
    assert report["masks"]["masked_layers"] > 3
    assert report["engine"]["fidelity"]["max_abs_diff"] < 1e-3
