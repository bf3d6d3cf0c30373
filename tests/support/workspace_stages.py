"""A stage that writes one file, for the tests of the output folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from maskplan.pipeline.core.files import write_atomically
from maskplan.pipeline.stages.workspace import Workspace


@dataclass(frozen=True)
class Note:
    """A stage's record that names one file."""

    path: Path
    sha256: str
    words: int


@dataclass(frozen=True)
class Pair:
    """A record that holds others."""

    notes: tuple[Note, ...]
    first: Note


@dataclass(frozen=True)
class Options:
    """What a stage may depend on."""

    loud: bool = False
    count: int | None = None


class Writer:
    """Work that writes a file, and counts how often it was done."""

    def __init__(self, ws: Workspace, name: str = "note.txt", text: str = "two words") -> None:
        self.path, self.text, self.runs = ws.path(name), text, 0

    def __call__(self) -> Note:
        self.runs += 1
        return Note(self.path, write_atomically(self.path, self.text.encode()), len(self.text.split()))


def run_stage(folder: Path, inputs: dict[str, object], **how: str) -> tuple[Note, bool]:
    """Open the folder, run one stage; the record, and whether the work was done."""
    with Workspace(folder) as ws:
        work = Writer(ws, **how)
        return ws.stage("write", Note, inputs, work), bool(work.runs)


def fail_after_a_stage(folder: Path, error: BaseException, *, keep: bool = False) -> None:
    """Finish one stage, perhaps say that it is worth keeping, and end with an error."""
    with Workspace(folder) as ws:
        ws.stage("write", Note, {"digest": "a"}, Writer(ws))
        if keep:
            ws.keep()
        raise error
