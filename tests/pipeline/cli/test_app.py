"""The command line as a shell sees it: exit codes, streams, help, and what a command imports before it needs it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from maskplan.pipeline.cli.app import main

COMMANDS = (
    "engine",
    "mask",
    "bake",
    "export",
    "permute",
    "convert",
    "check",
    "prune",
    "compare",
    "calibrate",
    "build",
    "time",
    "inspect",
    "deploy",
    "stability",
    "probe",
)

# Runs the help of every command where the heavy libraries cannot be imported, and gives back what was printed.
HELP = """
import contextlib, importlib.abc, io, json, sys

HEAVY = {"torch", "torchvision", "onnxruntime", "onnx", "polygraphy", "matplotlib", "timm"}
HEAVY |= {"tensorrt", "pycuda", "sklearn", "scipy", "numba"}

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ImportError(f"{name} was imported")

sys.meta_path.insert(0, Refuse())
from maskplan.pipeline.cli.app import main

found = {}
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*command, "--help"])
    found[" ".join(command)] = [code, out.getvalue(), err.getvalue()]
print(json.dumps({"found": found, "heavy": sorted(HEAVY & set(sys.modules))}))
"""

# A command with a bug, beside the real ones.
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


@pytest.fixture(scope="module")
def helped() -> dict[str, Any]:
    """The help of the app (under "") and of every command, from a process without the heavy libraries."""
    done = python(HELP, json.dumps([[], *([name] for name in COMMANDS)]))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def examples(page: str) -> list[list[str]]:
    """Commands in the part of a help page that gives examples."""
    _, _, after = page.partition("Example")
    return [shlex.split(line)[1:] for line in map(str.strip, after.splitlines()) if line.startswith("maskplan ")]


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"maskplan {metadata.version('maskplan')}\n"


def test_help_needs_none_of_the_heavy_libraries(helped: dict[str, Any]) -> None:
    assert helped["heavy"] == []
    assert set(helped["found"]) == {"", *COMMANDS}
    for code, out, err in helped["found"].values():
        assert (code, err) == (0, "")
        assert "Usage: maskplan" in out


def test_the_first_page_lists_every_command(helped: dict[str, Any]) -> None:
    page = helped["found"][""][1]
    listed = re.findall(r"^\W*([a-z]+)  +[A-Z]", page.partition("Commands")[2], re.MULTILINE)
    assert tuple(listed) == COMMANDS
    assert len(examples(page)) >= 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_the_command_does_and_shows_it(command: str, helped: dict[str, Any]) -> None:
    _, page, _ = helped["found"][command]
    assert f"Usage: maskplan {command}" in page
    shown = examples(page)
    assert shown
    assert any(words[0] == command for words in shown)
    # An option without a word of help helps nobody.
    options = [line for line in page.splitlines() if re.match(r"\W*--[a-z]", line)]
    assert len(options) >= 2
    for line in options:
        told = re.sub(r"--?[\w-]+|<[^>]*>|\[[^]]*\]|\W", "", line)
        assert told, line


def test_every_example_is_one_that_the_parser_takes(helped: dict[str, Any]) -> None:
    from typer.main import get_command

    from maskplan.pipeline.cli.app import app

    group: Any = get_command(app)
    swept = 0
    for _, page, _ in helped["found"].values():
        for name, *arguments in examples(page):
            command = group.commands[name]
            with command.make_context(name, list(arguments)) as context:
                assert context.args == []
            swept += 1
    assert swept >= len(COMMANDS) + 2


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
def test_wrong_usage_ends_with_2(arguments: list[str], says: str, cli: Callable[..., Any]) -> None:
    ran = cli(*arguments)
    assert ran.code == 2
    assert says in ran.err
    assert "Usage: maskplan" in ran.err
    assert ran.out == ""


def test_a_misspelt_command_is_answered_with_the_likely_one(cli: Callable[..., Any]) -> None:
    assert "'engine'" in cli("engin").err


def test_without_a_command_the_help_is_shown(cli: Callable[..., Any]) -> None:
    ran = cli()
    assert ran.code == 2
    assert all(command in ran.out + ran.err for command in COMMANDS)


def test_a_check_that_passes_ends_with_0_and_one_that_fails_with_1(
    cli: Callable[..., Any], finished_digits: Path
) -> None:
    good, bad = cli("check", finished_digits / "sparse.onnx"), cli("check", finished_digits / "dense.onnx")
    assert (good.code, good.err) == (0, "")
    assert bad.code == 1
    assert bad.err.startswith("failed: ")
    assert "dense.onnx" in bad.err
    # The verdict is the result, and stands on stdout either way.
    assert "pass: 8 conforming" in good.out
    assert "fail: " in bad.out


def test_bad_input_ends_with_3_and_one_message_on_stderr(cli: Callable[..., Any], tmp_path: Path) -> None:
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


def test_an_interrupted_command_ends_with_130(mask_of_a_model_that: Callable[[str], Any]) -> None:
    ran = mask_of_a_model_that("KeyboardInterrupt")
    assert ran.code == 130
    assert "interrupted" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("raised", ["SystemExit", "SystemExit(0)", "SystemExit('no accelerator')", "ValueError"])
def test_code_of_the_users_cannot_end_a_command_as_if_all_were_well(
    raised: str, mask_of_a_model_that: Callable[[str], Any], tmp_path: Path
) -> None:
    ran = mask_of_a_model_that(raised)
    assert not (tmp_path / "m.safetensors").exists()
    assert ran.code == 3
    assert "net.py" in ran.err


@pytest.fixture
def narrated(digits: Path, cli: Callable[..., Any]) -> Callable[..., Any]:
    """Run the line again in a finished folder; every stage says that it is unchanged."""

    def run(*before: str) -> Any:
        ran = cli(*before, "engine", "digits_resnet", "--out", digits)
        assert ran.code == 0, ran.err
        return ran

    return run


def test_quiet_leaves_the_result_alone(narrated: Callable[..., Any]) -> None:
    usual, quiet, again = narrated(), narrated("-q"), narrated()
    assert "check: unchanged" in usual.err
    assert quiet.err == ""
    assert quiet.out == usual.out != ""
    # One command's choice does not outlive it.
    assert again.err == usual.err


def test_verbose_says_more(narrated: Callable[..., Any]) -> None:
    usual, verbose, spelt_out = narrated(), narrated("-v"), narrated("--verbose")
    assert verbose.out == spelt_out.out == usual.out
    assert set(usual.err.splitlines()) <= set(verbose.err.splitlines())
    assert len(verbose.err) > len(usual.err)


def test_warnings_are_heard_even_when_quiet(cli: Callable[..., Any], digits: Path, tmp_path: Path) -> None:
    masks = digits / "masks.safetensors"
    ran = cli(
        "-q", "bake", "digits_resnet", "--weights", "random", "--masks", masks, "-o", tmp_path / "sparse.safetensors"
    )
    assert ran.code == 0, ran.err
    assert ran.err.startswith("warning: ")
    assert "other weights" in ran.err


def test_the_module_is_the_command(finished_digits: Path) -> None:
    code = "import runpy, sys; sys.argv[1:] = sys.argv[1:]; runpy.run_module('maskplan.pipeline', run_name='__main__')"
    done = python(code, "inspect", str(finished_digits / "engine.onnx"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("engine     engine.onnx")
    assert python(code, "inspect", "none.onnx").returncode == 3


def test_main_returns_its_code_and_does_not_end_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert [main(["--help"]), main(["nothing"]), main(["inspect", "none.onnx"])] == [0, 2, 3]
    capsys.readouterr()
