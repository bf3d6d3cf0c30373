"""Files that appear under their final name only when complete, and their digests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from maskplan.pipeline.core.errors import OUT_OPTION, InputError, host_error

TEMPORARY_SUFFIX = ".maskplan-tmp"


def write_atomically(path: Path, data: bytes, *, option: str = OUT_OPTION) -> str:
    """Write `data` to `path` through a temporary file, fsync and `os.replace`; missing folders are created.

    Args:
        path: The final name.
        data: The whole content.
        option: The command-line option that names the file, for the error message.

    Returns:
        The sha256 digest of `data`, hexadecimal.

    Raises:
        HostError: The folder cannot be written or the disk is full; `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise host_error(error, where=path, option=option) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return hashlib.sha256(data).hexdigest()


def write_json(path: Path, value: object, *, option: str = OUT_OPTION) -> str:
    """Write `value` as indented JSON, as `write_atomically` does.

    Raises:
        ValueError: A number is NaN or infinite, which JSON cannot hold.
    """
    return write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode(), option=option)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a killed process left in `folder` (not below it)."""
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The sha256 digest of a file's bytes, hexadecimal.

    Raises:
        InputError: The file is missing or cannot be read.
    """
    with readable(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bytes(path: Path) -> bytes:
    """The whole file.

    Raises:
        InputError: The file is missing or cannot be read.
    """
    with readable(path):
        return path.read_bytes()


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an `OSError` raised while reading `path` into an `InputError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError("file not found", where=path, fix="check the path") from error
    except OSError as error:
        raise InputError(
            "cannot read", where=path, found=error.strerror, fix="check the path and its permissions"
        ) from error


def _sync_folder(folder: Path) -> None:
    # The new name itself must survive a power cut, not only the bytes.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
