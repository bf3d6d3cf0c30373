"""The command line as a shell sees it: exit codes, stdout and stderr."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from conformance_models import convolutions

from maskplan.pipeline.cli.app import main

# The app with one more command, which has a bug.
BUG = """
import sys
from maskplan.pipeline.cli.app import app, main

@app.command()
def broken():
    raise ZeroDivisionError("a bug of ours")

sys.exit(main(["broken"]))
"""


def python(code: str, *arguments: str, width: int = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    environment = {"COLUMNS": str(width), "TERM": "dumb", "PATH": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"maskplan {metadata.version('maskplan')}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["engin"], "engin"),
        (["quantize", "x.onnx"], "quantize"),
        (["check"], "Missing argument"),
        (["check", "a.onnx", "--strikt"], "--strikt"),
        (["check", "a.onnx", "b.onnx"], "unexpected"),
        (["engine", "--seed", "many"], "--seed"),
        (["engine", "--budget-minutes", "-1"], "--budget-minutes"),
        (["bake", "digits_resnet"], "--masks"),
        (["--loud"], "--loud"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], says: str, cli: Callable[..., Any]) -> None:
    ran = cli(*arguments)
    assert ran.code == 2
    assert says in ran.err
    assert "Usage: maskplan" in ran.err
    assert ran.out == ""


def test_a_misspelled_command_gets_a_suggestion(cli: Callable[..., Any]) -> None:
    assert "'engine'" in cli("engin").err


def test_without_a_command_the_help_is_shown(cli: Callable[..., Any]) -> None:
    ran = cli()
    assert ran.code == 2
    assert "Usage: maskplan" in ran.out + ran.err
    assert "engine" in ran.out + ran.err


def test_a_check_exits_with_0_or_1(cli: Callable[..., Any], finished_digits: Path) -> None:
    good, bad = cli("check", finished_digits / "sparse.onnx"), cli("check", finished_digits / "dense.onnx")
    assert (good.code, good.err) == (0, "")
    assert bad.code == 1
    assert bad.err.startswith("failed: ")
    assert "dense.onnx" in bad.err
    # The result goes to stdout whether it passes or fails.
    assert "pass: 8 conforming" in good.out
    assert "fail: " in bad.out


def test_bad_input_exits_with_3_and_one_message_on_stderr(cli: Callable[..., Any], tmp_path: Path) -> None:
    ran = cli("check", tmp_path / "none.onnx")
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.startswith("error: ")
    assert str(tmp_path / "none.onnx") in ran.err
    assert "fix:" in ran.err
    assert "Traceback" not in ran.err


def test_a_bug_keeps_its_traceback() -> None:
    done = python(BUG)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.rstrip().endswith("ZeroDivisionError: a bug of ours")
    assert "error:" not in done.stderr


MODEL_THAT = "def build():\n    raise {}\n"


@pytest.fixture
def mask_of_a_model_that(tmp_path: Path, cli: Callable[..., Any]) -> Callable[[str], Any]:
    """Run `mask` on a model whose factory raises."""

    def run(raised: str) -> Any:
        (tmp_path / "net.py").write_text(MODEL_THAT.format(raised))
        return cli("mask", f"{tmp_path / 'net.py'}:build", "--weights", "random", "-o", tmp_path / "m.safetensors")

    return run


def test_an_interrupted_command_exits_with_130(mask_of_a_model_that: Callable[[str], Any]) -> None:
    ran = mask_of_a_model_that("KeyboardInterrupt")
    assert ran.code == 130
    assert "interrupted" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("raised", ["SystemExit", "SystemExit(0)", "SystemExit('no accelerator')", "ValueError"])
def test_an_exit_in_the_users_model_file_is_an_error(
    raised: str, mask_of_a_model_that: Callable[[str], Any], tmp_path: Path
) -> None:
    ran = mask_of_a_model_that(raised)
    assert not (tmp_path / "m.safetensors").exists()
    assert ran.code == 3
    assert "net.py" in ran.err


def test_quiet_and_verbose_change_stderr_only(digits: Path, finished_digits: Path, cli: Callable[..., Any]) -> None:
    """The line is run again in a finished folder, where every stage prints that it is unchanged."""
    recipe = finished_digits.parent / "recipe.toml"

    def run_again(*option: str) -> Any:
        ran = cli(*option, "engine", "digits_resnet", "--recipe", recipe, "--out", digits)
        assert ran.code == 0, ran.err
        return ran

    verbose, quiet, normal = run_again("-v"), run_again("--quiet"), run_again()
    assert verbose.out == quiet.out == normal.out != ""
    assert quiet.err == ""
    assert "check: unchanged" in normal.err
    assert set(normal.err.splitlines()) < set(verbose.err.splitlines())


def test_quiet_prints_warnings(cli: Callable[..., Any], digits: Path, tmp_path: Path) -> None:
    masks = digits / "masks.safetensors"
    ran = cli(
        "-q", "bake", "digits_resnet", "--weights", "random", "--masks", masks, "-o", tmp_path / "sparse.safetensors"
    )
    assert ran.code == 0, ran.err
    assert ran.err.startswith("warning: ")
    assert "other weights" in ran.err


def test_the_module_runs_the_command() -> None:
    code = "import runpy, sys; runpy.run_module('maskplan.pipeline', run_name='__main__')"
    done = python(code, "inspect", "none.onnx")
    assert done.returncode == 3
    assert done.stderr.startswith("error: engine not found")


def test_main_returns_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert [main(["--help"]), main(["nothing"]), main(["inspect", "none.onnx"])] == [0, 2, 3]
    capsys.readouterr()


LONG = "n" * 300
MISSING_NAMES = [
    ("check", LONG),
    ("inspect", LONG),
    ("time", LONG, LONG),
    ("compare", f"{LONG}.onnx", f"{LONG}.onnx"),
    ("deploy", LONG, "--repository", "models"),
    ("calibrate", f"{LONG}.onnx"),
    ("build", f"{LONG}.onnx", "--backend", "onnxruntime"),
    ("prune", LONG),
    ("bake", "digits_resnet", "--masks", LONG),
    ("engine", "digits_resnet", "--weights", f"{LONG}.pth", "--out", "x"),
    ("engine", "digits_resnet", "--recipe", LONG, "--out", "x"),
    ("engine", "digits_resnet", "--out", LONG),
    ("engine", "digits_resnet", "--data", LONG, "--out", "x"),
]


@pytest.mark.parametrize("arguments", MISSING_NAMES, ids=lambda a: " ".join(a).replace(LONG, "LONG"))
def test_a_path_longer_than_the_system_allows_is_a_message(
    arguments: tuple[str, ...], cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = cli(*arguments)
    assert ran.code == 3
    assert "error: " in ran.err


def test_what_a_file_is_called_reaches_no_terminal_raw(cli: Callable[..., Any], tmp_path: Path) -> None:
    name = "\x1b[2J\n::error::x\r\x9b\udcff.onnx"
    (tmp_path / name).write_bytes(b"")
    for arguments in (("check", tmp_path / name), ("-v", "inspect", tmp_path / name), ("check", "a", name), (name,)):
        ran = cli(*arguments)
        assert ran.code in (2, 3)
        assert "\\x1b" in ran.err
        assert all(c == "\n" or c.isprintable() for c in ran.out + ran.err)
        assert not any(line.lstrip().startswith("::") for line in ran.err.splitlines())


def test_what_the_tensors_of_a_file_are_called_reaches_no_terminal_raw(cli: Callable[..., Any], tmp_path: Path) -> None:
    name = "w\x1b[2J\n::error::x\x01"
    onnx.save(convolutions(**{name: np.ones((8, 8, 1, 1), np.float32)}), tmp_path / "a.onnx")
    ran = cli("check", tmp_path / "a.onnx", "--junit", tmp_path / "j.xml")
    assert ran.code == 1
    assert "w\\x1b" in ran.out
    assert all(c == "\n" or c.isprintable() for c in ran.out + ran.err)
    assert not any(line.lstrip().startswith("::") for line in (ran.out + ran.err).splitlines())
    assert "w\\x1b[2J" in ElementTree.parse(tmp_path / "j.xml").getroot()[1].get("name", "")


def test_messages_name_the_option_that_was_given(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").write_bytes(b"")
    onnx.save(convolutions(w=np.ones((8, 8, 1, 1), np.float32)), tmp_path / "a.onnx")
    below = tmp_path / "plain" / "x"
    for arguments, option in (
        (("check", "a.onnx", "--report", below), "--report"),
        (("check", "a.onnx", "--junit", below), "--junit"),
        (("prune", "a.onnx", "-o", below), "--output"),
        (("prune", "a.onnx", "--report", below), "--report"),
        (("build", "a.onnx", "--backend", "onnxruntime", "-o", below), "--output"),
        (("engine", "digits_resnet", "--out", below), "--out"),
        (("engine", "digits_resnet", "--out", "new", "--repository", below), "--repository"),
        (("prune", "a.onnx", "-o", below), "--output"),
    ):
        ran = cli(*arguments)
        assert ran.code == 3, arguments
        assert ran.err.rstrip().endswith(f"with {option}"), ran.err


@pytest.mark.parametrize("repository", ["plain", "n" * 300])
def test_a_repository_is_judged_before_any_stage_runs(repository: str, cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    ran = cli("engine", "digits_resnet", "--out", tmp_path / "out", "--repository", tmp_path / repository)
    assert ran.code == 3
    assert ran.err.startswith("error: cannot write")
    assert not (tmp_path / "out").exists()
