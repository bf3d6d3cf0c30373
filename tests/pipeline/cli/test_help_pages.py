"""Help pages: what they show, and that they are fast: none of the heavy libraries is imported."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

from maskplan.pipeline.cli.app import app

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
    "convert-precision",
    "build",
    "time",
    "inspect",
    "deploy",
    "serve-check",
    "stability",
    "probe",
)

# Prints the help page of every command as JSON, in a process where the heavy libraries cannot be imported. ONNX and
# NumPy can: some options records are in modules that need them. The first page imports neither.
PRINT_PAGES = """
import contextlib, importlib.abc, io, json, sys

HEAVY = {"torch", "torchvision", "onnxruntime", "polygraphy", "matplotlib", "timm"}
HEAVY |= {"tensorrt", "pycuda", "sklearn", "scipy", "numba"}

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ImportError(f"{name} was imported")

sys.meta_path.insert(0, Refuse())
from maskplan.pipeline.cli.app import main

pages, on_first_page = {}, set()
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*command, "--help"])
    pages[" ".join(command)] = [code, out.getvalue(), err.getvalue()]
    if not command:
        on_first_page = {"onnx", "numpy"} & set(sys.modules)
print(json.dumps({"pages": pages, "imported": sorted((HEAVY & set(sys.modules)) | on_first_page)}))
"""


@pytest.fixture(scope="module")
def printed() -> dict[str, Any]:
    """The page of the app (under "") and of every command, and what was imported."""
    command = [sys.executable, "-c", PRINT_PAGES, json.dumps([[], *([name] for name in COMMANDS)])]
    environment = {"COLUMNS": "300", "TERM": "dumb", "PATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def pages(printed: dict[str, Any]) -> dict[str, str]:
    return {name: out for name, (_, out, _) in printed["pages"].items()}


def examples(page: str) -> list[list[str]]:
    """Commands in the part of a help page that gives examples."""
    _, _, after = page.partition("Examples:")
    return [shlex.split(line)[1:] for line in map(str.strip, after.splitlines()) if line.startswith("maskplan ")]


def test_help_needs_none_of_the_heavy_libraries(printed: dict[str, Any]) -> None:
    assert printed["imported"] == []
    assert set(printed["pages"]) == {"", *COMMANDS}
    for code, out, err in printed["pages"].values():
        assert (code, err) == (0, "")
        assert "Usage: maskplan" in out


def test_the_first_page_lists_every_command(pages: dict[str, str]) -> None:
    listed = re.findall(r"^\W*([a-z-]+)  +[A-Z]", pages[""].partition("Commands")[2], re.MULTILINE)
    assert tuple(listed) == COMMANDS
    assert len(examples(pages[""])) >= 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_page_has_an_example_and_describes_every_option(command: str, pages: dict[str, str]) -> None:
    page = pages[command]
    assert f"Usage: maskplan {command}" in page
    assert any(words[0] == command for words in examples(page))
    # Markup and emoji codes of rich must not eat parts of the text.
    assert "``" not in page
    assert page.isascii() or not re.search(r"[^\x00-\x7f─-╿…]", page)
    options = [line for line in page.splitlines() if re.match(r"\W*--[a-z]", line)]
    assert len(options) >= 2
    for line in options:
        text = re.sub(r"--?[\w-]+|<[^>]*>|\[[^]]*\]|\W", "", line)
        assert text, line


def test_every_example_is_one_that_the_parser_takes(pages: dict[str, str]) -> None:
    group: Any = get_command(app)
    swept = 0
    for page in pages.values():
        for name, *arguments in examples(page):
            command = group.commands[name]
            with command.make_context(name, list(arguments)) as context:
                assert context.args == []
            swept += 1
    assert swept >= len(COMMANDS) + 2


def options_with_recorded_defaults() -> Iterator[tuple[str, Any, object]]:
    """Command, parameter and default value of every option whose default is in an options record."""
    group: Any = get_command(app)
    for name, command in group.commands.items():
        values = {key: value for defaults in command.defaults for key, value in defaults().items()}
        for parameter in command.params:
            if parameter.name in values and parameter.name != "seed":
                yield name, parameter, values[parameter.name]


def test_defaults_are_in_the_options_records_only_and_shown_from_there(pages: dict[str, str]) -> None:
    swept = set()
    for name, parameter, value in options_with_recorded_defaults():
        assert parameter.default is None, f"{name} {parameter.name} has a default of its own"
        if value is None or value == ():
            continue
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        if isinstance(value, bool):
            shown = (parameter.opts if value else parameter.secondary_opts)[0].removeprefix("--")
        row = pages[name].partition(f"{parameter.opts[0]} ")[2].partition("\u2502\n\u2502 --")[0]
        assert f"[default: {shown}]" in row, f"{name} {parameter.name}"
        swept.add((name, parameter.name))
    assert len(swept) >= 40
    assert {("calibrate", "method"), ("time", "batch"), ("convert", "damping"), ("engine", "max_top1_drop")} <= swept
