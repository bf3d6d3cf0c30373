"""What a repository says was deployed, however it is pointed at; and what is no repository."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from deployable import built, plan

from maskplan.engines.sidecar import read_engine
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.triton.deploy import DeployOptions, deploy
from maskplan.pipeline.triton.deployed import find_deployed, read_golden
from maskplan.pipeline.triton.golden import golden_pair
from maskplan.pipeline.triton.rollback import rollback


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A repository with two versions of a model, the second with a golden pair."""
    engine = built(tmp_path / "engine")
    for golden in (None, golden_pair(read_engine(engine))):
        deploy(engine, DeployOptions(tmp_path / "models", "net"), golden)
    return tmp_path / "models"


def test_the_newest_version_that_the_config_serves(models: Path) -> None:
    for path, model in ((models, None), (models, "net"), (models / "net", None)):
        found = find_deployed(path, model, None)
        assert (found.model, found.version, found.versions) == ("net", 2, (1, 2))
        assert found.engine == models / "net/2/model.onnx"
        assert found.golden is not None
        assert found.golden.version == 2
        np.testing.assert_array_equal(found.golden.feeds["input"], np.load(models / "net/2/golden/input.npy"))
    first = find_deployed(models, "net", 1)
    assert (first.version, first.golden) == (1, None)
    rollback(models, "net")
    assert find_deployed(models, None, None).versions == (1,)


def test_a_config_that_names_no_version_serves_the_newest(models: Path) -> None:
    config = models / "net/config.pbtxt"
    config.write_text("".join(line for line in config.read_text().splitlines(True) if "version_policy" not in line))
    assert find_deployed(models, None, None).versions == (2,)


def test_several_plans_are_no_single_engine(tmp_path: Path) -> None:
    plans = [plan(tmp_path / "a.plan"), plan(tmp_path / "b.plan", compute_capability="8.0")]
    deploy(plans, DeployOptions(tmp_path / "models", "net"))
    assert find_deployed(tmp_path / "models", None, None).engine is None


def test_what_is_missing_is_named(models: Path, tmp_path: Path) -> None:
    deploy(built(tmp_path / "other"), DeployOptions(models, "other"))
    (tmp_path / "empty").mkdir()
    for path, model, version, message in (
        (models, None, None, "several models in the repository(.|\n)*net, other"),
        (models, "third", None, "no such model in the repository"),
        (models, "../models/net", None, "invalid name"),
        (models, "net", 9, "the version was not deployed(.|\n)*serves 1, 2"),
        (tmp_path / "empty", None, None, "not a model repository"),
        (tmp_path / "nowhere", None, None, "not a model repository"),
        (models / "net/2/golden", "other", None, "the golden pair is of another model"),
        (models / "net/2/golden", None, 1, "the golden pair is of another version"),
    ):
        with pytest.raises(InputError, match=message):
            find_deployed(path, model, version)


@pytest.mark.parametrize("name", ["golden.json", "input.npy", "output.npy"])
def test_a_damaged_pair_is_refused(name: str, models: Path) -> None:
    golden = models / "net/2/golden"
    whole = (golden / name).read_bytes()
    for data in (b"", b"{}", b"[]", whole[:-3], b"\x80\x04K\x01."):
        (golden / name).write_bytes(data)
        with pytest.raises(InputError, match="the golden pair cannot be read") as raised:
            read_golden(golden)
        assert raised.value.fix is not None
    (golden / name).unlink()
    with pytest.raises(InputError, match="file not found"):
        read_golden(golden)
    if name != "golden.json":
        (golden / name).write_bytes(whole)
        about = json.loads((golden / "golden.json").read_text())
        (golden / "golden.json").write_text(json.dumps({**about, "version": "x"}))
        with pytest.raises(InputError, match="cannot be read"):
            read_golden(golden)
