"""The output folder: one run at a time, unchanged stages do not run again, a run with bad input leaves nothing behind."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar

from maskplan.pipeline.core.errors import HostError, InputError, host_error
from maskplan.pipeline.core.file_lock import acquire_lock
from maskplan.pipeline.core.files import remove_leftovers, sha256_of, write_json
from maskplan.pipeline.core.interrupts import INTERRUPTS
from maskplan.pipeline.core.serialization import decode, encode, parse_json
from maskplan.pipeline.stages.versions import STAGE_VERSIONS

log = logging.getLogger(__name__)

T = TypeVar("T")

STATE = ".maskplan"


class Workspace:
    """A run's folder, locked while open.

    `stage` runs a stage or takes its record from an earlier run. A record is taken when the inputs' digests and the options
    are the same and every file that it names is unchanged. Keys hold no paths, hosts, devices or library versions, so that
    the folder can be copied to another host and continued there.

    An `InputError` before `keep()`, or a `HostError` before the first stage, removes a folder that this run created.

    Raises:
        HostError: The folder cannot be written, or another run uses it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.reused: list[str] = []
        self.seconds: dict[str, float] = {}
        self._prefix = ""
        self._kept = False
        self._created: Path | None = None
        self._lock: IO[str] | None = None

    def __enter__(self) -> Workspace:
        missing = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        self._created = missing[-1] if missing else None
        self._kept = not missing and any(self.folder.iterdir()) if self.folder.is_dir() else False
        try:
            (self.folder / STATE).mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / STATE / "lock").open("a+")
        except OSError as error:
            raise host_error(error, where=self.folder) from error
        try:
            acquire_lock(self._lock, self._in_use)
        except HostError:
            self._lock.close()
            raise
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        remove_leftovers(self.folder)
        remove_leftovers(self.folder / STATE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._lock is not None
        # The host's problem may be fixed later: finished stages are kept.
        nothing_done = isinstance(error, HostError) and not self.seconds
        if not self._kept and (isinstance(error, InputError) or nothing_done):
            self._undo()
        self._lock.close()

    def _in_use(self) -> HostError:
        assert self._lock is not None
        self._lock.seek(0)
        holder = self._lock.read().strip() or "unknown"
        return HostError(
            "another run is using the folder",
            where=self.folder,
            found=f"process {holder}",
            fix="wait for it to end, or choose another --out",
        )

    def keep(self) -> None:
        """Keep the folder from here on, whatever happens."""
        self._kept = True

    def with_prefix(self, prefix: str) -> Workspace:
        """The same open folder with a prefix on names of stages and files: a second pass leaves the first as it is."""
        other = copy.copy(self)
        other._prefix = f"{self._prefix}{prefix}-"
        return other

    def path(self, name: str) -> Path:
        """A file for the user."""
        return self.folder / (self._prefix + name)

    def hidden(self, name: str) -> Path:
        """A file that only stages read."""
        return self.folder / STATE / (self._prefix + name)

    def stage(
        self,
        name: str,
        kind: type[T],
        inputs: Mapping[str, object],
        work: Callable[[], T],
        intact: Callable[[T], bool] | None = None,
    ) -> T:
        """Run `work`, or take its record from an earlier run with the same inputs.

        Args:
            name: Of the stage and its record; the part before the first hyphen is a key of `STAGE_VERSIONS`.
            kind: The record's type.
            inputs: Digests and options that determine the result, and nothing else.
            work: Writes the files and returns the record.
            intact: Called with a known record whose files are unchanged; False runs the stage again.
        """
        INTERRUPTS.raise_pending()
        name = self._prefix + name
        key = _key(name, inputs)
        log.debug("%s: key %s", name, key[:12])
        known = self._recall(name, kind, key)
        if known is not None and (intact is None or intact(known)):
            log.info("%s: unchanged", name)
            self.reused.append(name)
            return known
        log.info("%s …", name)
        started = time.monotonic()
        record = work()
        self.seconds[name] = time.monotonic() - started
        write_json(self._record(name), {"key": key, "record": encode(record, self.folder)})
        log.info("%s: %.1f s", name, self.seconds[name])
        return record

    def known(self, name: str, kind: type[T], inputs: Mapping[str, object]) -> T | None:
        """The record that `stage` would take, or None where it would run."""
        name = self._prefix + name
        return self._recall(name, kind, _key(name, inputs), silent=True)

    def _record(self, name: str) -> Path:
        return self.folder / STATE / f"{name}.json"

    def _recall(self, name: str, kind: type[T], key: str, *, silent: bool = False) -> T | None:
        try:
            stored = parse_json(self._record(name).read_text(encoding="utf-8"))
            if stored["key"] != key:
                return None
            record = decode(kind, stored["record"], self.folder)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        for path, sha256 in files_of(record):
            if not path.is_file() or sha256_of(path) != sha256:
                if not silent:
                    log.warning("%s: %s has changed or is missing; running the stage again", name, path.name)
                return None
        return record

    def _undo(self) -> None:
        """Remove what this run created: its folders, or the contents of an empty one."""
        if self._created is not None:
            shutil.rmtree(self._created, ignore_errors=True)
            return
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()


def files_of(record: object) -> Iterator[tuple[Path, str]]:
    """Every (path, sha256) inside a record."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        values: dict[str, Any] = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
        if isinstance(values.get("path"), Path) and isinstance(values.get("sha256"), str):
            yield values["path"], values["sha256"]
        for value in values.values():
            yield from files_of(value)
    elif isinstance(record, tuple):
        for value in record:
            yield from files_of(value)


def _key(name: str, inputs: Mapping[str, object]) -> str:
    text = json.dumps({"stage": name, "version": _version(name), "inputs": encode(inputs)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _version(name: str) -> int:
    """Of a stage with or without a pass's prefix: `refined-mask` is a `mask` stage."""
    return next((STAGE_VERSIONS[verb] for verb in name.split("-") if verb in STAGE_VERSIONS), 1)
