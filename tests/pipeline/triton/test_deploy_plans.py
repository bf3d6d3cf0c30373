"""Several plans of one model in one version, and the versions that are served at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deployable import LABELS, PROVENANCE, assert_served, built, plan
from triton_messages import parsed

from maskplan.engines.sidecar import read_engine
from maskplan.pipeline.core.artifacts import Profile, TensorSpec
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.triton.deploy import DeployOptions, deploy


def test_plans_for_several_gpus_share_a_version(tmp_path: Path) -> None:
    plans = [plan(tmp_path / f"{c}.plan", compute_capability=c) for c in ("9.0", "8.0", "12.0")]
    done = deploy(plans, DeployOptions(tmp_path / "models", "net"))
    names = ["model_9_0.plan", "model_8_0.plan", "model_12_0.plan"]
    folder = tmp_path / "models/net/1"
    assert sorted(p.name for p in folder.iterdir()) == sorted([*names, *(f"{name}.json" for name in names)])
    assert [(folder / name).read_bytes() for name in names] == [path.read_bytes() for path in plans]
    assert [read_engine(folder / name).compute_capability for name in names] == ["9.0", "8.0", "12.0"]
    config = parsed((tmp_path / "models/net/config.pbtxt").read_text())
    assert dict(config.cc_model_filenames) == dict(zip(("9.0", "8.0", "12.0"), names, strict=True))
    assert set(done.files) >= {folder / name for name in names}


def test_a_single_plan_serves_any_gpu(tmp_path: Path) -> None:
    deploy([plan(tmp_path / "a.plan", compute_capability=None)], DeployOptions(tmp_path / "models", "net"))
    assert not parsed((tmp_path / "models/net/config.pbtxt").read_text()).cc_model_filenames


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"onnx_sha256": "1" * 64}, "of another ONNX file, sha256 111111111111"),
        ({"runtime_version": "10.4.0"}, "of TensorRT 10.4.0, not 10.3.0"),
        ({"inputs": (TensorSpec("input", "float16", (None, 3, 8, 8)),)}, "different inputs or outputs"),
        ({"outputs": (TensorSpec("logits", "float32", (None, 6)),)}, "different inputs or outputs"),
        ({"profiles": (Profile(1, 8, 8),)}, "profiles 1:8:8"),
        ({"compute_capability": None}, "compute capability None"),
        ({"compute_capability": "../8"}, "compute capability ../8"),
        ({"compute_capability": "9.0"}, "not the only one for compute capability 9.0"),
        ({"backend": "onnxruntime"}, "for onnxruntime"),
    ],
)
def test_plans_that_are_not_of_one_model_are_refused_by_name(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    one, other, third = (tmp_path / f"{name}.plan" for name in ("one", "other", "third"))
    plans = [plan(one), plan(other, **{"compute_capability": "8.0", **changed})]
    plans.append(plan(third, **{"compute_capability": "8.6", **changed}))
    with pytest.raises(InputError, match="not plans of one model") as refused:
        deploy(plans, DeployOptions(tmp_path / "models", "net"))
    for path in (other, third):
        (line,) = [line for line in str(refused.value).splitlines() if str(path) in line]
        assert message in line
    assert (f"{one}: not the only" in str(refused.value)) is (changed == {"compute_capability": "9.0"})
    assert not (tmp_path / "models").exists()


def test_a_single_plan_of_an_unknown_capability_among_others_is_refused(tmp_path: Path) -> None:
    """Triton would look for a file by a name that no GPU has."""
    plans = [plan(tmp_path / "a.plan"), plan(tmp_path / "b.plan", compute_capability=None)]
    with pytest.raises(InputError, match=r"b\.plan: compute capability None"):
        deploy(plans, DeployOptions(tmp_path / "models", "net"))


def test_no_engine_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no engine to deploy"):
        deploy([], DeployOptions(tmp_path / "models", "net"))
    assert not (tmp_path / "models").exists()


def test_one_random_plan_among_others_is_refused(tmp_path: Path) -> None:
    random = dataclasses.replace(PROVENANCE, trained=False, origin="random, seed 0")
    plans = [plan(tmp_path / "a.plan"), plan(tmp_path / "b.plan", compute_capability="8.0", provenance=random)]
    with pytest.raises(InputError, match=r"weights are random(.|\n)*b\.plan"):
        deploy(plans, DeployOptions(tmp_path / "models", "net"))


def test_a_plan_without_weights_is_refused(cli: Callable[..., Any], tmp_path: Path) -> None:
    """Triton loads a plan as it is; one that merely can be refitted has its weights."""
    plans = [plan(tmp_path / "a.plan"), plan(tmp_path / "b.plan", compute_capability="8.0", strip_plan=True)]
    with pytest.raises(InputError, match=r"stripped of its weights(.|\n)*where: \S*b\.plan\n") as refused:
        deploy(plans, DeployOptions(tmp_path / "models", "net"))
    assert "--strip-plan" in str(refused.value)
    ran = cli("deploy", plans[1], "--repository", tmp_path / "models")
    assert (ran.code, ran.out) == (3, "")
    assert not (tmp_path / "models").exists()
    whole = plan(tmp_path / "c.plan", refittable=True)
    assert deploy(whole, DeployOptions(tmp_path / "models", "net")).version == 1


def test_the_config_names_the_new_version_alone_or_with_its_predecessors(tmp_path: Path) -> None:
    engine, options = built(tmp_path / "engine"), DeployOptions(tmp_path / "models", "net")
    for keep, served in ((1, (1,)), (2, (1, 2)), (1, (3,)), (3, (2, 3, 4)), (9, (1, 2, 3, 4, 5))):
        deploy(engine, dataclasses.replace(options, keep_versions=keep))
        assert assert_served(tmp_path / "models/net") == served
    with pytest.raises(InputError, match="keep_versions is 0"):
        dataclasses.replace(options, keep_versions=0)


def test_versions_that_one_config_cannot_serve_are_not_kept(tmp_path: Path) -> None:
    options = DeployOptions(tmp_path / "models", "net", keep_versions=2)
    deploy(plan(tmp_path / "a.plan"), options)
    both = [plan(tmp_path / "b.plan"), plan(tmp_path / "c.plan", compute_capability="8.0")]
    with pytest.raises(InputError, match=r"version 1 has no model_9_0\.plan, version 1 has no model_8_0\.plan"):
        deploy(both, options)
    with pytest.raises(InputError, match="version 1 has other profiles"):
        deploy(plan(tmp_path / "d.plan", profiles=(Profile(1, 8, 32),)), options)
    assert deploy(both, dataclasses.replace(options, keep_versions=1)).version == 2


def test_onnx_runtime_versions_with_other_profiles_are_kept(tmp_path: Path) -> None:
    """It takes any batch."""
    options = DeployOptions(tmp_path / "models", "net", keep_versions=2)
    deploy(built(tmp_path / "a"), options)
    deploy(built(tmp_path / "b", profiles=(Profile(1, 8, 64),)), options)
    assert assert_served(tmp_path / "models/net") == (1, 2)


def test_labels_that_are_served_are_not_overwritten(tmp_path: Path) -> None:
    options = DeployOptions(tmp_path / "models", "net")
    folder = tmp_path / "models/net"
    named = []
    for labels in (LABELS, LABELS[::-1], LABELS, ("a", "b", "c", "d", "e")):
        deploy(built(tmp_path / "engine", dataclasses.replace(PROVENANCE, labels=labels)), options)
        name = parsed((folder / "config.pbtxt").read_text()).output[0].label_filename
        assert (folder / name).read_text(encoding="utf-8").splitlines() == list(labels)
        named.append(name)
    assert named == ["labels.txt", "labels.2.txt", "labels.txt", "labels.4.txt"]
