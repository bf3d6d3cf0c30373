"""Models and weights that cannot be used."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
import safetensors.numpy
import torch


class Ran(Protocol):
    code: int
    out: str
    err: str


Refused = Callable[..., str]


# --- models


@pytest.mark.parametrize(
    "command",
    [
        ("engine", "resnet5O", "--out", "o"),
        ("mask", "resnet5O", "-o", "m.safetensors"),
        ("export", "resnet5O", "-o", "m.onnx"),
    ],
    ids=lambda c: c[0],
)
def test_an_unknown_model_gets_a_suggestion(refused: Refused, command: tuple[str, ...]) -> None:
    message = refused(*command)

    assert "unknown model 'resnet5O'" in message
    assert "did you mean 'resnet50'" in message


def test_an_unknown_timm_model_gets_a_suggestion(refused: Refused, out: Path) -> None:
    pytest.importorskip("timm", reason="timm is not installed")

    message = refused("engine", "timm/resnet5O", "--weights", "random", "--out", out)

    assert "did you mean 'resnet50" in message


def test_a_word_unlike_any_model_gets_the_kinds_of_models(refused: Refused, out: Path) -> None:
    message = refused("engine", "xyzzyplugh", "--out", out)

    assert "did you mean" not in message
    assert "file.py:factory" in message


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("branching", "cannot export the model"),
        ("another_input", "cannot run on its own input"),
        ("fails", "no weights today"),
        ("a_list", "does not return a torch module"),
        ("no_such", "does not return a torch module"),
    ],
)
def test_a_model_that_cannot_go_through_the_line_is_refused(
    refused: Refused, others: Path, out: Path, factory: str, says: str
) -> None:
    message = refused("engine", f"{others}:{factory}", "--weights", "random", "--out", out)

    assert says in message


def test_layers_that_cannot_be_masked_are_named_with_their_reasons(refused: Refused, others: Path, out: Path) -> None:
    message = refused("engine", f"{others}:only_depthwise", "--weights", "random", "--out", out)

    assert "no layer of the model can be masked 2:4" in message
    assert "deep.weight (8, 1, 3, 3) (grouped)" in message
    assert "stem.weight (8, 3, 3, 3) (channels_not_multiple_of_4)" in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def build(:\n", "SyntaxError"),
        ("import no_such_module_anywhere\n", "ModuleNotFoundError"),
        ("from torch import nn\nPREPROCESSING = {'hight': 3}\n\ndef build():\n    return nn.Linear(4, 2)\n", "hight"),
        (
            "from torch import nn\nPREPROCESSING = {'channels': 1}\n\ndef build():\n    return nn.Linear(4, 2)\n",
            "PREPROCESSING is not valid",
        ),
    ],
    ids=["syntax", "import", "unknown preprocessing", "preprocessing of another channel count"],
)
def test_a_model_file_that_fails_is_named_with_its_error(
    refused: Refused, tmp_path: Path, out: Path, text: str, says: str
) -> None:
    (tmp_path / "broken.py").write_text(text)

    message = refused("engine", "broken.py:build", "--weights", "random", "--out", out)

    assert says in message
    assert "broken.py" in message


@pytest.mark.parametrize(("spec", "says"), [("nowhere.py:build", "file not found"), ("nowhere.py", "no factory named")])
def test_a_missing_model_file_or_factory_is_refused(refused: Refused, out: Path, spec: str, says: str) -> None:
    assert says in refused("engine", spec, "--out", out)


# --- weights


def test_a_missing_checkpoint_is_named(refused: Refused, tiny_spec: str, out: Path) -> None:
    message = refused("engine", tiny_spec, "--weights", "nowhere.safetensors", "--out", out)

    assert "nowhere.safetensors" in message
    assert "not found" in message


@pytest.mark.parametrize("kind", ["safetensors", "pth", "old.pth"])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.6], ids=["empty", "in the header", "in the tensors"])
def test_a_truncated_checkpoint_is_refused(
    refused: Refused, tiny_spec: str, state: dict[str, torch.Tensor], tmp_path: Path, out: Path, kind: str, keep: float
) -> None:
    file = tmp_path / f"w.{kind}"
    if kind == "safetensors":
        safetensors.numpy.save_file({k: v.numpy() for k, v in state.items()}, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=kind == "pth")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole))])

    message = refused("engine", tiny_spec, "--weights", file, "--out", out)

    assert "the checkpoint cannot be read" in message
    assert str(file) in message


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("text", ["<!doctype html><title>404 Not Found</title>", "These are not the weights.\n"])
def test_a_text_file_is_called_unreadable_and_not_malicious(
    refused: Refused, tiny_spec: str, tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text * 20)

    message = refused("export", tiny_spec, "--weights", name, "-o", "m.onnx")

    assert "the checkpoint cannot be read" in message
    assert name in message


class WantsToRun:
    """Unpickles to a call that leaves a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "plain pickle"])
@pytest.mark.parametrize("command", ["engine", "mask"])
def test_a_pickle_with_code_is_refused_and_not_run(
    refused: Refused, tiny_spec: str, tmp_path: Path, zipped: bool, command: str
) -> None:
    ran = tmp_path / "it-ran"
    file = tmp_path / "w.pth"
    torch.save({"state_dict": {"w": torch.zeros(1)}, "x": WantsToRun(ran)}, file, _use_new_zipfile_serialization=zipped)

    message = refused(command, tiny_spec, "--weights", file, "--out" if command == "engine" else "-o", tmp_path / "o")

    assert "would run code" in message
    assert "system" in message
    assert not ran.exists()


def test_keys_that_do_not_fit_are_counted_and_the_first_few_named(
    refused: Refused, tiny_spec: str, state: dict[str, torch.Tensor], tmp_path: Path, out: Path
) -> None:
    torch.save({f"encoder.{k}s": v for k, v in state.items()}, tmp_path / "w.pth")
    counted = [k for k in state if not k.endswith("num_batches_tracked")]

    message = refused("engine", tiny_spec, "--weights", "w.pth", "--out", out)

    assert f"{len(counted)} missing: {', '.join(counted[:5])} and {len(counted) - 5} more" in message
    assert f"{len(state)} not in the model: encoder.stem.weights" in message


def test_shapes_that_do_not_fit_are_named_with_both_shapes(
    refused: Refused, tiny_spec: str, state: dict[str, torch.Tensor], tmp_path: Path, out: Path
) -> None:
    torch.save({**state, "head.weight": torch.zeros(5, 8), "head.bias": torch.zeros(5)}, tmp_path / "w.pth")

    message = refused("engine", tiny_spec, "--weights", "w.pth", "--out", out)

    assert "2 with another shape" in message
    assert "head.weight is (5, 8), the model has (3, 8)" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(
    refused: Refused, tiny_spec: str, state: dict[str, torch.Tensor], tmp_path: Path, out: Path, value: float
) -> None:
    state["wide.weight"][3, 1, 2, 0] = value
    torch.save(state, tmp_path / "w.pth")

    message = refused("engine", tiny_spec, "--weights", "w.pth", "--out", out)

    assert "1 tensors contain NaN or infinity" in message
    assert "wide.weight" in message


def test_pretrained_weights_that_do_not_exist_are_refused(refused: Refused, tiny_spec: str, out: Path) -> None:
    assert "no pretrained weights" in refused("engine", tiny_spec, "--weights", "pretrained", "--out", out)
