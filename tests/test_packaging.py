"""What pyproject.toml declares, against the source tree and a built wheel."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("pipeline", "exporters", "calibration", "engines")
# Import name to distribution name, where they differ.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "google": "protobuf", "cuda": "cuda-python"}
# Installed by another package that is declared.
IMPLIED = {"ml_dtypes": "onnx", "rich": "typer"}
# Import numba at the top; their callers import them inside functions.
KERNELS = {"pipeline/masking/compiled.py", "pipeline/permutation/anneal.py"}


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def project() -> dict[str, Any]:
    return dict(pyproject()["project"])


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~\[; ]", r)[0] for r in requirements}


def imported(file: Path, top_level: bool) -> set[str]:
    """Top-level names of the packages that a file imports, anywhere or when it is itself imported."""
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
    return found - set(sys.stdlib_module_names) - {"maskplan"}


def sources() -> list[Path]:
    return [p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")]


def import_name(folder: Path) -> str:
    return ".".join(("maskplan", *folder.relative_to(ROOT).parts))


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


def test_modules_outside_learning_need_only_the_base_install_to_be_imported() -> None:
    base = names(project()["dependencies"])
    # The bundled network is a torch module, the record of operators a torch mode: imported when a network is built or run.
    with_torch = {*KERNELS, "pipeline/models/digits_resnet.py", "pipeline/models/weight_uses.py"}
    wrong = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in sources()
        if "learning" not in file.parts and str(file.relative_to(ROOT)) not in with_torch
        for name in imported(file, top_level=True)
        if DISTRIBUTIONS.get(name, IMPLIED.get(name, name)) not in base
    }
    assert not wrong


def test_the_installed_command_is_the_declared_one() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="maskplan")
    assert script.value == project()["scripts"]["maskplan"] == "maskplan.pipeline.__main__:main"
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


def test_every_folder_with_python_files_is_a_declared_package() -> None:
    declared = pyproject()["tool"]["setuptools"]["packages"]
    assert sorted(declared) == sorted({import_name(file.parent) for file in sources()})


def test_data_files_are_part_of_the_package() -> None:
    declared = pyproject()["tool"]["setuptools"]["package-data"]
    present = {
        f"{import_name(p.parent)}:{p.name}"
        for folder in FOLDERS
        for p in (ROOT / folder).rglob("*")
        if p.is_file() and p.suffix != ".py" and "__pycache__" not in p.parts
    }
    assert present == {f"{package}:{name}" for package, files in declared.items() for name in files}


def test_the_wheel_installs_every_file_under_one_top_level_name(tmp_path: Path) -> None:
    source = tmp_path / "source"
    # A copy: setuptools writes its build folder into the source tree.
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; build_meta.build_wheel('wheel')"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in files} == {"maskplan"}
    assert files == {
        f"maskplan/{p.relative_to(source)}" for f in FOLDERS for p in (source / f).rglob("*") if p.is_file()
    }


def test_packages_of_the_user_with_the_names_of_our_folders_are_not_hidden(
    tmp_path: Path, maskplan: Callable[..., Any]
) -> None:
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("MINE = True\n")
    (tmp_path / "pipeline" / "blocks.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    (tmp_path / "net.py").write_text(
        "import calibration, engines, exporters\nfrom pipeline.blocks import Net\n\n"
        "assert calibration.MINE and engines.MINE and exporters.MINE\n\n\ndef build():\n    return Net()\n"
    )
    ran = maskplan(
        "mask", "net.py:build", "--method", "magnitude", "--weights", "random", "-o", "m.safetensors", cwd=tmp_path
    )
    assert ran.code == 0, ran.err
    assert (tmp_path / "m.safetensors").is_file()
