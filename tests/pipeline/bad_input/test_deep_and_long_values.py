"""JSON and TOML that Python's own parsers refuse with other errors than a syntax error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deployable import built

from maskplan.engines.sidecar import sidecar_path

DEEP, LONG, WIDE = "[" * 100_000, "9" * 5000, "9" * 4000


@pytest.mark.parametrize("text", [DEEP, LONG, '{"a":' * 100_000, "null", "\ud800"], ids=lambda t: t[:6])
def test_a_sidecar(text: str, cli: Callable[..., Any], tmp_path: Path) -> None:
    engine = built(tmp_path / "engine")
    sidecar_path(engine).write_bytes(text.encode(errors="surrogatepass"))
    for command in (("inspect", engine), ("deploy", engine, "--repository", tmp_path / "models")):
        ran = cli(*command)
        assert ran.code == 3
        assert ran.err.startswith("error: the engine's sidecar cannot be read")


@pytest.mark.parametrize("digits", [LONG, WIDE], ids=["5000", "4000"])
def test_an_integer_in_a_sidecar(digits: str, cli: Callable[..., Any], tmp_path: Path) -> None:
    engine = built(tmp_path / "engine")
    path = sidecar_path(engine)
    path.write_text(path.read_text().replace('"bytes": ', f'"bytes": {digits}'))
    ran = cli("inspect", engine)
    assert ran.code == 3
    assert ran.err.startswith("error: the engine's sidecar cannot be read")


@pytest.mark.parametrize(
    "text",
    [
        f"a = {DEEP}",
        f"[learn]\nseed = {LONG}",
        f"[learn]\nseed = {WIDE}",
        f"[learn]\nlr = {WIDE}",
        "[time]\nbatches = [[1]]",
    ],
    ids=["deep", "long seed", "wide seed", "wide rate", "nested"],
)
def test_a_recipe(text: str, cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text)
    ran = cli("engine", "digits_resnet", "--recipe", tmp_path / "r.toml", "--out", tmp_path / "out")
    assert ran.code == 3
    assert "recipe" in ran.err.splitlines()[0]
    assert len(ran.err) < 1500
    assert not (tmp_path / "out").exists()
