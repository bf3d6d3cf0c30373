"""A TOML recipe to one options record a stage; every problem in it is reported at once."""

from __future__ import annotations

import dataclasses
import logging
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskplan.calibration.calibrate import CalibrateOptions
from maskplan.engines.trt.options import TrtOptions
from maskplan.exporters.onnx_export import ExportOptions
from maskplan.pipeline.core.errors import InputError, did_you_mean
from maskplan.pipeline.core.files import read_bytes
from maskplan.pipeline.core.serialization import decode, with_new_names
from maskplan.pipeline.learning.options import LearnOptions
from maskplan.pipeline.models.batchnorm import RecalibrateOptions
from maskplan.pipeline.parity.options import CompareOptions
from maskplan.pipeline.permutation.permute import PermuteOptions
from maskplan.pipeline.pruning.mask import MaskOptions
from maskplan.pipeline.timing.interleaved import TimeOptions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """The options of every stage; a recipe's tables bear these names, with `[learn]` beside `[mask]`."""

    permute: PermuteOptions = field(default_factory=PermuteOptions)
    mask: MaskOptions = field(default_factory=MaskOptions)
    learn: LearnOptions = field(default_factory=LearnOptions)
    recalibrate: RecalibrateOptions = field(default_factory=RecalibrateOptions)
    export: ExportOptions = field(default_factory=ExportOptions)
    calibrate: CalibrateOptions = field(default_factory=CalibrateOptions)
    tensorrt: TrtOptions = field(default_factory=TrtOptions)
    compare: CompareOptions = field(default_factory=CompareOptions)
    time: TimeOptions = field(default_factory=TimeOptions)


_TABLES: dict[str, type] = {
    "permute": PermuteOptions,
    "mask": MaskOptions,
    "learn": LearnOptions,
    "recalibrate": RecalibrateOptions,
    "export": ExportOptions,
    "calibrate": CalibrateOptions,
    "tensorrt": TrtOptions,
    "compare": CompareOptions,
    "time": TimeOptions,
}


def read_recipe(path: Path | None, seed: int) -> Recipe:
    """Read a recipe; without one, the defaults. `seed` is for every stage that the recipe gives none.

    Raises:
        InputError: Not TOML, unknown tables or keys, or values of the wrong type; all are named.
    """
    tables: dict[str, Any] = {}
    if path is not None:
        try:
            tables = tomllib.loads(read_bytes(path).decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError("the recipe is not TOML", where=path, found=error) from error
    problems: list[str] = []
    records: dict[str, Any] = {}
    for name, value in tables.items():
        if name not in _TABLES:
            problems.append(
                f"[{name}] is no table of a recipe; {did_you_mean(name, list(_TABLES)) or 'they are ' + ', '.join(_TABLES)}"
            )
        elif not isinstance(value, dict):
            problems.append(f"{name} is not a table")
    for name, kind in _TABLES.items():
        given = tables.get(name, {})
        fields = {f.name for f in dataclasses.fields(kind)} - {"learn", "judge_augment"}
        if not isinstance(given, dict):
            continue
        for old, new in getattr(kind, "RENAMED_FIELDS", {}).items():
            if old in given:
                log.warning("[%s] %s is now called %s", name, old, new)
        given = with_new_names(kind, given)
        good = {"seed": seed} if "seed" in fields else {}
        out_of_range = []
        for key, value in given.items():
            if key not in fields:
                problems.append(
                    f"[{name}] has no {key!r}; {did_you_mean(key, sorted(fields)) or 'it has ' + ', '.join(sorted(fields))}"
                )
                continue
            try:
                # Every option has a default, so a table with one key is whole.
                decode(kind, {key: value})
            except InputError as error:
                # Perhaps only beside the default of another option.
                out_of_range.append(f"[{name}] {_told(error)}")
            except ValueError as error:
                problems.append(f"[{name}] {error}")
                continue
            good[key] = value
        try:
            records[name] = decode(kind, good)
        except InputError as error:
            problems += out_of_range or [f"[{name}] {_told(error)}"]
    if problems:
        raise InputError(
            f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the recipe",
            where=path,
            found="; ".join(problems),
            fix="correct them all",
        )
    # Masks are judged with the statistics that the network will have.
    records["learn"] = dataclasses.replace(records["learn"], judge_augment=records["recalibrate"].augment)
    records["mask"] = dataclasses.replace(records["mask"], learn=records["learn"])
    return Recipe(**records)


def _told(error: InputError) -> str:
    return ", ".join(str(part) for part in (error.what, error.found, error.fix) if part is not None)
