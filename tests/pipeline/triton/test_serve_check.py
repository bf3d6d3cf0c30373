"""`maskplan serve-check` against the real server: what was deployed, and everything that is not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from deployable import PROVENANCE, built, contents
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from served_models import engine, graph

from maskplan.engines.sidecar import read_engine
from maskplan.pipeline.core.artifacts import Profile
from maskplan.pipeline.triton.deploy import DeployOptions, deploy
from maskplan.pipeline.triton.golden import golden_pair

Cli = Callable[..., Any]
QUICK = ("--window", "0.02", "--concurrency", "1,2")


def deployed(repository: Path, folder: Path, name: str, **built_with: Any) -> Path:
    """An engine with its golden pair in a repository; the engine."""
    engine = built(folder, **built_with)
    golden = golden_pair(read_engine(engine)) if built_with.get("golden", True) else None
    deploy(engine, DeployOptions(repository, name), golden)
    return engine


@pytest.fixture
def served(triton: Any, tmp_path: Path) -> tuple[Any, str]:
    """The server, and the name of a model that it serves as deployed: of this test alone."""
    name = f"checked.{tmp_path.name}"
    deployed(triton.repository, tmp_path / "engine", name)
    triton.server.load(name)
    return triton, name


def check(cli: Cli, triton: Any, *options: object, url: str | None = None) -> Any:
    return cli("serve-check", "--url", url or triton.server.http, "--repository", triton.repository, *options)


def test_what_was_deployed_passes_with_its_latency(cli: Cli, served: tuple[Any, str], tmp_path: Path) -> None:
    triton, name = served
    files = ("--report", tmp_path / "r.json", "--junit", tmp_path / "j.xml")
    ran = check(cli, triton, "--model", name, *QUICK, *files)
    assert (ran.code, ran.err) == (0, "")
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["verdict"], report["model"], report["version"]) == ("pass", name, 1)
    assert report["server"].startswith("triton 2.")
    assert report["inputs"] == [{"name": "input", "dtype": "float32", "shape": [None, 3, 8, 8]}]
    assert {c["name"]: c["passed"] for c in report["checks"]} == {"golden": True, "failed_requests": True}
    # The largest batch stands for the preferred one, which the config does not name.
    assert [(load["batch"], load["concurrency"]) for load in report["latency"]] == [(1, 1), (1, 2), (32, 1), (32, 2)]
    for load in report["latency"]:
        assert 0 < load["p50_ms"] <= load["p90_ms"] <= load["p95_ms"] <= load["p99_ms"]
        assert load["failed"] == 0
        assert load["requests"] > 0
    suite = ElementTree.parse(tmp_path / "j.xml").getroot()
    assert {k: suite.get(k) for k in ("tests", "failures", "errors", "skipped")} == {
        **{"tests": "3", "failures": "0"},
        **{"errors": "0", "skipped": "0"},
    }
    assert ran.out.splitlines()[-1] == "pass"


def test_the_preferred_batch_is_measured(cli: Cli, triton: Any, tmp_path: Path) -> None:
    from maskplan.pipeline.triton.config import Serving

    options = DeployOptions(triton.repository, "preferred", serving=Serving(preferred_batches=(4, 8)))
    deploy(built(tmp_path / "engine"), options)
    triton.server.load("preferred")
    ran = check(cli, triton, "--model", "preferred", *QUICK, "--report", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert {load["batch"] for load in report["latency"]} == {1, 8}
    # Nothing was deployed to compare outputs with: that cannot pass.
    assert (ran.code, report["verdict"]) == (1, "not_applicable")
    assert "nothing to compare outputs with" in ran.err
    ran = check(cli, triton, "--model", "preferred", *QUICK, "--batch", "64")
    assert ran.code == 3
    assert "does not accept batches of 64" in ran.err


@pytest.mark.parametrize("where", ["model", "golden", "golden.json"])
def test_a_models_folder_or_a_golden_pair_is_enough(where: str, cli: Cli, served: tuple[Any, str]) -> None:
    triton, name = served
    folder = triton.repository / name
    path = {"model": folder, "golden": folder / "1/golden", "golden.json": folder / "1/golden/golden.json"}[where]
    ran = cli("serve-check", "--url", triton.server.http, "--repository", path, "--no-latency")
    assert (ran.code, ran.err) == (0, "")
    assert f"{name} version 1" in ran.out


def test_another_output_fails(cli: Cli, served: tuple[Any, str], tmp_path: Path) -> None:
    triton, name = served
    golden = Path(shutil.copytree(triton.repository / name / "1/golden", tmp_path / "golden"))
    output = np.load(golden / "output.npy")
    np.save(golden / "output.npy", output * np.float32(1.01))
    files = ("--report", tmp_path / "r.json", "--junit", tmp_path / "j.xml")
    options = ("--url", triton.server.http, "--repository", golden, "--no-latency")
    ran = cli("serve-check", *options, *files)
    assert ran.code == 1
    assert "golden: logits: the largest difference is 0.0099 of the largest golden value; 0.001 is allowed" in ran.err
    assert json.loads((tmp_path / "r.json").read_text())["verdict"] == "fail"
    failures = ElementTree.parse(tmp_path / "j.xml").getroot().findall("testcase/failure")
    assert len(failures) == 2  # the verdict and the check
    assert cli("serve-check", *options, "--tolerance", 0.02).code == 0
    np.save(golden / "output.npy", np.full_like(output, np.nan))
    assert cli("serve-check", *options).code == 1


def test_a_limit_on_latency_is_judged(cli: Cli, served: tuple[Any, str]) -> None:
    triton, name = served
    options = ("--model", name, *QUICK, "--batch", 1)
    assert check(cli, triton, *options, "--max-p99-ms", 60_000).code == 0
    ran = check(cli, triton, *options, "--max-p99-ms", 0.0001)
    assert ran.code == 1
    assert "max_p99_ms" in ran.err
    ran = check(cli, triton, "--model", name, "--no-latency", "--max-p99-ms", 1)
    assert (ran.code, "no latency was measured" in ran.err) == (1, True)


def test_a_server_that_has_not_taken_the_deployment_is_another(
    cli: Cli, served: tuple[Any, str], tmp_path: Path
) -> None:
    triton, name = served
    old = triton.repository / name / "1/golden"
    deployed(triton.repository, tmp_path / "next", name, profiles=(Profile(1, 1, 1),))
    ran = check(cli, triton, "--model", name, "--no-latency")
    assert (ran.code, ran.out) == (3, "")
    assert "versions 1 instead of 1, 2" in ran.err
    triton.server.load(name)
    assert check(cli, triton, "--model", name, "--no-latency").code == 0
    # The golden pair of the version before is not what clients get now, but still that of its version.
    ran = cli("serve-check", "--url", triton.server.http, "--repository", old, "--no-latency")
    assert ran.code == 3
    assert "versions 1, 2, and the golden pair is of version 1" in ran.err
    options = ("--repository", old, "--no-latency", "--version", 1)
    assert cli("serve-check", "--url", triton.server.http, *options).code == 0
    ran = cli("serve-check", "--url", triton.server.http, "--repository", old, "--version", 2)
    assert (ran.code, "the golden pair is of another version" in ran.err) == (3, True)


def test_other_shapes_are_another_model(cli: Cli, served: tuple[Any, str], tmp_path: Path) -> None:
    """A repository elsewhere has another model under the name."""
    triton, name = served
    deployed(tmp_path / "models", tmp_path / "other", name, classes=7)
    options = ("--url", triton.server.http, "--no-latency")
    ran = cli("serve-check", *options, "--repository", tmp_path / "models")
    assert ran.code == 3
    assert 'output "logits": TYPE_FP32 [-1, 5] instead of TYPE_FP32 [-1, 7]' in ran.err
    ran = cli("serve-check", *options, "--repository", tmp_path / "models" / name / "1/golden")
    assert ran.code == 3
    assert 'output "logits": TYPE_FP32 [-1, 5], and the golden pair has float32 [1, 7]' in ran.err


def test_a_model_that_is_not_served_is_named_with_those_that_are(
    cli: Cli, served: tuple[Any, str], tmp_path: Path
) -> None:
    triton, name = served
    ran = cli("serve-check", "--url", triton.server.http, "--model", "missing")
    assert (ran.code, ran.out) == (3, "")
    assert "the server does not serve missing" in ran.err
    assert "it has " in ran.err
    ran = cli("serve-check", "--url", triton.server.http, "--model", name, "--version", 7)
    assert (ran.code, "does not serve version 7" in ran.err) == (3, True)
    deployed(triton.repository, tmp_path / "idle", f"idle.{name}")
    assert check(cli, triton, "--model", f"idle.{name}").code == 3


def test_a_wrong_port_is_not_mistaken_for_a_server_without_the_model(cli: Cli, served: tuple[Any, str]) -> None:
    triton, name = served
    metrics = next(line for line in triton.server.log().splitlines() if "Started Metrics Service at" in line)
    for url in (triton.server.grpc, metrics.split()[-1].strip('"'), "127.0.0.1:1"):
        ran = check(cli, triton, "--model", name, "--no-latency", url=url)
        assert (ran.code, ran.out) == (3, "")
        wrong = "no server responds" if url == "127.0.0.1:1" else "not a Triton server, or not its HTTP port"
        assert ran.err.startswith(f"error: {wrong}")
        assert ran.err.count("error:") == 1


def test_the_gate_judges_the_served_model_on_images(cli: Cli, triton: Any, tmp_path: Path) -> None:
    """Against the deployed engine, and against another model with the same classes."""
    made = dataclasses.replace(PROVENANCE, labels=("a", "b", "c", "d", "e"))
    deployed(triton.repository, tmp_path / "engine", "judged", made=made)
    triton.server.load("judged")
    generator = np.random.default_rng(0)
    for label in made.labels:
        (tmp_path / "data/val" / label).mkdir(parents=True)
        for i in range(8):
            pixels = generator.integers(0, 255, (8, 8, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data/val" / label / f"{i}.png")
    options = ("--model", "judged", "--no-latency", "--data", tmp_path / "data", "--min-agreement", 100)
    ran = check(cli, triton, *options, "--report", tmp_path / "r.json", "--junit", tmp_path / "j.xml")
    assert ran.code == 0, ran.err
    parity = json.loads((tmp_path / "r.json").read_text())["parity"]
    assert (parity["images"], parity["agreement"], parity["top1_drop"]) == (40, 100.0, 0.0)
    assert "min_agreement 100" in (tmp_path / "j.xml").read_text()
    other = onnx.load(tmp_path / "engine/model.onnx")
    weight = numpy_helper.to_array(other.graph.initializer[0])
    other.graph.initializer[0].CopyFrom(numpy_helper.from_array(-weight, other.graph.initializer[0].name))
    onnx.save(other, tmp_path / "other.onnx")
    ran = check(cli, triton, *options, "--against", tmp_path / "other.onnx")
    assert ran.code == 1
    assert "the models agree on" in ran.err
    ran = cli("serve-check", "--url", triton.server.http, "--model", "judged", "--data", tmp_path / "data")
    assert (ran.code, "no model to compare the served one with" in ran.err) == (3, True)


def test_a_fixed_batch_is_sent_as_it_is(cli: Cli, triton: Any, tmp_path: Path) -> None:
    deployed(triton.repository, tmp_path / "engine", "fixed", batch=4)
    triton.server.load("fixed")
    ran = check(cli, triton, "--model", "fixed", *QUICK, "--report", tmp_path / "r.json")
    assert ran.code == 0, ran.err
    loads = json.loads((tmp_path / "r.json").read_text())["latency"]
    assert [(load["batch"], load["failed"]) for load in loads] == [(1, 0), (1, 0)]


@pytest.mark.parametrize("batched", [True, False])
def test_several_inputs_and_outputs_are_compared_one_by_one(
    batched: bool, cli: Cli, triton: Any, tmp_path: Path
) -> None:
    """Images, integers and one number for each image; without a batch also a scalar."""
    name, first = f"several.{batched}", ["N"] if batched else [2]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], axis=0),
        helper.make_node("Mul", ["images", "gain"], ["scaled"]),
        helper.make_node("Cast", ["scaled"], ["whole"], to=TensorProto.INT32),
        helper.make_node("ReduceMax", ["images"], ["most"], axes=[1, 2, 3], keepdims=0),
    ]
    gain = [*first, 1, 1, 1] if batched else []
    inputs = [("images", [*first, 3, 4, 4]), ("ids", [*first, 2], TensorProto.INT64), ("gain", gain)]
    outputs = [
        ("scaled", [*first, 3, 4, 4]),
        ("rows", [*first, 2, 3]),
        ("whole", [*first, 3, 4, 4], TensorProto.INT32),
        ("most", first),
    ]
    table = np.arange(6, dtype=np.float32).reshape(2, 3)
    source = read_engine(engine(graph(tmp_path / "m.onnx", nodes, inputs, outputs, table=table)))
    deploy(source.path, DeployOptions(triton.repository, name), golden_pair(source))
    triton.server.load(name)
    ran = check(cli, triton, "--model", name, *QUICK, "--report", tmp_path / "r.json")
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "r.json").read_text())
    assert {c["name"]: c["passed"] for c in report["checks"]} == {"golden": True, "failed_requests": True}
    assert [tensor["name"] for tensor in report["inputs"]] == ["images", "ids", "gain"]
    assert {tensor["name"] for tensor in report["outputs"]} == {"scaled", "rows", "whole", "most"}
    assert all(load["requests"] > 0 and not load["failed"] for load in report["latency"])
    # Another array of any output is noticed, and named.
    for number, (output, *_) in enumerate(outputs):
        golden = Path(shutil.copytree(triton.repository / name / "1/golden", tmp_path / output))
        array = np.load(golden / f"output.{number}.npy")
        np.save(golden / f"output.{number}.npy", array + np.ones_like(array))
        ran = cli("serve-check", "--url", triton.server.http, "--repository", golden, "--no-latency")
        assert ran.code == 1
        assert f"golden: {output}: the largest difference is" in ran.err


def test_nothing_is_written_to_the_repository(cli: Cli, served: tuple[Any, str]) -> None:
    triton, name = served
    before = contents(triton.repository / name)
    assert check(cli, triton, "--model", name, *QUICK, "--batch", 1).code == 0
    assert contents(triton.repository / name) == before
