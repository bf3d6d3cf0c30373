"""Restore the version that a Triton repository served before, together with its config."""

from __future__ import annotations

import re
from pathlib import Path

from maskplan.pipeline.core.artifacts import Deployment
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.files import read_bytes
from maskplan.pipeline.triton.repository import (
    PREVIOUS,
    locked,
    mark_changed,
    mark_rolled_back,
    model_folder,
    versions_in,
    write_config,
)
from maskplan.pipeline.triton.served_config import CONFIG, ServedConfig, read_config


def rollback(repository: Path, name: str) -> Deployment:
    """Undo the last deployment of a model: restore the config that it replaced, then mark its version as rolled back.

    The config is replaced atomically and alone determines what is served. Calling this again after an interruption completes
    the rollback.

    Returns:
        What is served afterwards.

    Raises:
        InputError: There is no such model, or no earlier version.
        HostError: The repository cannot be written.
    """
    folder = model_folder(repository, name)
    config = folder / CONFIG
    if not config.is_file():
        raise InputError("no such model in the repository", where=config, fix="check --repository and --name")
    with locked(folder):
        undone = _last_deployed(folder, read_config(config))
        previous = folder / str(undone) / PREVIOUS
        restored, data = read_config(previous), read_bytes(previous)
        versions = _served(folder, restored, undone)
        served = max(versions)
        if set(versions) < set(restored.versions):
            data = _with_versions(data, versions)
        write_config(config, data)
        mark_rolled_back(folder, undone, hide=not restored.versions)
        mark_changed(config)
    files = (folder / str(served), config, *(folder / labels for labels in restored.labels))
    return Deployment(folder, served, restored.platform, files)


def _last_deployed(folder: Path, served: ServedConfig) -> int:
    """The newest version that replaced another, whether its config is in place (the usual case), not yet, or no longer."""
    lowest = max(served.versions, default=0)
    undoable = [v for v in versions_in(folder) if v >= lowest and (folder / str(v) / PREVIOUS).is_file()]
    if not undoable:
        raise InputError(
            "nothing to roll back to",
            where=folder,
            found=f"versions {listed(versions_in(folder)) or 'none'}, the served one replaced none",
            fix="deploy another engine instead",
        )
    return undoable[-1]


def _served(folder: Path, restored: ServedConfig, undone: int) -> list[int]:
    """The versions under the restored config. The newest must still exist; older ones may have been deleted."""
    others = [v for v in versions_in(folder) if v != undone]
    named = restored.versions or tuple(others[-1:])
    versions = [v for v in named if v in others]
    missing = [] if max(named, default=0) in versions or not named else [f"version {max(named)}"]
    missing += [labels for labels in restored.labels if not (folder / labels).is_file()]
    if missing or not versions:
        raise InputError(
            "nothing to roll back to",
            where=folder,
            found=f"missing: {listed(missing) or 'every earlier version'}",
            fix="restore it, or deploy another engine instead",
        )
    return versions


def _with_versions(config: bytes, versions: list[int]) -> bytes:
    """A config that `deploy` wrote, with fewer versions."""
    names = f"versions: [ {', '.join(map(str, versions))} ]".encode()
    return re.sub(rb"\bversions: \[[\d, ]*\]", names, config, count=1)
