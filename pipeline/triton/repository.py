"""A model's folder in a Triton repository: its versions, the lock for writers, and atomic changes of versions."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from maskplan.pipeline.core.errors import HostError, InputError, host_error
from maskplan.pipeline.core.file_lock import acquire_lock
from maskplan.pipeline.core.files import (
    NAME_MAX,
    readable,
    remove_leftovers,
    sync_folder,
    temporary_path,
    write_atomically,
)

# In a version's folder, for a rollback: the config that was in place before the version; and its name after the rollback.
PREVIOUS = "previous-config.pbtxt"
_ROLLED_BACK = "rolled-back-config.pbtxt"
_HIDDEN = "rolled-back"
REPOSITORY_OPTION = "--repository"
_PART_BYTES = 1 << 24
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def model_folder(repository: Path, name: str) -> Path:
    """The folder of a model.

    Raises:
        InputError: The name is not valid for a folder of the repository.
    """
    if not _NAME.fullmatch(name) or len(name) > NAME_MAX:
        raise InputError(
            "invalid name for a model in a repository",
            found=repr(name) if len(name) <= NAME_MAX else f"{name[:40]!r}..., {len(name)} characters",
            fix=f"use at most {NAME_MAX} letters, digits, '-', '_' and '.', starting with a letter or digit",
        )
    return repository / name


def require_deployable(repository: Path, name: str) -> None:
    """Judge a repository and a model's name before the work whose result is to be deployed; nothing is created.

    Raises:
        InputError: The name is not valid.
        HostError: The model's folder cannot be created or written.
    """
    folder = model_folder(repository, name)
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        # A path that is too long is refused here as it would be later.
        (folder / ".maskplan").lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise host_error(error, where=folder, option=REPOSITORY_OPTION) from error


def versions_in(folder: Path) -> list[int]:
    """Numbers of the version folders, in ascending order."""
    return sorted(int(p.name) for p in folder.glob("[1-9]*") if p.name.isdecimal() and p.is_dir())


def is_rolled_back(folder: Path, version: int) -> bool:
    """Whether a version was deployed and taken back."""
    return (folder / str(version) / _ROLLED_BACK).is_file()


def next_version(folder: Path) -> int:
    """One above every existing or hidden version."""
    hidden = [int(p.name.split(".")[1]) for p in folder.glob(f".[1-9]*.{_HIDDEN}") if p.name.split(".")[1].isdecimal()]
    return 1 + max([*versions_in(folder), *hidden], default=0)


def add_version(folder: Path, version: int, copies: Mapping[str, Path], contents: Mapping[str, bytes]) -> None:
    """Write a version's folder under a hidden name and rename it when it is complete.

    Args:
        folder: The model's folder, locked.
        version: Number of the version.
        copies: Files to copy, by their name in the version.
        contents: Contents of further files, by name.

    Raises:
        InputError: A file to copy cannot be read.
        HostError: The folder cannot be written.
    """
    staged = temporary_path(folder / str(version))
    try:
        staged.mkdir()
        for name, source in copies.items():
            _copy(source, staged / name)
        for name, data in contents.items():
            write_atomically(staged / name, data, option=REPOSITORY_OPTION)
        # Names and files are on the disk before the config that names the version.
        sync_folder(staged)
        staged.rename(folder / str(version))
        sync_folder(folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise _busy(folder, f"another process has created version {version}") from error
        raise host_error(error, where=folder, option=REPOSITORY_OPTION) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """Copy a file in parts: plans of several gigabytes need not fit into memory."""
    with readable(source):
        data = source.open("rb")
    with data, target.open("xb") as file:
        while True:
            with readable(source):
                part = data.read(_PART_BYTES)
            if not part:
                break
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def mark_rolled_back(folder: Path, version: int, *, hide: bool) -> None:
    """Mark a version as rolled back.

    Its files keep their names: a server may be loading them. They are hidden only from a config that leaves the choice of
    versions to Triton, under a name that starts with a dot (Triton parses a name as a number up to the first non-digit) and
    reserves the version's number.

    Raises:
        HostError: The folder cannot be written.
    """
    path = folder / str(version)
    try:
        if hide:
            path.rename(folder / f".{version}.{_HIDDEN}")
        else:
            (path / PREVIOUS).rename(path / _ROLLED_BACK)
    except OSError as error:
        raise host_error(error, where=path, option=REPOSITORY_OPTION) from error


def write_config(config: Path, data: bytes) -> None:
    """Replace a model's config, and make sure that a polling server notices.

    Raises:
        HostError: The folder cannot be written; the config is unchanged.
    """
    write_atomically(config, data, option=REPOSITORY_OPTION)
    mark_changed(config)


def mark_changed(config: Path) -> None:
    """Give a config a later time than anything else in its folder.

    Triton looks for times later than those it has seen, and file systems give changes within some milliseconds the same
    time: a server that looks between two of them would miss the second forever.
    """
    folder = config.parent
    with contextlib.suppress(OSError):
        latest = max(time.time_ns(), 1 + max(path.stat().st_mtime_ns for path in (folder, *folder.iterdir())))
        os.utime(config, ns=(latest, latest))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a model's folder if missing, lock it against other writers, and remove leftovers of a killed process.

    Folders created here that are empty at the end are removed: Triton does not start with a model without a version.

    Raises:
        HostError: The folder cannot be created, or another process is writing to it.
    """
    try:
        created = [path for path in (folder, *folder.parents) if not path.exists()]
    except OSError as error:
        raise host_error(error, where=folder, option=REPOSITORY_OPTION) from error
    handle = None
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
            _lock(handle, folder)
            remove_leftovers(folder)
        except OSError as error:
            raise host_error(error, where=folder, option=REPOSITORY_OPTION) from error
        yield
    finally:
        for path in created:
            with contextlib.suppress(OSError):
                path.rmdir()
        if handle is not None:
            os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    # Some network file systems have no locks; there, the existing version folder reveals a concurrent deployment.
    with contextlib.suppress(OSError):
        acquire_lock(handle, lambda: _busy(folder, "its folder is locked"))


def _busy(folder: Path, found: str) -> HostError:
    return HostError(
        "another deployment is writing to the model", where=folder, found=found, fix="run the same command again"
    )
