"""Odd modules at every command: messages, never tracebacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import odd_modules
import onnx
import pytest

# Reparametrizations by hooks, TorchScript and eager quantization are deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

NO_BOUNDS = ("attention", "circular", "five_axes", "functional_standardized", "plain_tensor", "sequences", "transposed")
NO_BOUNDS += ("volumes",)
UNOBSERVED = ("functional", "bare_parameters")
# Those that something special is done for; the slow tests take all modules.
SELECTED = ("weight_norm_hooks", "orthogonal", "pruned", "own_hook", "asp", "standardized_same", "data_parallel_part")
SELECTED += ("averaged", "tied_channels_last", "lazy", "volumes", "sequences", "attention", "zeros", *UNOBSERVED)


class Ran(Protocol):
    code: int
    out: str
    err: str


Cli = Callable[..., Ran]


@pytest.fixture
def spec(tmp_path: Path) -> Callable[[str], str]:
    (tmp_path / "odd.py").write_text(odd_modules.SOURCE)
    (tmp_path / "quick.toml").write_text("[learn]\nepochs = 1\n")
    return lambda name: f"{tmp_path / 'odd.py'}:{name}"


def passes(ran: Ran) -> None:
    assert ran.code == 0, ran.err


def is_refused(ran: Ran, says: str) -> None:
    """One message, and no exception, which the fixture would not catch."""
    assert ran.code == 3, ran
    assert says in ran.err
    assert ran.err.count("error:") == 1


@pytest.mark.parametrize("name", SELECTED)
def test_a_usable_module_is_masked_and_baked_and_its_files_are_read_back(
    cli: Cli, spec: Callable[[str], str], tmp_path: Path, name: str
) -> None:
    masks, sparse = tmp_path / "m.safetensors", tmp_path / "s.safetensors"
    model = (spec(name), "--weights", "random")
    passes(cli("mask", *model, "--method", "magnitude", "-o", masks))
    passes(cli("bake", *model, "--masks", masks, "-o", sparse))
    passes(cli("mask", spec(name), "--weights", sparse, "--method", "magnitude", "-o", tmp_path / "again.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("name", odd_modules.WORKING)
def test_a_usable_module_is_taken_by_every_command(
    cli: Cli, spec: Callable[[str], str], tmp_path: Path, toy_data: Path, name: str
) -> None:
    masks, sparse, dense = (tmp_path / f"{n}.safetensors" for n in ("masks", "sparse", "permuted"))
    model, data = (spec(name), "--weights", "random"), ("--data", toy_data)
    passes(cli("mask", *model, *data, "--method", "learned", "--recipe", tmp_path / "quick.toml", "-o", masks))
    passes(cli("permute", *model, "--effort", "0.01", "-o", dense))
    passes(cli("bake", *model, "--masks", masks, "-o", sparse))
    passes(cli("export", spec(name), "--weights", sparse, "-o", tmp_path / "sparse.onnx"))
    passes(cli("check", tmp_path / "sparse.onnx"))
    assert onnx.load(tmp_path / "sparse.onnx").graph.node
    for ran in (
        cli("mask", *model, *data, "--method", "layerwise", "-o", masks),
        cli("convert", *model, *data, "-o", tmp_path / "converted.safetensors"),
    ):
        if name in UNOBSERVED:
            is_refused(ran, "without calling the layers")
        else:
            passes(ran)
    ran = cli("stability", *model, *data, "--masks", masks)
    if name in NO_BOUNDS:
        is_refused(ran, "the bounds do not cover the model")
    else:
        passes(ran)


@pytest.mark.parametrize("name", odd_modules.REFUSED)
def test_a_module_that_cannot_be_used_is_refused_with_its_reason(
    cli: Cli, spec: Callable[[str], str], tmp_path: Path, name: str
) -> None:
    ran = cli("mask", spec(name), "--weights", "random", "--method", "magnitude", "-o", tmp_path / "m.safetensors")
    is_refused(ran, odd_modules.REFUSED[name])
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*odd_modules.REFUSED, "branching"])
@pytest.mark.parametrize("command", ["engine", "permute", "convert", "export", "stability"])
def test_no_command_ends_in_a_traceback_for_a_module_that_cannot_be_used(
    cli: Cli, spec: Callable[[str], str], tmp_path: Path, toy_data: Path, name: str, command: str
) -> None:
    options = {
        "engine": ("--data", toy_data, "--masks", "layerwise", "--out", tmp_path / "out"),
        "permute": ("-o", tmp_path / "p.safetensors"),
        "convert": ("--data", toy_data, "-o", tmp_path / "c.safetensors"),
        "export": ("-o", tmp_path / "m.onnx"),
        "stability": ("--data", toy_data, "--masks", tmp_path / "none.safetensors"),
    }[command]
    ran = cli(command, spec(name), "--weights", "random", *options)
    assert ran.code in (0, 1, 3), ran
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("name", ["weight_norm_parametrized", "standardized", "tied_channels_last"])
def test_the_exported_file_conforms_after_masking_a_folded_or_tied_weight(
    cli: Cli, spec: Callable[[str], str], tmp_path: Path, name: str
) -> None:
    masks, sparse = tmp_path / "m.safetensors", tmp_path / "s.safetensors"
    model = (spec(name), "--weights", "random")
    passes(cli("mask", *model, "--method", "magnitude", "-o", masks))
    passes(cli("bake", *model, "--masks", masks, "-o", sparse))
    passes(cli("export", spec(name), "--weights", sparse, "-o", tmp_path / "s.onnx"))
    passes(cli("check", tmp_path / "s.onnx"))
