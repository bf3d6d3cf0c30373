"""The package's declarations against what is in it."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "exporters", "calibration", "engines")
# Import name to distribution name, where they differ.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "google": "protobuf", "cuda": "cuda-python"}
# Comes with another one that is declared.
IMPLIED = {"ml_dtypes": "onnx", "rich": "typer"}


def project() -> dict[str, Any]:
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~\[; ]", r)[0] for r in requirements}


def imported(file: Path, top_level: bool) -> set[str]:
    """Top-level names of the packages that a file imports, everywhere or when it is itself imported."""
    found = set()
    tree = ast.parse(file.read_text())
    typing_only = {
        id(n)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for n in ast.walk(block)
    }
    for node in tree.body if top_level else ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - set(PACKAGES)


def sources() -> list[Path]:
    return [p for package in PACKAGES for p in (ROOT / package).rglob("*.py")]


def test_every_import_is_declared() -> None:
    base = names(project()["dependencies"])
    extras = {r for rs in project()["optional-dependencies"].values() for r in names(rs)}
    missing = set()
    for file in sources():
        for name in imported(file, top_level=False):
            distribution = DISTRIBUTIONS.get(name, IMPLIED.get(name, name))
            if distribution not in base | extras:
                missing.add(f"{file.relative_to(ROOT)}: {name}")
    assert not missing
    assert len(sources()) > 50


# Kernels that are numba throughout; their callers import them inside functions.
KERNELS = {"pipeline/masking/compiled.py", "pipeline/permutation/anneal.py"}


def test_modules_outside_learning_need_only_the_base_install_to_be_imported() -> None:
    base = names(project()["dependencies"])
    wrong = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in sources()
        if not {"learning", "bundled"} & set(file.parts) and str(file.relative_to(ROOT)) not in KERNELS
        for name in imported(file, top_level=True)
        if DISTRIBUTIONS.get(name, IMPLIED.get(name, name)) not in base
    }
    assert not wrong


def test_the_installed_command_is_the_one_declared() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="maskplan")
    assert script.value == project()["scripts"]["maskplan"] == "pipeline.__main__:main"
    assert callable(script.load())
    assert importlib.metadata.version("maskplan") == project()["version"]


def test_pinned_versions_satisfy_the_declared_ranges() -> None:
    packaging = pytest.importorskip("packaging.requirements")
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if "==" in line:
            name, _, version = line.partition("==")
            pinned[name.lower().replace("_", "-")] = version
    groups = project()["optional-dependencies"]
    for text in [*project()["dependencies"], *groups["learn"], *groups["dev"]]:
        requirement = packaging.Requirement(text)
        version = pinned[requirement.name.lower()]
        assert requirement.specifier.contains(version, prereleases=True), f"{text}, pinned {version}"


def test_data_files_are_part_of_the_package() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    present = {
        f"{p.parent.relative_to(ROOT).as_posix().replace('/', '.')}:{p.name}"
        for package in PACKAGES
        for p in (ROOT / package).rglob("*")
        if p.is_file() and p.suffix != ".py" and "__pycache__" not in p.parts
    }
    assert present == {f"{package}:{name}" for package, files in declared.items() for name in files}
