"""Engines into a Triton model repository, whose config is read with protobuf's own text parser."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from onnx import TensorProto, helper, numpy_helper

from engines.build import BuildOptions, build_engine
from engines.sidecar import read_engine, sidecar_path, write_sidecar
from exporters.metadata import describe_onnx, write_provenance
from pipeline.artifacts import EngineFile, Preprocessing, Profile, Provenance, TensorSpec
from pipeline.deploy import DeployOptions, config_text, deploy
from pipeline.errors import HostError, InputError

HOW = Preprocessing(3, 8, 8, 0, "bilinear", (0.0,) * 3, (1.0,) * 3)
LABELS = ("blue", "green", "red", "grün-ish", "5")
MADE = Provenance("folder_less", True, "weights.pth", "0" * 64, 5, LABELS, HOW)


# Runs a command that can write no file of more than a hundred kilobytes.
LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
os.execv(sys.argv[1], sys.argv[1:])
"""


def model_config() -> Any:
    """The part of Triton's model_config.proto that a deployment of ours may use; other fields do not parse."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    types = file.enum_type.add(name="DataType")
    names = ["INVALID", "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"]
    for number, name in enumerate([*names, "FP16", "FP32", "FP64", "STRING", "BF16"]):
        types.value.add(name=f"TYPE_{name}", number=number)

    def message(name: str, fields: dict[str, tuple[int, Any, bool, str]]) -> None:
        made = file.message_type.add(name=name)
        for key, (number, kind, repeated, of) in fields.items():
            label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            made.field.add(name=key, number=number, type=kind, label=label, type_name=of or None)

    text, whole = (field.TYPE_STRING, False, ""), (field.TYPE_INT64, True, "")
    kind = (field.TYPE_ENUM, False, ".inference.DataType")
    message("ModelInput", {"name": (1, *text), "data_type": (2, *kind), "dims": (4, *whole)})
    message(
        "ModelOutput", {"name": (1, *text), "data_type": (2, *kind), "dims": (3, *whole), "label_filename": (4, *text)}
    )
    message(
        "ModelDynamicBatching",
        {
            "preferred_batch_size": (1, field.TYPE_INT32, True, ""),
            "max_queue_delay_microseconds": (2, field.TYPE_UINT64, False, ""),
        },
    )
    message(
        "ModelConfig",
        {
            "name": (1, *text),
            "platform": (2, *text),
            "max_batch_size": (4, field.TYPE_INT32, False, ""),
            "input": (5, field.TYPE_MESSAGE, True, ".inference.ModelInput"),
            "output": (6, field.TYPE_MESSAGE, True, ".inference.ModelOutput"),
            "dynamic_batching": (11, field.TYPE_MESSAGE, False, ".inference.ModelDynamicBatching"),
        },
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))()


def parsed(text: str) -> Any:
    return text_format.Parse(text, model_config())


def kind_of(tensor: Any) -> str:
    return tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name


def source(
    path: Path, made: Provenance | None = MADE, *, batch: int | str = "batch", classes: int = 5, name: str = "logits"
) -> Path:
    weight = np.random.default_rng(classes).normal(size=(192, classes)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["input"], ["f"]), helper.make_node("MatMul", ["f", "w"], [name])],
        "net",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, classes])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if made is not None:
        write_provenance(model, made)
    path.write_bytes(model.SerializeToString())
    return path


def built(
    folder: Path,
    made: Provenance | None = MADE,
    profiles: tuple[Profile, ...] = (Profile(1, 1, 1), Profile(1, 8, 32)),
    **shape: Any,
) -> Path:
    """An engine with its sidecar."""
    folder.mkdir(exist_ok=True)
    options = BuildOptions("onnxruntime", profiles)
    return build_engine(
        describe_onnx(source(folder / "model.onnx", made, **shape)), options, folder / "engine.onnx"
    ).path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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


def record(**changed: Any) -> EngineFile:
    values: dict[str, Any] = {
        "path": Path("engine.plan"),
        "sha256": "0" * 64,
        "bytes": 1,
        "backend": "tensorrt",
        "precision": "fp16",
        "runtime_version": "10.3.0",
        "device": "GPU",
        "compute_capability": "9.0",
        "device_memory_bytes": None,
        "sparse_weights": True,
        "typing": "strong",
        "profiles": (Profile(1, 8, 16),),
        "inputs": (TensorSpec("input", "float32", (None, 3, 8, 8)),),
        "outputs": (TensorSpec("logits", "float32", (None, 5)),),
        "onnx_sha256": "0" * 64,
        "build_s": 1.0,
        "provenance": MADE,
    }
    return EngineFile(**{**values, **changed})


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("float16", "TYPE_FP16"),
        ("float32", "TYPE_FP32"),
        ("float64", "TYPE_FP64"),
        ("bfloat16", "TYPE_BF16"),
        ("int8", "TYPE_INT8"),
        ("uint8", "TYPE_UINT8"),
        ("int32", "TYPE_INT32"),
        ("int64", "TYPE_INT64"),
        ("bool", "TYPE_BOOL"),
    ],
)
def test_types_have_tritons_names(dtype: str, name: str) -> None:
    engine = record(inputs=(TensorSpec("input", dtype, (None, 3)),), outputs=(TensorSpec("y", dtype, (None, 5)),))
    config = parsed(config_text(engine, "net", "tensorrt_plan"))
    assert {kind_of(t) for t in (*config.input, *config.output)} == {name}


def test_a_type_that_triton_lacks_is_refused() -> None:
    with pytest.raises(InputError, match="Triton has no such type"):
        config_text(record(outputs=(TensorSpec("y", "complex64", (None, 5)),)), "net", "tensorrt_plan")


def test_several_inputs_and_inner_dynamic_axes_are_told() -> None:
    engine = record(
        inputs=(TensorSpec("image", "float16", (None, 3, None, None)), TensorSpec("gain", "float32", (None, 1))),
        outputs=(TensorSpec("logits", "float32", (None, 5)), TensorSpec("features", "float16", (None, 7))),
    )
    config = parsed(config_text(engine, "net", "tensorrt_plan"))
    assert [(t.name, list(t.dims)) for t in config.input] == [("image", [3, -1, -1]), ("gain", [1])]
    assert [(t.name, list(t.dims)) for t in config.output] == [("logits", [5]), ("features", [7])]
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 16)


def test_a_tensorrt_plan_is_served_as_one(tmp_path: Path) -> None:
    """Deploying needs no TensorRT: the plan is bytes, its sidecar tells the rest."""
    plan = tmp_path / "engine.plan"
    plan.write_bytes(b"ftrt and so on")
    digest = "0f8a2f4bb5bc2c9c"
    write_sidecar(record(path=plan, sha256=digest))
    with pytest.raises(InputError, match="not the one that its sidecar describes"):
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
    with pytest.raises(InputError, match="serves other inputs and outputs"):
        deploy(built(tmp_path / "second", dataclasses.replace(MADE, labels=()), **change), options)
    assert contents(tmp_path / "models") == before
    assert sorted(p.name for p in (tmp_path / "models/net").iterdir()) == ["1", "config.pbtxt", "labels.txt"]


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
    with pytest.raises(InputError, match="not the one that its sidecar describes"):
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
    command = [sys.executable, "-m", "pipeline", "deploy", large, "--repository", tmp_path / "models"]
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
