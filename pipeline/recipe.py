"""Read a TOML recipe into one options record for each stage; every problem is reported at once."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from maskplan.calibration.calibrate import CalibrateOptions
from maskplan.engines.trt.compile_options import CompileOptions
from maskplan.engines.trt.options import TrtOptions
from maskplan.exporters.onnx_export import ExportOptions
from maskplan.pipeline.core.errors import InputError, did_you_mean
from maskplan.pipeline.core.files import read_bytes
from maskplan.pipeline.core.serialization import decode, parse_toml, with_new_names
from maskplan.pipeline.learning.options import LearnOptions
from maskplan.pipeline.models.batchnorm import RecalibrateOptions
from maskplan.pipeline.models.module_outputs import OutputOptions
from maskplan.pipeline.models.synthesize import SynthesizeOptions
from maskplan.pipeline.parity.options import CompareOptions
from maskplan.pipeline.permutation.permute import PermuteOptions
from maskplan.pipeline.pruning.mask import MaskOptions
from maskplan.pipeline.timing.interleaved import TimeOptions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """The options of every stage; the fields are the tables of a recipe file."""

    model: OutputOptions = field(default_factory=OutputOptions)
    permute: PermuteOptions = field(default_factory=PermuteOptions)
    mask: MaskOptions = field(default_factory=MaskOptions)
    learn: LearnOptions = field(default_factory=LearnOptions)
    recalibrate: RecalibrateOptions = field(default_factory=RecalibrateOptions)
    synthesize: SynthesizeOptions = field(default_factory=SynthesizeOptions)
    export: ExportOptions = field(default_factory=ExportOptions)
    calibrate: CalibrateOptions = field(default_factory=CalibrateOptions)
    compile: CompileOptions = field(default_factory=CompileOptions)
    tensorrt: TrtOptions = field(default_factory=TrtOptions)
    compare: CompareOptions = field(default_factory=CompareOptions)
    time: TimeOptions = field(default_factory=TimeOptions)


# Each table's record: the types of `Recipe`'s fields.
_TABLES: dict[str, type] = get_type_hints(Recipe)


# Seeds and sizes are passed on to code that takes 64 bits.
_INTEGER_LIMIT = 1 << 63


def read_recipe(path: Path | None, seed: int) -> Recipe:
    """Read a recipe; without one, return the defaults. Every stage that the recipe gives no seed uses `seed`.

    Raises:
        InputError: Not TOML, unknown tables or keys, or values of the wrong type; all are named.
    """
    tables = _parse(path) if path is not None else {}
    problems = [problem for name, value in tables.items() if (problem := _table_problem(name, value)) is not None]
    records: dict[str, Any] = {}
    for name, kind in _TABLES.items():
        values = tables.get(name, {})
        if isinstance(values, dict):
            records[name] = _read_table(name, kind, values, seed, problems)
    if problems:
        raise InputError(
            f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the recipe",
            where=path,
            found="; ".join(problems),
            fix="correct them all",
        )
    # Masks are judged with the BatchNorm statistics that the deployed network will have.
    records["learn"] = dataclasses.replace(
        records["learn"],
        judge_augment=records["recalibrate"].augment,
        judge_relative=records["recalibrate"].relative,
    )
    given = with_new_names(LearnOptions, tables.get("learn", {}))
    records["mask"] = dataclasses.replace(records["mask"], learn=records["learn"], set_in_recipe=tuple(sorted(given)))
    return Recipe(**records)


def _parse(path: Path) -> dict[str, Any]:
    try:
        return parse_toml(read_bytes(path))
    except ValueError as error:
        raise InputError("the recipe is not TOML", where=path, found=error) from error


def _table_problem(name: str, value: object) -> str | None:
    if name not in _TABLES:
        return (
            f"[{name}] is not a table of a recipe; {did_you_mean(name, list(_TABLES)) or 'use ' + ', '.join(_TABLES)}"
        )
    return None if isinstance(value, dict) else f"{name} is not a table"


def _read_table(name: str, kind: type, given: dict[str, Any], seed: int, problems: list[str]) -> Any:
    """Decode one table; problems are appended, and the result is then None or incomplete."""
    # Not set by a recipe: they follow from other tables.
    fields = {f.name for f in dataclasses.fields(kind)} - {"learn", "set_in_recipe", "judge_augment", "judge_relative"}
    for old, new in getattr(kind, "RENAMED_FIELDS", {}).items():
        if old in given:
            log.warning("[%s] %s is now called %s", name, old, new)
    accepted: dict[str, Any] = {"seed": seed} if "seed" in fields else {}
    out_of_range: list[str] = []
    for key, value in with_new_names(kind, given).items():
        if key not in fields:
            hint = did_you_mean(key, sorted(fields)) or "its keys are " + ", ".join(sorted(fields))
            problems.append(f"[{name}] has no {key!r}; {hint}")
            continue
        if isinstance(value, int) and abs(value) >= _INTEGER_LIMIT:
            problems.append(f"[{name}] {key}: integers have at most 63 bits")
            continue
        try:
            # Every option has a default, so a table with one key is complete.
            decode(kind, {key: value})
        except InputError as error:
            # Out of range with the default of another option; it may fit with the value that the recipe gives.
            out_of_range.append(f"[{name}] {_one_line(error)}")
        except ValueError as error:
            problems.append(f"[{name}] {error}")
            continue
        accepted[key] = value
    try:
        return decode(kind, accepted)
    except InputError as error:
        problems += out_of_range or [f"[{name}] {_one_line(error)}"]
        return None


def _one_line(error: InputError) -> str:
    return ", ".join(str(part) for part in (error.what, error.found, error.fix) if part is not None)
