"""Kinds of weight files: harmless types, shards, unusual tensors, and files that are something else."""

from __future__ import annotations

import argparse
import collections
import collections.abc
import datetime
import io
import json
import os
import pathlib
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.models.state_dict import fit_weights, read_state, read_weights, serialize
from maskplan.pipeline.models.weight_files import read_content, weights_digest

STATE = {"conv.weight": torch.arange(12.0).reshape(1, 3, 2, 2), "conv.bias": torch.tensor([1.5])}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


def lists() -> collections.defaultdict[str, list[int]]:
    value: collections.defaultdict[str, list[int]] = collections.defaultdict(list)
    value["a"].append(1)
    return value


HARMLESS = {
    "Namespace": argparse.Namespace(lr=0.1, folder=Path("/x"), best=np.float64(3.5)),
    "SimpleNamespace": types.SimpleNamespace(a=1),
    "float32": np.float32(2.5),
    "int8": np.int8(-3),
    "bool": np.bool_(True),
    "array": np.arange(6).reshape(2, 3),
    "Fortran array": np.asfortranarray(np.ones((2, 3))),
    "array of text": np.array(["a", "bc"]),
    "array of objects": np.array([1, "a"], dtype=object),
    "dtype": np.dtype("float32"),
    "path": Path("a/b"),
    "Windows path": pathlib.PureWindowsPath("c:/x"),
    "defaultdict": lists(),
    "deque": collections.deque([1, 2]),
    "Counter": collections.Counter("aab"),
    "date": datetime.datetime(2026, 1, 2, 3, 4),
    "timedelta": datetime.timedelta(1),
    "set": {1, 2},
    "frozenset": frozenset([1]),
    "version": torch.__version__,
    "complex": 1j,
}


@pytest.mark.parametrize("value", HARMLESS.values(), ids=HARMLESS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_harmless_types_beside_weights_are_read(tmp_path: Path, value: object, zipped: bool) -> None:
    torch.save({"state_dict": STATE, "extra": value}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    found = read_content(tmp_path / "w.pth")["extra"]
    # Containers may come back as simpler ones, paths as paths without a file system.
    simple = str(found).replace("PurePosixPath", "PosixPath")
    assert simple == str(value) or (isinstance(value, collections.abc.Iterable) and list(found) == list(value))
    assert same(read_weights(tmp_path / "w.pth"), STATE)


class Calls:
    """Unpickles to a call."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Trainer:
    """Of the user's own code."""


@pytest.mark.parametrize(
    "value",
    [
        Calls(os.mkdir, "made"),
        Calls(eval, "1"),
        Calls(getattr, Path, "home"),
        Calls(np.load, "x.npy"),
        Calls(Path.mkdir, Path("made")),
        Calls(pathlib.Path.write_text, Path("made"), "x"),
        Calls(io.open, "made", "w"),
        Trainer(),
        nn.ReLU(),
        print,
    ],
    ids=["mkdir", "eval", "getattr", "np.load", "Path.mkdir", "write_text", "open", "own class", "module", "function"],
)
def test_code_is_refused_beside_harmless_types(tmp_path: Path, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": STATE, "args": argparse.Namespace(a=1), "extra": value}, "w.pth")
    with pytest.raises(InputError, match="would run code while it loads; refused"):
        read_weights(Path("w.pth"))
    assert not Path("made").exists()


def test_reading_leaves_no_type_allowed(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "args": argparse.Namespace(a=1)}, tmp_path / "w.pth")
    before = set(torch.serialization.get_safe_globals())  # PyTorch keeps no order
    read_weights(tmp_path / "w.pth")
    assert set(torch.serialization.get_safe_globals()) == before


def test_arrays_are_weights_where_there_are_no_tensors(tmp_path: Path) -> None:
    torch.save({"state_dict": {k: v.numpy() for k, v in STATE.items()}}, tmp_path / "a.pth")
    torch.save({"state_dict": {**STATE, "loss": np.ones(3)}}, tmp_path / "b.pth")
    assert same(read_weights(tmp_path / "a.pth"), STATE)
    assert same(read_weights(tmp_path / "b.pth"), STATE)


@pytest.mark.parametrize("name", ["w.bin", "w.pth", "w.safetensors", "w"])
@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_the_kind_of_a_file_is_told_by_its_content(tmp_path: Path, name: str, kind: str) -> None:
    if kind == "torch" and name == "w.safetensors":
        pytest.skip("a file with this name must be what it says")
    if kind == "torch":
        torch.save(STATE, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(serialize(STATE, {}))
    assert same(read_weights(tmp_path / name), STATE)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_and_quantized_tensors_become_dense(tmp_path: Path) -> None:
    matrix = torch.tensor([[0.0, 2.0], [0.0, -1.0]])
    state = {
        "coo": matrix.to_sparse(),
        "csr": matrix.to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(matrix, 0.5, 0, torch.qint8),
        "by channel": torch.quantize_per_channel(matrix, torch.tensor([0.5, 0.25]), torch.zeros(2), 0, torch.qint8),
    }
    torch.save(state, tmp_path / "w.pth")
    assert same(read_weights(tmp_path / "w.pth"), dict.fromkeys(state, matrix))


def test_tensors_without_values_are_an_error(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2, device="meta")}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="'meta'"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_other_float_types_and_channels_last_are_converted(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    net, wanted = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    state = {k: v.to(dtype) for k, v in wanted.state_dict().items()}
    state["weight"] = state["weight"].contiguous(memory_format=torch.channels_last)
    if name == "w.pth":
        torch.save(state, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(serialize(state, {}))
    fit_weights(net, read_state(tmp_path / name), where="f")
    assert net.weight.dtype == torch.float32
    assert net.weight.is_contiguous()
    assert torch.equal(net.weight, wanted.weight.to(dtype).float())


def test_tied_channels_last_tensors_are_serialized(tmp_path: Path) -> None:
    weight = torch.rand(4, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    (tmp_path / "w.safetensors").write_bytes(serialize({"a": weight, "b": weight}, {}))
    assert same(read_weights(tmp_path / "w.safetensors"), {"a": weight, "b": weight})


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The index of a checkpoint in two files."""
    for number, name in enumerate(STATE):
        safetensors.torch.save_file({name: STATE[name]}, tmp_path / f"model-{number}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    files = {name: f"model-{number}.safetensors" for number, name in enumerate(STATE)}
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return index


def test_a_sharded_checkpoint_is_read_by_its_index(sharded: Path) -> None:
    assert same(read_weights(sharded), STATE)


def test_shards_of_torch_are_read(tmp_path: Path) -> None:
    torch.save({"conv.weight": STATE["conv.weight"]}, tmp_path / "a.bin")
    torch.save({"conv.bias": STATE["conv.bias"]}, tmp_path / "b.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"conv.weight": "a.bin", "conv.bias": "b.bin"}}))
    assert same(read_weights(index), STATE)


def test_the_digest_of_an_index_covers_its_shards(sharded: Path) -> None:
    before = weights_digest(sharded)
    safetensors.torch.save_file({"conv.bias": STATE["conv.bias"] + 1}, sharded.with_name("model-1.safetensors"))
    assert weights_digest(sharded) != before


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not the index"),
        ("[]", "not the index"),
        ('{"weight_map": 3}', "not the index"),
        ("[" * 100000, "not the index"),
        ('{"weight_map": {"a": ["x"]}}', "not the index"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "outside its folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "outside its folder"),
        ('{"weight_map": {"a": "C:\\\\x"}}', "outside its folder"),
        ('{"weight_map": {"a": "..\\\\x"}}', "outside its folder"),
        ('{"weight_map": {"a": 3}}', "outside its folder"),
        ('{"weight_map": {"a": "model-9.safetensors"}}', "are missing"),
        ('{"weight_map": {"a": "model-0.safetensors"}}', "not in its files"),
        ('{"weight_map": {"a": "model.safetensors.index.json"}}', "names another index"),
    ],
)
def test_a_wrong_index_is_an_error(sharded: Path, content: str, says: str) -> None:
    sharded.write_text(content)
    with pytest.raises(InputError, match=says):
        read_weights(sharded)


def write_other(folder: Path, kind: str) -> Path:
    path = folder / f"w.{kind}"
    if kind == "ts":
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    elif kind == "pt2":
        torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), path)
    elif kind == "npz":
        np.savez(path, a=np.ones(2))
    elif kind == "npy":
        np.save(path, np.ones(2))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "x")
    elif kind == "folder":
        path.mkdir()
        (path / "shard.safetensors").write_bytes(b"")
    else:
        start = {"h5": b"\x89HDF\r\n", "gguf": b"GGUF", "gz": b"\x1f\x8b\x08", "json": b'{"weight_map": {}}'}
        lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"
        path.write_bytes({**start, "lfs": lfs, "onnx": b"\x08\x07"}[kind] + bytes(99))
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("ts", "TorchScript"),
        ("pt2", "an exported program"),
        ("npz", "a NumPy archive"),
        ("npy", "a NumPy array"),
        ("zip", "a zip archive without tensors (readme.txt)"),
        ("folder", "shard.safetensors"),
        ("h5", "HDF5"),
        ("gguf", "GGUF"),
        ("gz", "gzip"),
        ("json", "a JSON file whose name does not end in .index.json"),
        ("lfs", "Git LFS"),
        ("onnx", "an ONNX file"),
    ],
)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path: Path, kind: str, says: str) -> None:
    with pytest.raises(InputError) as raised:
        read_weights(write_other(tmp_path, kind))
    assert says in str(raised.value.found)
    assert "truncated" not in str(raised.value)
    assert "weights_only" not in str(raised.value)


def test_torchs_advice_to_load_unsafely_is_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"\x80\x05\x95hello")
    with pytest.raises(InputError) as raised:
        read_weights(tmp_path / "w.pth")
    assert "weights_only" not in str(raised.value)
