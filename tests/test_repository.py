"""The repository itself: sizes, paths, the README's promises and the Makefile's."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST = 450


def tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_is_large() -> None:
    assert {p.name: p.stat().st_size for p in tracked() if p.stat().st_size > 1 << 20} == {}


def test_no_source_needs_a_table_of_contents() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in tracked() if p.suffix == ".py"}
    in_package = {n: length for n, length in lengths.items() if not n.startswith("tests/")}
    assert {n: length for n, length in in_package.items() if length > LONGEST} == {}


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    home = re.compile(r"(?<![\w.])/(?:home|root|Users|work)/\w")
    found = []
    for path in tracked():
        if path.suffix in (".py", ".md", ".toml", ".txt", ".json", ".j2", ".yml", "") and path != Path(__file__):
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
                if home.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found


def test_code_and_tests_mirror_each_other() -> None:
    """A test file of a package's folder is named after a module or after what the folder does as a whole."""
    for package in ("pipeline", "exporters", "calibration", "engines"):
        for folder in (ROOT / "tests" / package).rglob("test_*.py"):
            assert (ROOT / folder.parent.relative_to(ROOT / "tests")).is_dir() or folder.parent.name == "bad_input"


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_every_make_command_of_the_readme_exists() -> None:
    commands = set(re.findall(r"make ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert {"engine", "test"} <= commands <= targets()


def test_every_maskplan_command_of_the_readme_exists() -> None:
    from typer.main import get_command

    from maskplan.pipeline.cli.app import app

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    text = (ROOT / "README.md").read_text()
    commands = set(re.findall(r"^\s*\$ maskplan ([a-z]+)", text, re.MULTILINE)) | set(
        re.findall(r"`maskplan ([a-z]+)", text)
    )
    assert {"check", "compare", "engine"} <= commands <= known


def test_the_readmes_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_help_is_what_make_alone_prints() -> None:
    done = subprocess.run(["make", "-n"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "grep" in done.stdout


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("digits_resnet", "build/digits_resnet"),
        ("timm/resnet10t", "build/timm_resnet10t"),
        ("nets/mine.py:build", "build/mine_build"),
    ],
)
def test_the_makefile_and_the_line_agree_on_the_folder(model: str, folder: str) -> None:
    from maskplan.pipeline.models.registry import folder_name

    assert f"build/{folder_name(model)}" == folder
    done = subprocess.run(
        ["make", "-n", "deploy", f"MODEL={model}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert folder in done.stdout
