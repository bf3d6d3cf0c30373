"""Files that appear under their final name only when complete, and their digests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from maskplan.pipeline.core.errors import InputError, host_error

TEMPORARY_SUFFIX = ".maskplan-tmp"
# Bytes that file systems allow for a name.
NAME_MAX = 255


def write_atomically(path: Path, data: bytes, *, option: str | None = None) -> str:
    """Write `data` to `path` through a temporary file, fsync and `os.replace`; missing folders are created.

    Args:
        path: The final name.
        data: The whole content.
        option: The command-line option that names the file, for the error message; by default the running command's for its
            output.

    Returns:
        The sha256 digest of `data`, hexadecimal.

    Raises:
        HostError: The folder cannot be written or the disk is full; `path` is unchanged.
    """
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A link that was left under this name must not be written through.
        if os.path.lexists(temporary):
            temporary.unlink()
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise host_error(error, where=path, option=option) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return hashlib.sha256(data).hexdigest()


def temporary_path(path: Path, kind: str = "") -> Path:
    """A hidden name next to `path` for this process, which `remove_leftovers` knows; never longer than a name may be.

    Args:
        path: The final name.
        kind: Part of the name, where several temporary files belong to one final name.
    """
    end = f".{os.getpid()}{kind}{TEMPORARY_SUFFIX}"
    return path.with_name(f".{_shortened(path.name, NAME_MAX - len(end) - 1)}{end}")


def sibling(path: Path, end: str) -> Path:
    """The path with `end` in place of its suffix; a name that would be too long is shortened."""
    return path.with_name(_shortened(path.stem, NAME_MAX - len(end.encode())) + end)


def _shortened(name: str, size: int) -> str:
    data = os.fsencode(name)
    if len(data) <= size:
        return name
    # Two long names that begin alike stay two.
    digest = hashlib.sha256(data).hexdigest()[:12]
    return os.fsencode(name)[: size - len(digest) - 1].decode(errors="ignore") + f"~{digest}"


def write_json(path: Path, value: object, *, option: str | None = None) -> str:
    """Write `value` as indented JSON, as `write_atomically` does.

    Raises:
        ValueError: A number is NaN or infinite, which JSON cannot hold.
    """
    return write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode(), option=option)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files, folders and links that a killed process left in `folder` (not below it)."""
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
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


def sync_folder(folder: Path) -> None:
    """Wait until the folder's names are on the disk: a new name must survive a power cut, not only the bytes.

    Raises:
        OSError: The folder cannot be opened, or the disk fails.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
