"""Engines into a Triton model repository, whose config is read with protobuf's own text parser."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from deployable import LABELS, PROVENANCE, built, contents, record
from onnx import numpy_helper
from triton_messages import kind_of, parsed

from maskplan.engines.build import BuildOptions, build_engine
from maskplan.engines.sidecar import read_engine, sidecar_path, write_sidecar
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.core.artifacts import Profile
from maskplan.pipeline.core.errors import HostError, InputError
from maskplan.pipeline.core.files import TEMPORARY_SUFFIX
from maskplan.pipeline.triton.deploy import DeployOptions, deploy
from maskplan.pipeline.triton.repository import require_deployable

# Runs `maskplan` for each model name in one process that cannot write a file of more than a hundred kilobytes.
LIMITED = """
import resource, sys
from maskplan.pipeline.cli.app import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for name in sys.argv[1:3]:
    try:
        code = main([*sys.argv[3:], "--name", name])
    except SystemExit as end:
        code = end.code
    assert code == 3, code
"""


def test_the_repository_has_tritons_layout(tmp_path: Path) -> None:
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


def test_the_deployed_engine_matches_its_sidecar_and_runs(tmp_path: Path) -> None:
    engine = built(tmp_path / "engine")
    deploy(engine, DeployOptions(tmp_path / "models", "net"))
    served = tmp_path / "models/net/1/model.onnx"
    assert dataclasses.replace(read_engine(served), path=engine) == read_engine(engine)
    session = onnxruntime.InferenceSession(served, providers=["CPUExecutionProvider"])
    assert session.run(None, {"input": np.zeros((2, 3, 8, 8), np.float32)})[0].shape == (2, 5)


def test_the_config_describes_inputs_and_outputs_without_the_batch(tmp_path: Path) -> None:
    deploy(built(tmp_path / "engine"), DeployOptions(tmp_path / "models", "net"))
    config = parsed((tmp_path / "models/net/config.pbtxt").read_text())
    assert (config.name, config.platform, config.max_batch_size) == ("net", "onnxruntime_onnx", 32)
    (image,), (logits,) = config.input, config.output
    assert (image.name, kind_of(image), list(image.dims)) == ("input", "TYPE_FP32", [3, 8, 8])
    assert (logits.name, kind_of(logits), list(logits.dims)) == ("logits", "TYPE_FP32", [5])
    assert logits.label_filename == "labels.txt"
    assert config.HasField("dynamic_batching")
    assert 0 < config.dynamic_batching.max_queue_delay_microseconds <= 10_000


def test_a_fixed_batch_is_part_of_the_dims_and_turns_off_batching(tmp_path: Path) -> None:
    deploy(built(tmp_path / "engine", batch=4), DeployOptions(tmp_path / "models", "net"))
    config = parsed((tmp_path / "models/net/config.pbtxt").read_text())
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [4, 3, 8, 8]
    assert list(config.output[0].dims) == [4, 5]
    assert not config.HasField("dynamic_batching")


def test_an_engine_with_batch_one_is_not_batched(tmp_path: Path) -> None:
    deploy(built(tmp_path / "engine", profiles=(Profile(1, 1, 1),)), DeployOptions(tmp_path / "models", "net"))
    config = parsed((tmp_path / "models/net/config.pbtxt").read_text())
    assert (config.max_batch_size, config.HasField("dynamic_batching")) == (1, False)
    assert list(config.input[0].dims) == [3, 8, 8]


def test_without_labels_there_is_no_label_file(tmp_path: Path) -> None:
    for name, made in (("ours", dataclasses.replace(PROVENANCE, labels=())), ("foreign", None)):
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


def test_each_deployment_adds_a_version_and_keeps_earlier_ones(tmp_path: Path) -> None:
    options = DeployOptions(tmp_path / "models", "net")
    first = built(tmp_path / "first")
    assert deploy(first, options).version == 1
    before = contents(tmp_path / "models/net/1")
    second = built(tmp_path / "second", dataclasses.replace(PROVENANCE, method="learned"))
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


def test_models_with_other_names_are_not_changed(tmp_path: Path) -> None:
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
    with pytest.raises(InputError, match="serves different inputs and outputs") as refused:
        deploy(built(tmp_path / "second", dataclasses.replace(PROVENANCE, labels=()), **change), options)
    assert contents(tmp_path / "models") == before
    assert sorted(p.name for p in (tmp_path / "models/net").iterdir()) == ["1", "config.pbtxt", "labels.txt"]
    assert "--name" in str(refused.value)
    assert {"classes": '"logits": TYPE_FP32 [-1, 5] becomes TYPE_FP32 [-1, 6]', "name": '"scores": none becomes'}.get(
        next(iter(change)), '"input": TYPE_FP32 [-1, 3, 8, 8] becomes TYPE_FP32 [4, 3, 8, 8]'
    ) in str(refused.value)
    assert ("TYPE_FP32 [-1, 3, 8, 8] becomes" in str(refused.value)) == ("batch" in change)


def test_a_hand_written_config_with_the_same_inputs_and_outputs_is_accepted(tmp_path: Path) -> None:
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


def test_more_profiles_and_new_labels_are_accepted(tmp_path: Path) -> None:
    """Clients send what they sent before."""
    options = DeployOptions(tmp_path / "models", "net")
    deploy(built(tmp_path / "first", dataclasses.replace(PROVENANCE, labels=())), options)
    assert deploy(built(tmp_path / "second", profiles=(Profile(1, 8, 64),)), options).version == 2
    config = parsed((tmp_path / "models/net/config.pbtxt").read_text())
    assert (config.max_batch_size, config.output[0].label_filename) == (64, "labels.txt")


def test_random_weights_are_refused_unless_allowed(tmp_path: Path) -> None:
    engine = built(tmp_path / "engine", dataclasses.replace(PROVENANCE, trained=False, origin="random, seed 0"))
    options = DeployOptions(tmp_path / "models", "net")
    with pytest.raises(InputError, match="weights are random"):
        deploy(engine, options)
    assert not (tmp_path / "models").exists()
    assert deploy(engine, dataclasses.replace(options, allow_untrained=True)).version == 1


@pytest.mark.parametrize("position", [0, 0.5, -1])
def test_a_flipped_byte_is_refused_and_writes_nothing(position: float, tmp_path: Path) -> None:
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
def test_an_invalid_model_name_is_refused(name: str, tmp_path: Path) -> None:
    engine = built(tmp_path / "engine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError):
        deploy(engine, DeployOptions(tmp_path / "models", name.replace("/absolute", str(tmp_path / "absolute"))))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_repository_that_cannot_be_created_is_a_host_error(tmp_path: Path) -> None:
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
    command = [sys.executable, "-c", LIMITED, "net", "new", "deploy", large, "--repository", tmp_path / "models"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: the disk is full") == 2, done.stderr
    assert contents(tmp_path / "models") == before
    assert sorted(p.name for p in (tmp_path / "models/net").iterdir()) == ["1", "config.pbtxt", "labels.txt"]
    # A server that finds a model's folder without a version in it does not start.
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["net"]


def test_the_label_file_has_a_line_for_each_class_whatever_the_classes_are_called(tmp_path: Path) -> None:
    labels = ("a\nb", "c\r\n", "\x1b[1m", "d\u2028e\x85", "")
    engine = built(tmp_path / "engine", dataclasses.replace(PROVENANCE, labels=labels))
    deploy(engine, DeployOptions(tmp_path / "models", "net"))
    text = (tmp_path / "models/net/labels.txt").read_text(encoding="utf-8")
    assert text.endswith("\n")
    lines = text.split("\n")[:-1]
    assert lines == text.splitlines() == ["a\\nb", "c\\x0d\\n", "\\x1b[1m", "d\\u2028e\\x85", ""]


@pytest.mark.parametrize("name", ["n" * 256, "n" * 300])
def test_a_name_longer_than_a_folder_may_have_is_refused(name: str, tmp_path: Path) -> None:
    engine = built(tmp_path / "engine")
    with pytest.raises(InputError, match="invalid name"):
        deploy(engine, DeployOptions(tmp_path / "models", name))
    deploy(engine, DeployOptions(tmp_path / "models", "n" * 240))


def test_a_path_that_is_too_long_is_an_error_of_the_repository(tmp_path: Path) -> None:
    engine = built(tmp_path / "engine")
    for repository in (tmp_path / ("r" * 300), tmp_path.joinpath(*["r" * 200] * 30)):
        with pytest.raises(HostError) as raised:
            deploy(engine, DeployOptions(repository, "net"))
        assert str(raised.value.fix).endswith("with --repository")


def test_a_temporary_link_left_behind_is_removed_and_its_target_stays(tmp_path: Path) -> None:
    engine = built(tmp_path / "engine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("kept")
    folder = tmp_path / "models" / "net"
    folder.mkdir(parents=True)
    for name, target in (("a", tmp_path / "mine"), ("b", tmp_path / "nothing"), ("c", tmp_path / "mine" / "file")):
        (folder / f".{name}.1{TEMPORARY_SUFFIX}").symlink_to(target)
    deploy(engine, DeployOptions(tmp_path / "models", "net"))
    assert (tmp_path / "mine" / "file").read_text() == "kept"
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("name", ["a/b", "", "..", ".hidden", "über", "x" * 300, "a\nb"])
def test_a_name_is_judged_before_the_work(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="invalid name"):
        require_deployable(tmp_path / "models", name)


def test_a_repository_is_judged_before_the_work_and_nothing_is_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain").write_bytes(b"")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    before = sorted(tmp_path.iterdir())
    for name in ("plain", "plain/below", "dangling", "r" * 300):
        with pytest.raises(HostError, match="cannot write") as raised:
            require_deployable(tmp_path / name, "net")
        assert str(raised.value.fix).endswith("with --repository")
    require_deployable(tmp_path, "net")
    require_deployable(tmp_path / "new" / "models", "net")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(HostError, match="cannot write"):
        require_deployable(tmp_path / "new", "net")
    assert sorted(tmp_path.iterdir()) == before
