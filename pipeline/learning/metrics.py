"""Metrics of learning: a CSV file, and TensorBoard's log if TensorBoard is installed."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from maskplan.pipeline.core.errors import host_error


@dataclass(frozen=True)
class MetricsRow:
    """One line of the log.

    Attributes:
        step: Steps done.
        minutes: Learning time so far.
        loss: Running mean of the loss.
        top1: Running mean of the top-1 accuracy in percent, on training images under sampled masks; None without labels or
            classes.
        tau: Temperature.
        lr: Learning rate.
        entropy: Mean normalized entropy of the gates: 1 undecided, 0 decided.
        moved: Fraction of groups whose likeliest pattern differs from the start.
        select_divergence: Divergence on `select` at the end of an epoch, else None.
        select_top1: Top-1 accuracy on `select` in percent at the end of an epoch, else None, as without labels or classes.
        select_loss: What the masks of an epoch are chosen by (`MaskScore.loss`), else None.
    """

    step: int
    minutes: float
    loss: float
    top1: float | None
    tau: float
    lr: float
    entropy: float
    moved: float
    select_divergence: float | None = None
    select_top1: float | None = None
    select_loss: float | None = None


_FIELDS = [f.name for f in fields(MetricsRow)]


class MetricsLog:
    """Appends rows to `learning.csv` in a folder, and to TensorBoard's log there.

    A file that an earlier version began keeps its columns.

    Raises:
        HostError: The folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "learning.csv"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            columns = _columns(path)
            self._file = path.open("a", newline="", encoding="utf-8")
        except OSError as error:
            raise host_error(error, where=folder, option="--log-dir") from error
        self._csv = csv.DictWriter(self._file, columns or _FIELDS, extrasaction="ignore")
        if not columns:
            self._csv.writeheader()
        self._board: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder))

    def write(self, row: MetricsRow) -> None:
        """Append one row and flush it.

        Raises:
            HostError: The disk is full.
        """
        values = asdict(row)
        try:
            self._csv.writerow({k: "" if v is None else v for k, v in values.items()})
            self._file.flush()
        except OSError as error:
            raise host_error(error, where=self._file.name, option="--log-dir") from error
        if self._board is not None:
            for name, value in values.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, row.step)

    def close(self) -> None:
        """Close the files."""
        with contextlib.suppress(OSError):
            self._file.close()
        if self._board is not None:
            self._board.close()


def _columns(path: Path) -> list[str]:
    """Those of a file that is there already."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        return next(csv.reader(file), [])
