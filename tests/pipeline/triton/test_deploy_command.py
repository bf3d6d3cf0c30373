"""`maskplan deploy`: options, golden pair, notes and wrong usage."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from deployable import PROVENANCE, built, plan
from triton_messages import parsed


def test_the_command_names_the_model_after_the_checkpoint_or_the_file(cli: Callable[..., Any], tmp_path: Path) -> None:
    ours, foreign = built(tmp_path / "ours"), built(tmp_path / "foreign", None)
    for engine, name in ((ours, "folder_less"), (foreign, "engine")):
        ran = cli("deploy", engine, "--repository", tmp_path / "models")
        assert ran.code == 0, ran.err
        assert "version 1, onnxruntime_onnx" in ran.out
        assert parsed((tmp_path / "models" / name / "config.pbtxt").read_text()).name == name


def test_the_command_refuses_random_weights_with_a_hint(cli: Callable[..., Any], tmp_path: Path) -> None:
    engine = built(tmp_path / "engine", dataclasses.replace(PROVENANCE, trained=False, origin="random, seed 0"))
    ran = cli("deploy", engine, "--repository", tmp_path / "models")
    assert (ran.code, ran.out) == (3, "")
    assert "--allow-untrained" in ran.err
    assert not (tmp_path / "models").exists()
    assert cli("deploy", engine, "--repository", tmp_path / "models", "--allow-untrained").code == 0
    stored = json.loads((tmp_path / "models/folder_less/1/model.onnx.json").read_text())
    assert stored["provenance"]["trained"] is False


def test_the_command_passes_its_options_to_the_config(cli: Callable[..., Any], tmp_path: Path) -> None:
    plans = [plan(tmp_path / "a.plan"), plan(tmp_path / "b.plan", compute_capability="8.0")]
    options = ["--repository", tmp_path / "models", "--name", "net", "--queue-delay-us", 250, "--instances", 2]
    options += ["--preferred-batch", 8, "--preferred-batch", 4, "--no-cuda-graphs", "--no-warmup"]
    ran = cli("deploy", *plans, *options)
    assert ran.code == 0, ran.err
    config = parsed((tmp_path / "models/net/config.pbtxt").read_text())
    batching = config.dynamic_batching
    assert (batching.max_queue_delay_microseconds, list(batching.preferred_batch_size)) == (250, [4, 8])
    assert config.instance_group[0].count == 2
    assert not config.optimization.cuda.graphs
    assert not config.model_warmup
    assert len(config.cc_model_filenames) == 2
    ran = cli("deploy", *plans, *options, "--keep-versions", 2, "--cuda-graphs", "--warmup")
    assert ran.code == 0, ran.err
    config = parsed((tmp_path / "models/net/config.pbtxt").read_text())
    assert list(config.version_policy.specific.versions) == [1, 2]
    assert config.optimization.cuda.graphs
    assert config.model_warmup


def test_the_command_creates_a_golden_pair_if_the_engine_runs(cli: Callable[..., Any], tmp_path: Path) -> None:
    engine = built(tmp_path / "engine")
    ran = cli("deploy", engine, "--repository", tmp_path / "models", "--name", "net")
    assert "try it: maskplan serve-check --url localhost:8000" in ran.out
    golden = tmp_path / "models/net/1/golden"
    assert sorted(p.name for p in golden.iterdir()) == ["golden.json", "input.npy", "output.npy"]
    session = onnxruntime.InferenceSession(engine, providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {"input": np.load(golden / "input.npy")})
    np.testing.assert_allclose(np.load(golden / "output.npy"), wanted, rtol=1e-6)


def test_the_command_reports_why_there_is_no_golden_pair(cli: Callable[..., Any], tmp_path: Path) -> None:
    """A plan that is no plan runs nowhere, with TensorRT or without."""
    ran = cli("deploy", plan(tmp_path / "a.plan"), "--repository", tmp_path / "models", "--name", "net")
    assert ran.code == 0, ran.err
    assert "note: without a golden input and output: " in ran.out
    assert not (tmp_path / "models/net/1/golden").exists()


def test_the_command_explains_how_to_serve_a_version_compatible_plan(cli: Callable[..., Any], tmp_path: Path) -> None:
    for name, compatible in (("a", False), ("b", True)):
        ran = cli("deploy", plan(tmp_path / name, version_compatible=compatible), "--repository", tmp_path / "models")
        assert ran.code == 0, ran.err
        assert ("--backend-config=tensorrt,version-compatible=true" in ran.out) is compatible


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option"),
        (["--repository", "models"], "Missing argument 'ENGINE'"),
        (["--repository", "models", "--rollback"], "--rollback takes"),
        (["engine.onnx", "--repository", "models", "--rollback", "--name", "net"], "--rollback takes"),
        (["engine.onnx", "--repository", "models", "--keep-versions", "0"], "--keep-versions"),
        (["engine.onnx", "--repository", "models", "--queue-delay-us", "-1"], "--queue-delay-us"),
    ],
)
def test_wrong_usage_of_the_command_ends_with_2(arguments: list[str], message: str, cli: Callable[..., Any]) -> None:
    ran = cli("deploy", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err


def test_the_printed_command_can_be_pasted_whatever_the_folder_is_called(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    repository = tmp_path / "my models; echo $(x)"
    ran = cli("deploy", built(tmp_path / "engine"), "--repository", repository)
    assert ran.code == 0, ran.err
    (line,) = [line for line in ran.out.splitlines() if line.startswith("try it: ")]
    assert shlex.split(line.removeprefix("try it: ")) == [
        *["maskplan", "serve-check", "--url", "localhost:8000"],
        *["--repository", str(repository), "--model", "folder_less"],
    ]
