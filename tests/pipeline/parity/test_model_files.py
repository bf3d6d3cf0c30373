"""Engines, ONNX files and checkpoints are opened by their kind."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from maskplan.engines.base import Arrays, Classifier
from maskplan.engines.build import BuildOptions, build_engine
from maskplan.engines.sidecar import sidecar_path
from maskplan.exporters.metadata import describe_onnx, write_provenance
from maskplan.pipeline.core.artifacts import Preprocessing, Provenance, TensorSpec
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.models.checkpoint import ModelOptions, load_checkpoint, open_checkpoint
from maskplan.pipeline.parity.model_files import OpenedModel, open_model, shared_preprocessing

Array = npt.NDArray[Any]

HOW = Preprocessing(3, 8, 8, 9, "bicubic", (0.25, 0.5, 0.75), (0.1, 0.2, 0.3))
MADE = Provenance("net", True, "test", "0" * 64, 5, (), HOW)
WEIGHT = np.random.default_rng(0).normal(size=(192, 5)).astype(np.float32)
IMAGES = np.random.default_rng(1).random((3, 3, 8, 8), dtype=np.float32)


def written(path: Path, made: Provenance | None = None, outputs: list[int | str] | None = None) -> Path:
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["input"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["logits"])],
        "net",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5] if outputs is None else outputs)],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if made is not None:
        write_provenance(model, made)
    path.write_bytes(model.SerializeToString())
    return path


def engine_of(onnx_file: Path) -> Path:
    out = onnx_file.with_name("engine.onnx")
    return build_engine(describe_onnx(onnx_file), BuildOptions("onnxruntime"), out).path


def test_onnx_files_and_engines_give_the_same_logits(tmp_path: Path) -> None:
    plain = written(tmp_path / "net.onnx", MADE)
    for path in (plain, engine_of(plain)):
        with open_model(path) as side:
            assert (side.provenance, side.classes, side.classifier.name) == (MADE, 5, path.name)
            assert np.allclose(side.classifier.logits(IMAGES), IMAGES.reshape(3, -1) @ WEIGHT, atol=1e-4)


def test_a_foreign_file_has_no_provenance(tmp_path: Path) -> None:
    with open_model(written(tmp_path / "net.onnx")) as side:
        assert side.provenance is None


def test_classes_that_the_graph_does_not_tell_are_found_by_a_run(tmp_path: Path) -> None:
    path = written(tmp_path / "net.onnx", outputs=["batch", "classes"])
    model = onnx.load(path)
    model.graph.node[-1].output[0] = "all"
    # How many a Compress keeps is known only when it runs.
    model.graph.node.append(helper.make_node("Compress", ["all", "keep"], ["logits"], axis=1))
    keep = np.array([True, False, True, True, False])
    model.graph.initializer.append(numpy_helper.from_array(keep, "keep"))
    path.write_bytes(model.SerializeToString())
    with open_model(path) as side:
        assert side.classifier.output.shape == (None, None)
        assert side.classes == 3


def test_classes_are_found_where_not_even_the_rank_is_told(tmp_path: Path) -> None:
    path = written(tmp_path / "net.onnx")
    model = onnx.load(path)
    model.graph.node[-1].output[0] = "all"
    # Reshaped to its own shape, by way of indices that are known only when it runs.
    model.graph.node.extend(
        [
            helper.make_node("Shape", ["all"], ["shape"]),
            helper.make_node("NonZero", ["shape"], ["where"]),
            helper.make_node("Squeeze", ["where"], ["indices"]),
            helper.make_node("Gather", ["shape", "indices"], ["same"]),
            helper.make_node("Reshape", ["all", "same"], ["logits"]),
        ]
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    path.write_bytes(model.SerializeToString())
    with open_model(path) as side:
        assert side.classes == 5
        assert np.allclose(side.classifier.logits(IMAGES), IMAGES.reshape(3, -1) @ WEIGHT, atol=1e-4)


def test_a_checkpoint_is_exported_with_its_own_classes_to_a_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint's record says how many classes its weights have; the model's default is 10."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    options = ModelOptions("digits_resnet", "random", classes=3)
    checkpoint = load_checkpoint(options, tmp_path / "three.safetensors")
    module, _ = open_checkpoint(options)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with open_model(checkpoint.path) as model:
        assert (model.provenance, model.classes) == (checkpoint.provenance, 3)
        assert [p for p in (tmp_path / "temporary").iterdir() if p.name.startswith("maskplan-")]
        with torch.no_grad():
            assert np.allclose(model.classifier.logits(x.numpy()), module(x).numpy(), atol=1e-4)
    assert not [p for p in (tmp_path / "temporary").iterdir() if p.name.startswith("maskplan-")]


def test_a_checkpoint_whose_model_is_a_file_elsewhere_says_what_to_do(tiny_spec: str, tmp_path: Path) -> None:
    """The record holds no folder, so the model's code cannot be found: export it, and compare that."""
    made = load_checkpoint(ModelOptions(tiny_spec, "random"), tmp_path / "tiny.safetensors")
    with pytest.raises(InputError, match="export") as caught, open_model(made.path):
        pass
    assert "tiny" in str(caught.value)


def test_an_engines_own_digest_is_held_against_it(tmp_path: Path) -> None:
    engine = engine_of(written(tmp_path / "net.onnx"))
    model = onnx.load(engine)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(WEIGHT * 2, "w"))
    engine.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="does not match its sidecar"), open_model(engine):
        pass
    # Without the sidecar it is an ONNX file like any other.
    sidecar_path(engine).unlink()
    with open_model(engine) as side:
        assert np.allclose(side.classifier.logits(IMAGES), 2 * IMAGES.reshape(3, -1) @ WEIGHT, atol=1e-3)


@pytest.mark.parametrize("name", ["none.onnx", "none.plan", "none.safetensors", "none.pth", "none"])
def test_what_is_missing_or_of_no_known_kind_is_one_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught, open_model(tmp_path / name):
        pass
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["net.onnx", "net.plan", "net.safetensors", "net.pth", "net.engine"])
def test_rubbish_is_one_error_whatever_its_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"\x93NUMPY rubbish")
    with pytest.raises(InputError) as caught, open_model(path):
        pass
    assert name in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 4


def test_a_safetensors_file_of_another_tool_is_no_checkpoint_of_ours(tmp_path: Path) -> None:
    import safetensors.numpy

    safetensors.numpy.save_file({"w": WEIGHT}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="not a checkpoint of maskplan"), open_model(tmp_path / "w.safetensors"):
        pass


class Sized:
    """An engine that only has a shape."""

    last_timing = None

    def __init__(self, shape: tuple[int | None, ...]) -> None:
        self.inputs = (TensorSpec("x", "float32", shape),)
        self.outputs = (TensorSpec("y", "float32", (None, 5)),)

    def infer(self, feeds: Arrays) -> dict[str, Array]:
        raise AssertionError

    def close(self) -> None:
        pass


def side(made: Provenance | None = None, shape: tuple[int | None, ...] = (None, 3, 8, 8)) -> OpenedModel:
    return OpenedModel(Classifier(Sized(shape), "some net"), made)


def test_preprocessing_is_that_of_either_record() -> None:
    for sides in ([side(MADE), side(MADE)], [side(MADE), side()], [side(), side(MADE)]):
        assert shared_preprocessing(sides, None, None) == HOW


def test_records_that_differ_in_preprocessing_are_refused() -> None:
    for change in ({"mean": (0.0, 0.5, 0.75)}, {"resize": 0}, {"interpolation": "nearest"}, {"height": 9}):
        other = dataclasses.replace(MADE, preprocessing=dataclasses.replace(HOW, **change))
        with pytest.raises(InputError, match="different preprocessing"):
            shared_preprocessing([side(MADE), side(other)], None, None)


def test_foreign_files_get_pictures_of_their_size_in_0_to_1() -> None:
    found = shared_preprocessing([side(shape=(1, 3, 20, 30)), side()], None, None)
    assert found == Preprocessing(3, 20, 30, 0, "bilinear", (0.0,) * 3, (1.0,) * 3)
    found = shared_preprocessing([side(shape=(None, 1, 8, 8)), side()], "0.5", " .25 ")
    assert found == Preprocessing(1, 8, 8, 0, "bilinear", (0.5,), (0.25,))
    found = shared_preprocessing([side(), side()], "0.1,0.2,0.3", "1,2,4")
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 4.0))


@pytest.mark.parametrize("shape", [(None, 3, None, 8), (None, 3, 8, None), (None, None, 8, 8), (None, 4, 8, 8)])
def test_inputs_that_are_no_pictures_of_one_size_are_refused(shape: tuple[int | None, ...]) -> None:
    with pytest.raises(InputError, match="input"):
        shared_preprocessing([side(shape=shape), side(shape=shape)], None, None)


@pytest.mark.parametrize("text", ["", "0.5", "1,2", "1,2,3,4", "a,b,c", "1,,2"])
def test_numbers_must_be_one_a_channel(text: str) -> None:
    for mean, std in ((text, None), (None, text)):
        with pytest.raises(InputError, match="expected one number per channel"):
            shared_preprocessing([side(), side()], mean, std)


@pytest.mark.parametrize("text", ["1,0,1", "nan,1,1", "1,inf,1"])
def test_a_deviation_that_would_make_nan_of_pictures_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        shared_preprocessing([side(), side()], None, text)


def test_the_command_compares_a_checkpoint_with_its_own_export(
    cli: Callable[..., Any], finished_digits: Path, tmp_path: Path
) -> None:
    """Without --data the bundled model is judged by its own held-out digits."""
    report = tmp_path / "report.json"
    pair = (finished_digits / "dense.safetensors", finished_digits / "dense.onnx")
    ran = cli("compare", *pair, "--max-top1-drop", 0, "--report", report)
    assert ran.code == 0, ran.err
    assert "pass" in ran.out
    assert '"agreement": 100.0' in report.read_text()
