"""Weight files of many tools, damaged files, and files with code."""

from __future__ import annotations

import collections
import hashlib
import os
import pickle  # noqa: TID251 - to write files that must be refused
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.models.registry import build_model
from maskplan.pipeline.models.state_dict import fit_weights, read_metadata, read_weights, serialize, tensors_sha256

STATE = {"conv.weight": torch.arange(12.0).reshape(1, 3, 2, 2), "conv.bias": torch.tensor([1.5])}
KINDS = ("safetensors", "zip", "legacy")


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Save an object with torch."""

    def save(value: object, name: str = "w.pth", **options: Any) -> Path:
        torch.save(value, tmp_path / name, **options)
        return tmp_path / name

    return save


def as_bytes(kind: str, folder: Path) -> bytes:
    if kind == "safetensors":
        return serialize(STATE, {"model": "m"})
    path = folder / "whole.pth"
    torch.save({"state_dict": STATE, "epoch": 3}, path, _use_new_zipfile_serialization=kind == "zip")
    return path.read_bytes()


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize(
    "wrapped",
    [
        STATE,
        collections.OrderedDict(STATE),
        {"state_dict": STATE, "epoch": 7, "optimizer": {"state": {}, "lr": 0.1}},
        {"model_state_dict": STATE},
        {"model": STATE, "args": {"lr": 0.1}},
        {"net": STATE, "acc": 93.1},
        {"model": {"state_dict": STATE}},
        {"state_dict": {"model": {"net": STATE}}},
        {"model": STATE, "model_ema": {k: v + 1 for k, v in STATE.items()}},
        {**STATE, "epoch": 3, "name": "text"},
    ],
    ids=lambda w: "+".join(list(w)[:2]),
)
def test_state_dicts_in_training_checkpoints_are_found(saved: Callable[..., Path], wrapped: object) -> None:
    assert same(read_weights(saved(wrapped)), STATE)


def test_a_tensor_called_model_is_not_a_wrapper(saved: Callable[..., Path]) -> None:
    state = {"model": torch.zeros(2), "net": torch.ones(2)}
    assert same(read_weights(saved(state)), state)


def test_safetensors_files_of_other_tools_are_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(STATE, path, {"format": "pt"})
    assert same(read_weights(path), STATE)


def test_old_files_of_torch_are_read(saved: Callable[..., Path]) -> None:
    assert same(read_weights(saved(STATE, _use_new_zipfile_serialization=False)), STATE)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_missing_file_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="checkpoint not found") as raised:
        read_weights(tmp_path / name)
    assert raised.value.where == tmp_path / name


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_for_a_truncated_file_names_the_file(tmp_path: Path, kind: str) -> None:
    whole = as_bytes(kind, tmp_path)
    path = tmp_path / ("cut.safetensors" if kind == "safetensors" else "cut.pth")
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        # Half the name of a type is a name that nobody knows.
        with pytest.raises(InputError, match=r"cannot be read|would run code") as raised:
            read_weights(path)
        assert raised.value.where == path
        assert raised.value.found


@pytest.mark.parametrize("kind", KINDS)
def test_a_corrupt_file_is_read_or_refused_but_never_crashes(tmp_path: Path, kind: str) -> None:
    whole = as_bytes(kind, tmp_path)
    path = tmp_path / ("spoilt.safetensors" if kind == "safetensors" else "spoilt.pth")
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] = rng.integers(0, 256)
        path.write_bytes(data)
        try:
            assert all(isinstance(t, torch.Tensor) for t in read_weights(path).values())
        except InputError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    "data", [b"", b"hello, weights\n" * 9, b"PK\x03\x04" + bytes(60), b"\x80\x02.", b"\x80\x02}q\x00."]
)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_other_bytes_are_an_error(tmp_path: Path, data: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError):
        read_weights(tmp_path / name)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ({}, "no tensors in the checkpoint"),
        ({"state_dict": {}}, "no tensors in the checkpoint"),
        ({"epoch": 3, "lr": 0.1}, "no tensors in the checkpoint"),
        ({"weights": {"a": torch.zeros(1)}}, "no tensors in the checkpoint"),
        (torch.zeros(3), "no state dict in the checkpoint"),
        ([torch.zeros(3)], "no state dict in the checkpoint"),
    ],
    ids=["empty", "empty state_dict", "numbers", "unknown wrapping", "tensor", "list"],
)
def test_a_file_without_a_state_dict_is_an_error(saved: Callable[..., Path], value: object, what: str) -> None:
    with pytest.raises(InputError, match=what) as raised:
        read_weights(saved(value))
    assert "model.state_dict()" in str(raised.value.fix)


def test_keys_found_instead_of_tensors_are_named(saved: Callable[..., Path]) -> None:
    with pytest.raises(InputError) as raised:
        read_weights(saved({"epoch": 3, "lr": 0.1}))
    assert raised.value.found == "epoch, lr"


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("new", [False, True], ids=["legacy", "zip"])
def test_a_checkpoint_with_code_is_refused_and_the_code_does_not_run(
    saved: Callable[..., Path], tmp_path: Path, new: bool, wrapped: bool
) -> None:
    marker = tmp_path / "marker"
    value: object = {"state_dict": STATE, "extra": Malicious(marker)} if wrapped else Malicious(marker)
    path = saved(value, _use_new_zipfile_serialization=new)
    with pytest.raises(InputError, match="would run code while it loads; refused") as raised:
        read_weights(path)
    assert not marker.exists()
    assert "mkdir" in str(raised.value.found)
    torch.load(path, weights_only=False)
    assert marker.exists(), "the file was harmless, so its refusal showed nothing"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["w.pth", "w.pkl", "w.safetensors"])
def test_code_in_a_bare_pickle_does_not_run(tmp_path: Path, protocol: int, name: str) -> None:
    marker = tmp_path / "marker"
    (tmp_path / name).write_bytes(pickle.dumps({"a": Malicious(marker)}, protocol=protocol))
    with pytest.raises(InputError):
        read_weights(tmp_path / name)
    assert not marker.exists()


def test_a_whole_module_is_refused_with_the_name_of_its_class(saved: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="would run code") as raised:
        read_weights(saved(nn.Linear(2, 2)))
    assert raised.value.found == "torch.nn.modules.linear.Linear"
    assert "state_dict()" in str(raised.value.fix)


class Net(nn.Module):
    """Eight tensors, of which one is a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2, bias=False)


def net_state(seed: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {k: torch.rand_like(v) if v.is_floating_point() else v + 5 for k, v in Net().state_dict().items()}


def test_weights_that_fit_are_loaded() -> None:
    net, state = Net(), net_state()
    fit_weights(net, state, where="f")
    assert same(dict(net.state_dict()), state)


def test_the_batch_counter_may_be_missing() -> None:
    net, state = Net(), net_state()
    del state["bn.num_batches_tracked"]
    fit_weights(net, state, where="f")
    assert torch.equal(net.bn.running_var, state["bn.running_var"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_converted(dtype: torch.dtype) -> None:
    net = Net()
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in net_state().items()}
    fit_weights(net, state, where="f")
    assert net.conv.weight.dtype == torch.float32
    assert torch.equal(net.conv.weight, state["conv.weight"].float())


def test_all_mismatches_are_counted_in_one_message() -> None:
    net, state = Net(), net_state()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    del state["conv.bias"], state["bn.running_mean"]
    state |= {f"extra.{i}": torch.zeros(1) for i in range(7)}
    state["head.weight"] = torch.zeros(1000, 4)
    with pytest.raises(InputError, match="does not fit the model") as raised:
        fit_weights(net, state, where="some/file.pth")
    assert raised.value.where == "some/file.pth"
    assert raised.value.found == (
        "2 missing: conv.bias, bn.running_mean; "
        "7 not in the model: extra.0, extra.1, extra.2, extra.3, extra.4 and 2 more; "
        "1 with another shape: head.weight is (1000, 4), the model has (2, 4)"
    )
    assert "--classes" in str(raised.value.fix)
    assert same(dict(net.state_dict()), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused_and_nothing_is_loaded(value: float) -> None:
    net, state = Net(), net_state()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state["conv.weight"][3, 2] = value
    state["bn.running_var"][0] = value
    with pytest.raises(InputError, match="2 tensors contain NaN or infinity") as raised:
        fit_weights(net, state, where="f")
    assert raised.value.found == "conv.weight, bn.running_var"
    assert same(dict(net.state_dict()), before)


def test_numbers_too_large_for_the_model_are_refused() -> None:
    """Finite in float64, infinite once loaded."""
    net, state = Net(), net_state()
    state["conv.bias"] = torch.full((4,), 1e300, dtype=torch.float64)
    with pytest.raises(InputError) as raised:
        fit_weights(net, state, where="f")
    assert "conv.bias" in str(raised.value)


def test_float8_weights_are_loaded_or_refused_but_never_crash() -> None:
    net, state = Net(), net_state()
    state["conv.weight"] = state["conv.weight"].to(torch.float8_e4m3fn)
    refused = ""
    try:
        fit_weights(net, state, where="f")
    except InputError as error:
        refused = str(error)
    assert "conv.weight" in refused or torch.equal(net.conv.weight, state["conv.weight"].float())


def test_what_is_serialized_is_read_back_with_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(serialize(STATE, {"b": [1, None], "a": {"c": "é"}}))
    assert same(read_weights(path), STATE)
    assert read_metadata(path) == {"b": [1, None], "a": {"c": "é"}}


def test_strided_tensors_are_serialized_by_value(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    strided = torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1)
    path.write_bytes(serialize({"a": strided}, {}))
    assert same(read_weights(path), {"a": strided})


def test_tensors_that_share_memory_are_serialized_each(tmp_path: Path) -> None:
    """As in the state dict of a model that uses one layer under two names."""
    path = tmp_path / "w.safetensors"
    layer = nn.Linear(2, 2)
    state = nn.ModuleDict({"first": layer, "second": layer}).state_dict()
    path.write_bytes(serialize(state, {}))
    assert same(read_weights(path), dict(state))


def test_bytes_do_not_depend_on_the_order_of_tensors_or_metadata() -> None:
    state = net_state()
    flipped = dict(reversed(state.items()))
    assert serialize(state, {"a": 1, "b": 2}) == serialize(flipped, {"b": 2, "a": 1})
    assert serialize(state, {"a": 1}) != serialize(state, {"a": 2})


@pytest.mark.slow  # the whole line in another process is a plain test of test_run.py
def test_bytes_are_the_same_in_every_process(capsys: pytest.CaptureFixture[str]) -> None:
    """Names come from a set, whose order depends on the hash seed of the process."""
    program = (
        "import hashlib, torch\n"
        "from maskplan.pipeline.models.state_dict import serialize, tensors_sha256\n"
        "names = {f'layer{i}.weight' for i in range(20)}\n"
        "state = {n: torch.full((3, 4), float(n[5:-7])) for n in names}\n"
        "metadata = {n: len(n) for n in names}\n"
        "print(hashlib.sha256(serialize(state, metadata)).hexdigest(), tensors_sha256(state), *names)\n"
    )
    exec(program, {})
    here = capsys.readouterr().out.split()
    there = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert here[2:] != there[2:], "both processes had one order, so that equal bytes show nothing"
    assert here[:2] == there[:2]


def test_files_of_other_tools_have_no_metadata(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file(STATE, path, metadata)
        assert read_metadata(path) is None


@pytest.mark.parametrize("text", ["{", "[1]", '"text"', "NaN"])
def test_metadata_that_is_not_a_json_object_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(STATE, path, {"maskplan": text})
    with pytest.raises(InputError, match="cannot be read") as raised:
        read_metadata(path)
    assert raised.value.where == path


def test_metadata_of_a_damaged_or_missing_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(InputError):
        read_metadata(path)
    path.write_bytes(serialize(STATE, {"a": 1})[:30])
    with pytest.raises(InputError, match="cannot be read"):
        read_metadata(path)


def test_the_digest_is_of_names_types_shapes_and_values() -> None:
    expected = hashlib.sha256()
    for name in sorted(STATE):
        array = STATE[name].numpy()
        expected.update(f"{name} torch.float32 {array.shape}\n".encode())
        expected.update(array.tobytes())
    assert tensors_sha256(STATE) == expected.hexdigest()


def test_the_digest_tells_apart_what_differs_in_anything() -> None:
    base = torch.zeros(2, 3)
    states = [
        {"a": base},
        {"b": base},
        {"a": base.reshape(3, 2)},
        {"a": base.to(torch.int32)},
        {"a": -base},
        {"a": base, "b": base},
        {},
    ]
    assert len({tensors_sha256(state) for state in states}) == len(states)


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor(3), torch.zeros(0, 4), torch.ones(3, dtype=torch.bfloat16), torch.tensor([True]), torch.rand(4, 3).T],
    ids=["scalar", "empty", "bfloat16", "bool", "strided"],
)
def test_any_tensor_has_a_digest_that_depends_on_content_only(tensor: torch.Tensor) -> None:
    assert tensors_sha256({"a": tensor}) == tensors_sha256({"a": tensor.clone().contiguous()})
    assert tensors_sha256({"a": nn.Parameter(torch.ones(2))}) == tensors_sha256({"a": torch.ones(2)})


def test_a_model_that_asks_for_the_format_of_its_weights_takes_them(tmp_path: Path) -> None:
    """MNASNet refuses a state dict that does not say."""
    saved = build_model("mnasnet0_5", seed=1).module
    torch.save(saved.state_dict(), tmp_path / "w.pth")
    fresh = build_model("mnasnet0_5", seed=2).module
    fit_weights(fresh, read_weights(tmp_path / "w.pth"), where="w.pth")
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in saved.state_dict().items())
