"""The repository itself: sizes, names, paths, the README's promises and the Makefile's."""

from __future__ import annotations

import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 450
# Names of earlier versions that readers had to look up, and what replaced them.
OLD_NAMES = {
    "in_turn": "interleaved",
    "InTurn": "Interleaved",
    "told": "parse_..., format_...",
    "_told": "parse_..., format_...",
    "told_by": "parse_..., format_...",
    "Heard": "TrtLogCapture",
    "Spent": "CallTiming",
    "Seen": "ForwardObservation",
    "heed": "raise_pending",
    "softness": "distill_temperature",
    "held_down_by": "throttle_reasons",
    "narrator": "stderr_console",
    "speaks": "is_main_process",
    "survey": "trace_layers",
    "fp32_parts": "fp32_islands",
    "set_apart": "fp32_islands",
    "torus": "conv_spectrum",
    "report_recipe": "danhofer2024",
    "likely_to_win": "likely_speedup",
    "STAGES_VERSION": "STAGE_VERSIONS",
    "beside_int8": "a stage of its own",
    "Finished": "LineResult",
    "module_of": "load_module",
    "rebuilt": "rebuild_module",
}


def tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_is_large() -> None:
    assert {p.name: p.stat().st_size for p in tracked() if p.stat().st_size > 1 << 20} == {}


def test_no_python_file_is_longer_than_450_lines() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in tracked() if p.suffix == ".py"}
    assert len(lengths) > 200
    assert {n: length for n, length in lengths.items() if length > MAX_LINES} == {}


def identifiers(text: str) -> set[str]:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


def test_no_old_name_is_left_in_the_package() -> None:
    """Only identifiers and file names: a text may still name an old flag or field that is accepted."""
    found = []
    for folder in ("pipeline", "exporters", "calibration", "engines"):
        for path in (ROOT / folder).rglob("*.py"):
            used = identifiers(path.read_text()) | {path.stem}
            found += [
                f"{path.relative_to(ROOT)}: {old}, now {OLD_NAMES[old]}" for old in sorted(used & OLD_NAMES.keys())
            ]
    assert found == []
    assert identifiers("def survey(x): return 'told'") == {"def", "survey", "x", "return"}


def test_no_file_contains_a_path_of_a_developers_machine() -> None:
    home = re.compile(r"(?<![\w.])/(?:home|root|Users|work)/\w")
    found = []
    for path in tracked():
        if path.suffix in (".py", ".md", ".toml", ".txt", ".json", ".j2", ".yml", "") and path != Path(__file__):
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
                if home.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found


def test_code_and_tests_mirror_each_other() -> None:
    """Every folder of tests belongs to a folder of the package."""
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
    commands = set(re.findall(r"^\s*\$ maskplan ([a-z][a-z-]*)", text, re.MULTILINE)) | set(
        re.findall(r"`maskplan ([a-z][a-z-]*)", text)
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
