"""Which files a model's code consists of."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from maskplan.pipeline.models.registry import build_model, model_folder, model_sources
from maskplan.pipeline.models.sources import all_found, code_sha256, unchanged

NET = """
from torch import nn
import {package}.blocks as blocks


def net():
    from {package}.late import Late
    return nn.Sequential(blocks.conv(), Late(), nn.Flatten(), nn.Linear(8 * 36, 3))
"""
PREPROCESSING = 'PREPROCESSING = {"height": 8, "width": 8, "resize": 0, "mean": [0.5] * 3, "std": [0.25] * 3}\n'


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Path]:
    """A model's file whose code is in a package next to it, some of it imported late and relatively."""
    package = f"user_net_{tmp_path.name.replace('-', '_')}"
    folder = tmp_path / package
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "blocks.py").write_text(
        "from torch import nn\nfrom .widths import WIDTH\n\n\ndef conv():\n    return nn.Conv2d(3, WIDTH, 3)\n"
    )
    (folder / "widths.py").write_text("WIDTH = 8\n")
    (folder / "late.py").write_text("from torch import nn\n\n\nclass Late(nn.ReLU):\n    pass\n")
    (folder / "unused.py").write_text("UNUSED = 1\n")
    file = tmp_path / "net.py"
    file.write_text(PREPROCESSING + NET.format(package=package))
    yield file
    for name in [name for name in sys.modules if name.startswith(package)]:
        del sys.modules[name]


def test_all_that_was_imported_from_beside_the_file_is_found(net: Path) -> None:
    spec = f"{net}:net"
    build_model(spec, seed=0)
    names = {Path(source.name).name for source in model_sources(spec)}
    assert names == {"__init__.py", "blocks.py", "widths.py", "late.py"}


@pytest.mark.parametrize("changed", ["blocks.py", "widths.py", "late.py"])
def test_a_changed_neighbor_is_seen_and_an_unused_one_is_not(net: Path, changed: str) -> None:
    spec = f"{net}:net"
    build_model(spec, seed=0)
    sources = model_sources(spec)
    (package,) = [path for path in net.parent.iterdir() if path.is_dir() and path.name.startswith("user_net")]
    (package / "unused.py").write_text("UNUSED = 2\n")
    assert unchanged(sources, model_folder(spec))
    file = package / changed
    file.write_text(file.read_text() + "\n# changed\n")
    assert not unchanged(sources, model_folder(spec))
    assert code_sha256(("net", "x"), model_sources(spec)) != code_sha256(("net", "x"), sources)


def test_a_neighbor_that_is_missing_on_another_host_counts_as_unchanged(net: Path) -> None:
    spec = f"{net}:net"
    build_model(spec, seed=0)
    assert unchanged(model_sources(spec), net.parent / "elsewhere")
    assert all_found(model_sources(spec), net.parent)
    assert not all_found(model_sources(spec), net.parent / "elsewhere")


def test_a_library_model_has_no_files_of_its_own() -> None:
    assert model_sources("resnet18") == ()
