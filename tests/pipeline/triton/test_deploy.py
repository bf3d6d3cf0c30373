"""Engines into a Triton model repository, whose config is read with protobuf's own text parser."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from deployable import LABELS, MADE, assert_served, built, contents, killed, plan, record
from onnx import numpy_helper
from triton_messages import kind_of, parsed

from maskplan.engines.build import BuildOptions, build_engine
from maskplan.engines.sidecar import read_engine, sidecar_path, write_sidecar
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.core.artifacts import Profile, TensorSpec
from maskplan.pipeline.core.errors import HostError, InputError
from maskplan.pipeline.triton.deploy import DeployOptions, deploy
from maskplan.pipeline.triton.repository import add_version

# Runs a command that can write no file of more than a hundred kilobytes.
LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_the_repository_is_laid_out_as_triton_wants_it(tmp_path: Path) -> None:
    engine = built(tmp_path / "engine")
    done = deploy(engine, DeployOptions(tmp_path / "models", "net"))
    assert set(contents(tmp_path / "models")) == {
        "net/config.pbtxt",
        "net/labels.txt",
        "net/1/model.onnx",
        "net/1/model.onnx.json",
    }
    assert (done.folder, done.version, done.platform) == (tmp_path / "models" / "net", 1, "onnxruntime_onnx")
    assert set(done.files) == {
        tmp_path / "models/net" / name for name in ("1/model.onnx", "config.pbtxt", "labels.txt")
    }
    assert all(path.is_file() for path in done.files)
    assert (tmp_path / "models/net/1/model.onnx").read_bytes() == engine.read_bytes()
    assert (tmp_path / "models/net/labels.txt").read_text(encoding="utf-8").splitlines() == list(LABELS)


def test_what_is_served_still_matches_its_sidecar_and_runs(tmp_path: Path) -> None:
    engine = built(tmp_path / "engine")
    deploy(engine, DeployOptions(tmp_path / "models", "net"))
    served = tmp_path / "models/net/1/model.onnx"
    assert dataclasses.replace(read_engine(served), path=engine) == read_engine(engine)
    session = onnxruntime.InferenceSession(served, providers=["CPUExecutionProvider"])
    assert session.run(None, {"input": np.zeros((2, 3, 8, 8), np.float32)})[0].shape == (2, 5)


def test_the_config_says_what_the_engine_takes_and_gives_without_the_batch(tmp_path: Path) -> None:
    deploy(built(tmp_path / "engine"), DeployOptions(tmp_path / "models", "net"))
    config = parsed((tmp_path / "models/net/config.pbtxt").read_text())
    assert (config.name, config.platform, config.max_batch_size) == ("net", "onnxruntime_onnx", 32)
    (image,), (logits,) = config.input, config.output
    assert (image.name, kind_of(image), list(image.dims)) == ("input", "TYPE_FP32", [3, 8, 8])
    assert (logits.name, kind_of(logits), list(logits.dims)) == ("logits", "TYPE_FP32", [5])
    assert logits.label_filename == "labels.txt"
    assert config.HasField("dynamic_batching")
    assert 0 < config.dynamic_batching.max_queue_delay_microseconds <= 10_000


def test_a_fixed_batch_is_part_of_the_dims_and_triton_batches_nothing(tmp_path: Path) -> None:
    deploy(built(tmp_path / "engine", batch=4), DeployOptions(tmp_path / "models", "net"))
    config = parsed((tmp_path / "models/net/config.pbtxt").read_text())
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [4, 3, 8, 8]
    assert list(config.output[0].dims) == [4, 5]
    assert not config.HasField("dynamic_batching")


def test_an_engine_for_one_image_at_a_time_is_not_batched(tmp_path: Path) -> None:
    deploy(built(tmp_path / "engine", profiles=(Profile(1, 1, 1),)), DeployOptions(tmp_path / "models", "net"))
    config = parsed((tmp_path / "models/net/config.pbtxt").read_text())
    assert (config.max_batch_size, config.HasField("dynamic_batching")) == (1, False)
    assert list(config.input[0].dims) == [3, 8, 8]


def test_without_labels_there_is_no_label_file(tmp_path: Path) -> None:
    for name, made in (("ours", dataclasses.replace(MADE, labels=())), ("foreign", None)):
        deploy(built(tmp_path / name, made), DeployOptions(tmp_path / "models", name))
        config = parsed((tmp_path / "models" / name / "config.pbtxt").read_text())
        assert config.output[0].label_filename == ""
        assert not (tmp_path / "models" / name / "labels.txt").exists()


def test_a_tensorrt_plan_is_served_as_one(tmp_path: Path) -> None:
    """Deploying needs no TensorRT: the plan is bytes, its sidecar tells the rest."""
    plan = tmp_path / "engine.plan"
    plan.write_bytes(b"ftrt and so on")
    digest = "0f8a2f4bb5bc2c9c"
    write_sidecar(record(path=plan, sha256=digest))
    with pytest.raises(InputError, match="does not match its sidecar"):
        deploy(plan, DeployOptions(tmp_path / "models", "net"))
    write_sidecar(record(path=plan, sha256=hashlib.sha256(plan.read_bytes()).hexdigest()))
    done = deploy(plan, DeployOptions(tmp_path / "models", "net"))
    assert done.platform == "tensorrt_plan"
    assert (tmp_path / "models/net/1/model.plan").read_bytes() == plan.read_bytes()
    assert parsed((tmp_path / "models/net/config.pbtxt").read_text()).platform == "tensorrt_plan"


def test_every_deployment_is_the_next_version_and_earlier_ones_stay(tmp_path: Path) -> None:
    options = DeployOptions(tmp_path / "models", "net")
    first = built(tmp_path / "first")
    assert deploy(first, options).version == 1
    before = contents(tmp_path / "models/net/1")
    second = built(tmp_path / "second", dataclasses.replace(MADE, method="learned"))
    assert deploy(second, options).version == 2
    assert contents(tmp_path / "models/net/1") == before
    assert (tmp_path / "models/net/2/model.onnx").read_bytes() == second.read_bytes()
    # Numbers are not used again, and what is no version is not counted.
    shutil.rmtree(tmp_path / "models/net/1")
    for name in ("9x", "backup", "0"):
        (tmp_path / "models/net" / name).mkdir()
    assert deploy(first, options).version == 3
    (tmp_path / "models/net/12").mkdir()
    assert deploy(first, options).version == 13


def test_only_folders_of_whole_numbers_are_versions(tmp_path: Path) -> None:
    folder = tmp_path / "models/net"
    for name in (".1x.rolled-back", ".5.rolled-back", "7 old"):
        (folder / name).mkdir(parents=True)
    (folder / "9").write_text("a file")
    assert deploy(built(tmp_path / "engine"), DeployOptions(tmp_path / "models", "net")).version == 6


def test_models_of_other_names_are_left_alone(tmp_path: Path) -> None:
    engine = built(tmp_path / "engine")
    deploy(engine, DeployOptions(tmp_path / "models", "one"))
    before = contents(tmp_path / "models/one")
    assert deploy(engine, DeployOptions(tmp_path / "models", "two")).version == 1
    assert contents(tmp_path / "models/one") == before


@pytest.mark.parametrize("change", [{"classes": 6}, {"name": "scores"}, {"batch": 4}])
def test_changed_inputs_or_outputs_under_an_old_name_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    options = DeployOptions(tmp_path / "models", "net")
    deploy(built(tmp_path / "first"), options)
    before = contents(tmp_path / "models")
    with pytest.raises(InputError, match="serves other inputs and outputs") as refused:
        deploy(built(tmp_path / "second", dataclasses.replace(MADE, labels=()), **change), options)
    assert contents(tmp_path / "models") == before
    assert sorted(p.name for p in (tmp_path / "models/net").iterdir()) == ["1", "config.pbtxt", "labels.txt"]
    assert "--name" in str(refused.value)
    assert {"classes": '"logits": TYPE_FP32 [-1, 5] becomes TYPE_FP32 [-1, 6]', "name": '"scores": none becomes'}.get(
        next(iter(change)), '"input": TYPE_FP32 [-1, 3, 8, 8] becomes TYPE_FP32 [4, 3, 8, 8]'
    ) in str(refused.value)
    assert ("TYPE_FP32 [-1, 3, 8, 8] becomes" in str(refused.value)) == ("batch" in change)


def test_the_same_inputs_and_outputs_are_known_in_another_hand(tmp_path: Path) -> None:
    """A config that somebody wrote: other order, other brackets, comments, and the batch in the dims."""
    folder = tmp_path / "models/net"
    folder.mkdir(parents=True)
    (folder / "1").mkdir()
    config = """
# ours since 2021
max_batch_size: 0
output { dims: -1 dims: 5; name: 'logits', data_type: TYPE_FP32 }
input [ < name: "inp" "ut" data_type: TYPE_FP32 dims: [-1,3,8,8] > ]
model_warmup [ { name: "zeros" inputs { key: "other" value: { data_type: TYPE_INT8 dims: 7 zero_data: true } } } ]
"""
    (folder / "config.pbtxt").write_text(config)
    assert deploy(built(tmp_path / "engine"), DeployOptions(tmp_path / "models", "net")).version == 2
    assert (folder / "2/previous-config.pbtxt").read_text() == config
    (folder / "config.pbtxt").write_text(config.replace("dims: 5", "dims: 6"))
    with pytest.raises(InputError, match=r"\[-1, 6\] becomes TYPE_FP32 \[-1, 5\]"):
        deploy(built(tmp_path / "again"), DeployOptions(tmp_path / "models", "net"))
    (folder / "config.pbtxt").write_text(config.replace("}", "", 1))
    with pytest.raises(InputError, match="config cannot be read"):
        deploy(built(tmp_path / "again"), DeployOptions(tmp_path / "models", "net"))


def test_more_profiles_and_new_labels_are_no_change_of_inputs_or_outputs(tmp_path: Path) -> None:
    """Clients send what they sent before."""
    options = DeployOptions(tmp_path / "models", "net")
    deploy(built(tmp_path / "first", dataclasses.replace(MADE, labels=())), options)
    assert deploy(built(tmp_path / "second", profiles=(Profile(1, 8, 64),)), options).version == 2
    config = parsed((tmp_path / "models/net/config.pbtxt").read_text())
    assert (config.max_batch_size, config.output[0].label_filename) == (64, "labels.txt")


def test_random_weights_are_refused_unless_allowed(tmp_path: Path) -> None:
    engine = built(tmp_path / "engine", dataclasses.replace(MADE, trained=False, origin="random, seed 0"))
    options = DeployOptions(tmp_path / "models", "net")
    with pytest.raises(InputError, match="weights are random"):
        deploy(engine, options)
    assert not (tmp_path / "models").exists()
    assert deploy(engine, dataclasses.replace(options, allow_untrained=True)).version == 1


@pytest.mark.parametrize("position", [0, 0.5, -1])
def test_a_flipped_byte_is_refused_and_leaves_nothing(position: float, tmp_path: Path) -> None:
    engine = built(tmp_path / "engine")
    data = bytearray(engine.read_bytes())
    data[int(position * len(data)) if position > 0 else int(position)] ^= 0x40
    engine.write_bytes(data)
    with pytest.raises(InputError, match="does not match its sidecar"):
        deploy(engine, DeployOptions(tmp_path / "models", "net"))
    assert not (tmp_path / "models").exists()


def test_an_engine_without_its_sidecar_is_refused(tmp_path: Path) -> None:
    engine = built(tmp_path / "engine")
    sidecar_path(engine).unlink()
    with pytest.raises(InputError, match="no sidecar"):
        deploy(engine, DeployOptions(tmp_path / "models", "net"))
    with pytest.raises(InputError, match="engine not found"):
        deploy(tmp_path / "none.onnx", DeployOptions(tmp_path / "models", "net"))
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("name", ["../outside", "a/b", "/absolute", "..", ".", "", 'quo"te', "line\nbreak"])
def test_a_name_that_is_no_folder_of_the_repository_is_refused(name: str, tmp_path: Path) -> None:
    engine = built(tmp_path / "engine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError):
        deploy(engine, DeployOptions(tmp_path / "models", name.replace("/absolute", str(tmp_path / "absolute"))))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_repository_that_cannot_be_made_is_a_host_error(tmp_path: Path) -> None:
    engine = built(tmp_path / "engine")
    (tmp_path / "models").write_text("a file in the way")
    with pytest.raises(HostError):
        deploy(engine, DeployOptions(tmp_path / "models", "net"))
    assert (tmp_path / "models").read_text() == "a file in the way"


def test_a_disk_that_fills_up_leaves_no_part_of_a_version(tmp_path: Path) -> None:
    """Files may grow to a hundred kilobytes, and the engine is larger."""
    small, large = built(tmp_path / "small"), tmp_path / "large" / "engine.onnx"
    deploy(small, DeployOptions(tmp_path / "models", "net"))
    before = contents(tmp_path / "models")
    large.parent.mkdir()
    model = onnx.load(small)
    model.graph.initializer.append(numpy_helper.from_array(np.ones(100_000, np.float32), "ballast"))
    (tmp_path / "large.onnx").write_bytes(model.SerializeToString())
    build_engine(describe_onnx(tmp_path / "large.onnx"), BuildOptions("onnxruntime"), large)
    command = [sys.executable, "-m", "maskplan.pipeline", "deploy", large, "--repository", tmp_path / "models"]
    for name in ("net", "new"):
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, *command, "--name", name], capture_output=True, text=True, check=False
        )
        assert done.returncode == 3, done.stderr
        assert done.stderr.startswith("error: the disk is full")
        assert contents(tmp_path / "models") == before
        assert sorted(p.name for p in (tmp_path / "models/net").iterdir()) == ["1", "config.pbtxt", "labels.txt"]
    # A server that finds a model's folder without a version in it does not start.
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["net"]


def test_the_command_names_the_model_after_itself(cli: Callable[..., Any], tmp_path: Path) -> None:
    ours, foreign = built(tmp_path / "ours"), built(tmp_path / "foreign", None)
    for engine, name in ((ours, "folder_less"), (foreign, "engine")):
        ran = cli("deploy", engine, "--repository", tmp_path / "models")
        assert ran.code == 0, ran.err
        assert "version 1, onnxruntime_onnx" in ran.out
        assert parsed((tmp_path / "models" / name / "config.pbtxt").read_text()).name == name


def test_the_command_refuses_random_weights_with_a_hint(cli: Callable[..., Any], tmp_path: Path) -> None:
    engine = built(tmp_path / "engine", dataclasses.replace(MADE, trained=False, origin="random, seed 0"))
    ran = cli("deploy", engine, "--repository", tmp_path / "models")
    assert (ran.code, ran.out) == (3, "")
    assert "--allow-untrained" in ran.err
    assert not (tmp_path / "models").exists()
    assert cli("deploy", engine, "--repository", tmp_path / "models", "--allow-untrained").code == 0
    stored = json.loads((tmp_path / "models/folder_less/1/model.onnx.json").read_text())
    assert stored["provenance"]["trained"] is False


# --- several plans


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


def test_a_plan_alone_is_for_any_gpu_that_takes_it(tmp_path: Path) -> None:
    deploy([plan(tmp_path / "a.plan", compute_capability=None)], DeployOptions(tmp_path / "models", "net"))
    assert not parsed((tmp_path / "models/net/config.pbtxt").read_text()).cc_model_filenames


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"onnx_sha256": "1" * 64}, "of another ONNX file, sha256 111111111111"),
        ({"runtime_version": "10.4.0"}, "of TensorRT 10.4.0, not 10.3.0"),
        ({"inputs": (TensorSpec("input", "float16", (None, 3, 8, 8)),)}, "other inputs or outputs"),
        ({"outputs": (TensorSpec("logits", "float32", (None, 6)),)}, "other inputs or outputs"),
        ({"profiles": (Profile(1, 8, 8),)}, "profiles 1:8:8"),
        ({"compute_capability": None}, "compute capability None"),
        ({"compute_capability": "../8"}, "compute capability ../8"),
        ({"compute_capability": "9.0"}, "not the only one for compute capability 9.0"),
        ({"backend": "onnxruntime"}, "for onnxruntime"),
    ],
)
def test_plans_that_are_not_of_one_model_are_refused_by_name(
    changed: dict[str, Any], says: str, tmp_path: Path
) -> None:
    one, other, third = (tmp_path / f"{name}.plan" for name in ("one", "other", "third"))
    plans = [plan(one), plan(other, **{"compute_capability": "8.0", **changed})]
    plans.append(plan(third, **{"compute_capability": "8.6", **changed}))
    with pytest.raises(InputError, match="not plans of one model") as refused:
        deploy(plans, DeployOptions(tmp_path / "models", "net"))
    for path in (other, third):
        (line,) = [line for line in str(refused.value).splitlines() if str(path) in line]
        assert says in line
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
    random = dataclasses.replace(MADE, trained=False, origin="random, seed 0")
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


# --- which versions are served


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


def test_other_profiles_of_onnx_runtime_are_no_reason_against_an_earlier_version(tmp_path: Path) -> None:
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
        deploy(built(tmp_path / "engine", dataclasses.replace(MADE, labels=labels)), options)
        name = parsed((folder / "config.pbtxt").read_text()).output[0].label_filename
        assert (folder / name).read_text(encoding="utf-8").splitlines() == list(labels)
        named.append(name)
    assert named == ["labels.txt", "labels.2.txt", "labels.txt", "labels.4.txt"]


# --- interrupted, or two at once


def test_a_deployment_killed_at_any_moment_leaves_the_old_version_served_or_the_new(tmp_path: Path) -> None:
    options = DeployOptions(tmp_path / "base", "net")
    deploy(built(tmp_path / "first"), options)
    second = built(tmp_path / "second", dataclasses.replace(MADE, labels=("v", "w", "x", "y", "z")))
    copies = killed(
        tmp_path / "base",
        tmp_path / "copies",
        "from maskplan.pipeline.triton.deploy import DeployOptions, deploy",
        f"deploy(Path({str(second)!r}), DeployOptions(models, 'net'))",
    )
    served = []
    for models in copies:
        served.append(assert_served(models / "net"))
        if served[-1] == (1,):
            assert {n: d for n, d in contents(models).items() if n in contents(tmp_path / "base")} == contents(
                tmp_path / "base"
            )
        version = deploy(second, dataclasses.replace(options, repository=models)).version
        assert assert_served(models / "net") == (version,)
        assert not list(models.rglob("*.maskplan-tmp"))
    assert served == sorted(served)
    assert served[0] == (1,)
    assert served[-1] == (2,)
    # A folder, four files, two renames and what tidying up removes.
    assert len(served) > 8


def test_two_deployments_at_once_both_arrive_or_say_so(tmp_path: Path) -> None:
    engine, options = built(tmp_path / "engine"), DeployOptions(tmp_path / "models", "net")
    deploy(engine, options)
    versions: list[int] = []
    told: list[str] = []

    def run() -> None:
        try:
            versions.append(deploy(engine, options).version)
        except HostError as error:
            told.append(error.what)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(versions) == list(range(2, 2 + len(versions)))
    assert len(versions) + len(told) == 8
    assert set(told) <= {"another deployment is writing to the model"}
    assert {p.name for p in (tmp_path / "models/net").iterdir()} == {
        "config.pbtxt",
        "labels.txt",
        *map(str, range(1, 2 + len(versions))),
    }


def test_a_folder_that_another_process_holds_is_left_alone(tmp_path: Path) -> None:
    engine, options = built(tmp_path / "engine"), DeployOptions(tmp_path / "models", "net")
    deploy(engine, options)
    before = contents(tmp_path / "models")
    holds = (
        "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX); print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holds, tmp_path / "models/net"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(HostError, match="another deployment is writing"):
            deploy(engine, options)
        assert contents(tmp_path / "models") == before
        process.communicate(b"\n")
    assert deploy(engine, options).version == 2


def test_a_version_that_came_from_elsewhere_meanwhile_is_left_alone(tmp_path: Path) -> None:
    """Where a file system has no locks, the folder's name tells."""
    (tmp_path / "net/1").mkdir(parents=True)
    (tmp_path / "net/1/model.plan").write_bytes(b"theirs")
    with pytest.raises(HostError, match="another deployment is writing") as caught:
        add_version(tmp_path / "net", 1, {}, {"model.plan": b"ours"})
    assert "version 1 came from elsewhere meanwhile" in str(caught.value)
    assert contents(tmp_path / "net") == {"1/model.plan": b"theirs"}
    with pytest.raises(HostError, match="cannot write"):
        add_version(tmp_path / "gone", 1, {}, {"model.plan": b"ours"})
    assert not (tmp_path / "gone").exists()


def test_a_file_system_without_locks_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    assert deploy(built(tmp_path / "engine"), DeployOptions(tmp_path / "models", "net")).version == 1


def test_a_folder_that_was_there_and_empty_stays(tmp_path: Path) -> None:
    (tmp_path / "models/net").mkdir(parents=True)
    golden = (np.zeros(1, np.float32), np.zeros(1, np.float32))
    with pytest.raises(InputError, match="golden"):
        deploy(built(tmp_path / "engine"), DeployOptions(tmp_path / "models", "net"), golden)
    assert (tmp_path / "models/net").is_dir()


# --- the command


def test_the_command_passes_its_options_on(cli: Callable[..., Any], tmp_path: Path) -> None:
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


def test_the_command_makes_a_golden_pair_where_the_engine_runs(cli: Callable[..., Any], tmp_path: Path) -> None:
    engine = built(tmp_path / "engine")
    ran = cli("deploy", engine, "--repository", tmp_path / "models", "--name", "net")
    assert "smoke.py" in ran.out
    golden = tmp_path / "models/net/1/golden"
    assert sorted(p.name for p in golden.iterdir()) == ["golden.json", "input.npy", "output.npy", "smoke.py"]
    session = onnxruntime.InferenceSession(engine, providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {"input": np.load(golden / "input.npy")})
    np.testing.assert_allclose(np.load(golden / "output.npy"), wanted, rtol=1e-6)


def test_the_command_says_why_there_is_no_golden_pair(cli: Callable[..., Any], tmp_path: Path) -> None:
    """A plan that is no plan runs nowhere, with TensorRT or without."""
    ran = cli("deploy", plan(tmp_path / "a.plan"), "--repository", tmp_path / "models", "--name", "net")
    assert ran.code == 0, ran.err
    assert "note: without a golden input and output: " in ran.out
    assert not (tmp_path / "models/net/1/golden").exists()


def test_the_command_tells_how_to_serve_a_version_compatible_plan(cli: Callable[..., Any], tmp_path: Path) -> None:
    for name, compatible in (("a", False), ("b", True)):
        ran = cli("deploy", plan(tmp_path / name, version_compatible=compatible), "--repository", tmp_path / "models")
        assert ran.code == 0, ran.err
        assert ("--backend-config=tensorrt,version-compatible=true" in ran.out) is compatible


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Missing option"),
        (["--repository", "models"], "Missing argument 'ENGINE'"),
        (["--repository", "models", "--rollback"], "--rollback takes"),
        (["engine.onnx", "--repository", "models", "--rollback", "--name", "net"], "--rollback takes"),
        (["engine.onnx", "--repository", "models", "--keep-versions", "0"], "--keep-versions"),
        (["engine.onnx", "--repository", "models", "--queue-delay-us", "-1"], "--queue-delay-us"),
    ],
)
def test_wrong_usage_of_the_command_ends_with_2(arguments: list[str], says: str, cli: Callable[..., Any]) -> None:
    ran = cli("deploy", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert says in ran.err
