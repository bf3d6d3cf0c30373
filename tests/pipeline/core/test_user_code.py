"""Users' Python files, edited between two readings."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from maskplan.pipeline.core.user_code import create_module, execute, imports_from

MODULES = ("user_helper", "user_package", "user_package.helper")


@pytest.fixture(autouse=True)
def forget_modules() -> None:
    for name in MODULES:
        sys.modules.pop(name, None)


def run(file: Path) -> int:
    """The value that the file computes, in a process that has read none of its modules."""
    for name in MODULES:
        sys.modules.pop(name, None)
    importlib.invalidate_caches()
    module = create_module(file, "user_file")
    assert module is not None
    with imports_from(file.parent):
        execute(module)
    value: int = module.VALUE
    return value


def write(file: Path, text: str) -> None:
    """Write a text of the same size at the same time as every other."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    os.utime(file, (1_000_000_000, 1_000_000_000))


@pytest.mark.parametrize(
    ("changed", "importing"),
    [
        ("net.py", "VALUE = 1"),
        ("user_helper.py", "from user_helper import VALUE"),
        ("user_package/helper.py", "from user_package.helper import VALUE"),
        ("user_package/__init__.py", "from user_package import VALUE"),
    ],
)
def test_an_edit_of_the_same_size_in_the_same_second_is_read(changed: str, importing: str, tmp_path: Path) -> None:
    write(tmp_path / "net.py", importing)
    write(tmp_path / changed, "VALUE = 1")
    # As after the user's own run, which leaves bytecode.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run([sys.executable, "-c", "import net"], cwd=tmp_path, check=True, env=environment)
    assert list(tmp_path.rglob("*.pyc"))
    assert run(tmp_path / "net.py") == 1
    write(tmp_path / changed, "VALUE = 2")
    assert run(tmp_path / "net.py") == 2


def test_what_python_can_import_can_be_imported(tmp_path: Path) -> None:
    write(tmp_path / "net.py", "import json, wave, numpy as np\nVALUE = np.int64(json.loads('3'))")
    assert run(tmp_path / "net.py") == 3


def test_the_paths_are_as_before_even_after_an_exception(tmp_path: Path) -> None:
    write(tmp_path / "net.py", "1 / 0")
    before = (list(sys.path), list(sys.meta_path))
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "net.py")
    assert (sys.path, sys.meta_path) == before


def test_other_files_are_refused(tmp_path: Path) -> None:
    assert create_module(tmp_path / "net.txt", "net") is None
