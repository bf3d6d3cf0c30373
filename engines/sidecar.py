"""The JSON file beside an engine: what it is, what made it, and the digest that is checked before it is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from maskplan.pipeline.core.artifacts import EngineFile
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.files import read_bytes, sha256_of, write_json
from maskplan.pipeline.core.serialization import decode, encode


def sidecar_path(engine: Path) -> Path:
    """`engine.plan` has its sidecar in `engine.plan.json`."""
    return engine.with_name(engine.name + ".json")


def write_sidecar(engine: EngineFile) -> None:
    """Write the record beside the engine; its path is relative, so that both can be moved together."""
    write_json(sidecar_path(engine.path), encode(engine, engine.path.parent))


def has_sidecar(engine: EngineFile) -> bool:
    """Whether the sidecar says what the record does."""
    try:
        stored = decode(EngineFile, json.loads(read_bytes(sidecar_path(engine.path))), engine.path.parent)
    except (InputError, ValueError):
        return False
    return stored == engine


def read_engine(path: Path) -> EngineFile:
    """The record of an engine file, after its bytes have been held against it.

    Raises:
        InputError: There is no engine, no sidecar, or the engine is not the one that the sidecar describes.
    """
    if not path.is_file():
        raise InputError("engine not found", where=path, fix="build it first: maskplan build model.onnx -o engine.onnx")
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        raise InputError(
            "the engine has no sidecar",
            where=path,
            found=f"no {sidecar.name}",
            fix="copy the sidecar with the engine, or build again",
        )
    try:
        record = decode(EngineFile, json.loads(read_bytes(sidecar)), path.parent)
    except ValueError as error:
        raise InputError(
            "the engine's sidecar cannot be read", where=sidecar, found=error, fix="build the engine again"
        ) from error
    found = sha256_of(path)
    if found != record.sha256:
        raise InputError(
            "the engine is not the one that its sidecar describes",
            where=path,
            found=f"sha256 {found[:12]}, the sidecar says {record.sha256[:12]}",
            fix="build it again; do not load it",
        )
    return replace(record, path=path)
