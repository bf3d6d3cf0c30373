"""The file beside an engine: an engine is loaded only when it is the one that its sidecar describes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from maskplan.engines.build import BuildOptions, build_engine, open_engine
from maskplan.engines.sidecar import has_sidecar, read_engine, sidecar_path, write_sidecar
from maskplan.exporters.metadata import describe_onnx, write_provenance
from maskplan.pipeline.core.artifacts import EngineFile, ImageSet, Preprocessing, Provenance
from maskplan.pipeline.core.errors import InputError

HOW = Preprocessing(3, 4, 4, 0, "bilinear", (0.5,) * 3, (0.25,) * 3)
MADE = Provenance(
    "net",
    True,
    "test",
    "0" * 64,
    5,
    ("a", "b", "c", "d", "é"),
    HOW,
    masked=("w",),
    pattern="2:4",
    layout="channel",
    method="learned",
    recalibrated_images=100,
    image_sets=(ImageSet("train", 2, "1" * 64, ("0123456789abcdef",)),),
)
IMAGES = np.random.default_rng(0).random((2, 3, 4, 4), dtype=np.float32)


@pytest.fixture
def engine(tmp_path: Path) -> EngineFile:
    """A built engine with its sidecar."""
    weight = np.random.default_rng(0).normal(size=(48, 5)).astype(np.float32)
    nodes = [helper.make_node("Flatten", ["input"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["logits"])]
    graph = helper.make_graph(
        nodes,
        "flat",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    write_provenance(model, MADE)
    source = tmp_path / "model.onnx"
    source.write_bytes(model.SerializeToString())
    return build_engine(describe_onnx(source), BuildOptions("onnxruntime"), tmp_path / "built" / "engine.onnx")


def test_a_record_comes_back_as_it_was_written(engine: EngineFile) -> None:
    assert sidecar_path(engine.path).name == "engine.onnx.json"
    assert read_engine(engine.path) == engine
    assert engine.provenance == MADE


def test_the_sidecar_holds_what_a_reader_needs_and_no_folder(engine: EngineFile, tmp_path: Path) -> None:
    text = sidecar_path(engine.path).read_text()
    stored = json.loads(text)
    needed = {
        "sha256",
        "runtime_version",
        "compute_capability",
        "sparse_weights",
        "typing",
        "profiles",
        "inputs",
        "outputs",
    }
    assert needed <= set(stored)
    assert stored["provenance"]["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    assert stored["provenance"]["labels"] == ["a", "b", "c", "d", "é"]
    assert str(tmp_path) not in text


def test_a_moved_and_renamed_pair_still_loads(engine: EngineFile, tmp_path: Path) -> None:
    expected = open_engine(engine).infer({"input": IMAGES})["logits"]
    moved = tmp_path / "elsewhere" / "other.onnx"
    moved.parent.mkdir()
    shutil.move(engine.path, moved)
    shutil.move(sidecar_path(engine.path), sidecar_path(moved))
    assert read_engine(moved) == dataclasses.replace(engine, path=moved)
    assert np.array_equal(open_engine(moved).infer({"input": IMAGES})["logits"], expected)


def test_a_flipped_bit_anywhere_is_refused(engine: EngineFile) -> None:
    data = engine.path.read_bytes()
    for position in range(0, len(data), 97):
        spoilt = bytearray(data)
        spoilt[position] ^= 1
        engine.path.write_bytes(spoilt)
        with pytest.raises(InputError, match="does not match its sidecar"):
            open_engine(engine)
    engine.path.write_bytes(data)
    open_engine(engine).close()


def test_an_exchanged_engine_that_would_load_is_refused_before_it_does(engine: EngineFile) -> None:
    """Valid, of the same inputs and outputs, and with other weights: only its digest tells."""
    model = onnx.load(engine.path)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((48, 5), np.float32), "w"))
    engine.path.write_bytes(model.SerializeToString())
    for given in (engine, engine.path):
        with pytest.raises(InputError, match="do not load this file"):
            open_engine(given)


@pytest.mark.parametrize(
    "spoil", [lambda d: d[:-1], lambda d: d + b"\0", lambda d: b""], ids=["cut", "longer", "empty"]
)
def test_an_engine_of_another_length_is_refused(engine: EngineFile, spoil: Callable[[bytes], bytes]) -> None:
    engine.path.write_bytes(spoil(engine.path.read_bytes()))
    with pytest.raises(InputError, match="does not match its sidecar"):
        open_engine(engine)


def test_without_engine_or_sidecar_the_message_says_which(engine: EngineFile) -> None:
    sidecar = sidecar_path(engine.path)
    kept = sidecar.read_bytes()
    sidecar.unlink()
    with pytest.raises(InputError, match="no sidecar"):
        open_engine(engine)
    sidecar.write_bytes(kept)
    engine.path.unlink()
    with pytest.raises(InputError, match="engine not found"):
        open_engine(engine)


def change(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda stored: {**stored, **fields}


@pytest.mark.parametrize(
    "spoil",
    [
        change(sha256=3),
        change(profiles="1:1:1"),
        change(inputs=[{"name": "input"}]),
        change(surprise=1),
        lambda stored: {k: v for k, v in stored.items() if k != "backend"},
        lambda stored: [stored],
        lambda stored: None,
        change(backend="someone else's"),
    ],
    ids=[
        "digest that is a number",
        "profiles that are a text",
        "half an input",
        "unknown field",
        "missing field",
        "a list",
        "null",
        "unknown backend",
    ],
)
def test_a_spoilt_sidecar_is_refused(engine: EngineFile, spoil: Callable[[Any], Any]) -> None:
    sidecar = sidecar_path(engine.path)
    sidecar.write_text(json.dumps(spoil(json.loads(sidecar.read_text()))))
    with pytest.raises(InputError):
        open_engine(engine)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00", b"[1, 2"])
def test_a_sidecar_that_is_not_json_is_refused(engine: EngineFile, data: bytes) -> None:
    sidecar_path(engine.path).write_bytes(data)
    with pytest.raises(InputError, match="sidecar cannot be read"):
        open_engine(engine)


def test_a_record_is_known_to_lie_beside_its_engine_or_not(engine: EngineFile) -> None:
    assert has_sidecar(engine)
    assert not has_sidecar(dataclasses.replace(engine, notes=("other",)))
    for spoilt in (b"{", b"null", b"\xff\xfe\x00"):
        sidecar_path(engine.path).write_bytes(spoilt)
        assert not has_sidecar(engine)
    sidecar_path(engine.path).unlink()
    assert not has_sidecar(engine)


def test_a_sidecar_can_be_written_anew(engine: EngineFile) -> None:
    write_sidecar(dataclasses.replace(engine, notes=("seen",)))
    assert read_engine(engine.path).notes == ("seen",)
    assert sorted(p.name for p in engine.path.parent.iterdir()) == ["engine.onnx", "engine.onnx.json"]


@pytest.mark.parametrize("command", ["inspect", "deploy", "compare", "time"])
def test_every_command_refuses_a_tampered_engine(
    engine: EngineFile, command: str, cli: Callable[..., Any], tmp_path: Path
) -> None:
    with engine.path.open("ab") as file:
        file.write(b"\0")
    extra = {
        "inspect": [],
        "deploy": ["--repository", tmp_path / "repository"],
        "compare": [engine.path],
        "time": [engine.path],
    }[command]
    ran = cli(command, engine.path, *extra)
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.startswith("error: the engine does not match its sidecar")
    assert not (tmp_path / "repository").exists()
