"""The output folder: one run at a time, stages that are not run twice, and nothing left of a run that never got going."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fcntl
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
from maskplan.pipeline.core.files import remove_leftovers, sha256_of, write_json
from maskplan.pipeline.core.interrupts import INTERRUPTS
from maskplan.pipeline.core.serialization import decode, encode

log = logging.getLogger(__name__)

T = TypeVar("T")

STATE = ".maskplan"
# Raised when a stage's output changes for the same inputs and options, so that older folders are made anew.
STAGES_VERSION = 1


class Workspace:
    """A run's folder, held under a lock while open.

    `stage` runs a stage or takes its record from an earlier run. A record is taken when the inputs' digests and the options
    are the same and every file that it names is still what it was. Keys hold no paths, hosts, devices or library versions:
    the folder can be copied and go on elsewhere.

    An `InputError` before `keep()`, or a `HostError` before the first stage, undoes a folder that this run made, so that
    bad input leaves nothing behind.

    Raises:
        HostError: The folder cannot be written, or another run holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.reused: list[str] = []
        self.seconds: dict[str, float] = {}
        self._prefix = ""
        self._kept = False
        self._made: Path | None = None
        self._lock: IO[str] | None = None

    def __enter__(self) -> Workspace:
        missing = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        self._made = missing[-1] if missing else None
        self._kept = not missing and any(self.folder.iterdir()) if self.folder.is_dir() else False
        try:
            (self.folder / STATE).mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / STATE / "lock").open("a+")
        except OSError as error:
            raise host_error(error, where=self.folder) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise HostError(
                "another run is using the folder",
                where=self.folder,
                found=f"process {holder}",
                fix="wait for it to end, or choose another --out",
            ) from error
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
        # A host's fault may be gone tomorrow: stages that are done are kept for then.
        nothing_done = isinstance(error, HostError) and not self.seconds
        if not self._kept and (isinstance(error, InputError) or nothing_done):
            self._undo()
        self._lock.close()

    def keep(self) -> None:
        """From here on, what the run has made is worth more than a clean slate."""
        self._kept = True

    def apart(self, prefix: str) -> Workspace:
        """The same open folder, where stages and files have names with a prefix: a second pass leaves the first as it is."""
        other = copy.copy(self)
        other._prefix = f"{self._prefix}{prefix}-"
        return other

    def path(self, name: str) -> Path:
        """A file that the user will find."""
        return self.folder / (self._prefix + name)

    def hidden(self, name: str) -> Path:
        """A file between two stages."""
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
            name: Of the stage; its record lies under this name.
            kind: The record's type.
            inputs: Digests and options that decide the outcome, and nothing else.
            work: Makes the files and returns the record.
            intact: Asked of a known record whose files are as they were; False has them made again.
        """
        INTERRUPTS.heed()
        name = self._prefix + name
        key = _key(name, inputs)
        log.debug("%s: its inputs' digest is %s", name, key[:12])
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
            stored = json.loads(self._record(name).read_text(encoding="utf-8"))
            if stored["key"] != key:
                return None
            record = decode(kind, stored["record"], self.folder)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        for path, sha256 in files_of(record):
            if not path.is_file() or sha256_of(path) != sha256:
                if not silent:
                    log.warning("%s: %s has changed or is gone; making it again", name, path.name)
                return None
        return record

    def _undo(self) -> None:
        """Remove what this run made: its folders, or what it put into an empty one."""
        if self._made is not None:
            shutil.rmtree(self._made, ignore_errors=True)
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
    text = json.dumps({"stage": name, "version": STAGES_VERSION, "inputs": encode(inputs)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
