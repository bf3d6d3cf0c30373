"""The JSON file next to an engine: its record, its provenance, and the digest that is verified before loading."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from maskplan.pipeline.core.artifacts import EngineFile
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.files import read_bytes, sha256_of, write_json
from maskplan.pipeline.core.serialization import decode, encode, parse_json


def sidecar_path(engine: Path) -> Path:
    """The sidecar's path: `engine.plan.json` for `engine.plan`."""
    return engine.with_name(engine.name + ".json")


def write_sidecar(engine: EngineFile) -> None:
    """Write the record next to the engine; paths in it are relative, so that both can be moved together."""
    write_json(sidecar_path(engine.path), encode(engine, engine.path.parent))


def has_sidecar(engine: EngineFile) -> bool:
    """Whether the sidecar on disk equals the record."""
    try:
        stored = decode(EngineFile, parse_json(read_bytes(sidecar_path(engine.path))), engine.path.parent)
    except (InputError, ValueError):
        return False
    return stored == engine


def read_engine(path: Path) -> EngineFile:
    """Read the record of an engine and verify the engine's digest against it.

    Raises:
        InputError: The engine or its sidecar is missing or unreadable, or the digests differ.
    """
    if not path.is_file():
        raise InputError("engine not found", where=path, fix="build it first: maskplan build model.onnx -o engine.onnx")
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        raise InputError(
            "the engine has no sidecar",
            where=path,
            found=f"no {sidecar.name}",
            fix="copy the sidecar together with the engine, or rebuild the engine",
        )
    try:
        record = decode(EngineFile, parse_json(read_bytes(sidecar)), path.parent)
    except ValueError as error:
        raise InputError(
            "the engine's sidecar cannot be read", where=sidecar, found=error, fix="build the engine again"
        ) from error
    sha256 = sha256_of(path)
    if sha256 != record.sha256:
        raise InputError(
            "the engine does not match its sidecar",
            where=path,
            found=f"sha256 {sha256[:12]}, expected {record.sha256[:12]}",
            fix="rebuild the engine; do not load this file",
        )
    return replace(record, path=path)
