"""The JSON Schema of report.json, built from the annotations of the records that `report_values` writes.

`python -m maskplan.pipeline.report.schema > docs/report.schema.json` writes the published copy; a test compares the two.
The commands' own reports (`check`, `compare`, `time`, each with `--report`) are single records, which the schema has under
`$defs`: `CheckReport`, `ParityReport`, `TimingReport`.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from maskplan.pipeline.core.artifacts import EngineFile, ImageSet, LayerSparsity, MaskSet, Pattern, Provenance
from maskplan.pipeline.core.choices import Backend, Precision
from maskplan.pipeline.core.compilation import CompileReport, CompileResult
from maskplan.pipeline.core.refinement import Refinement
from maskplan.pipeline.core.reports import (
    CalibrationReport,
    ConformanceReport,
    DepthReport,
    Fidelity,
    ParityReport,
    TimingReport,
)
from maskplan.pipeline.masking.statistics import MaskStatistics
from maskplan.pipeline.permutation.record import Permutation
from maskplan.pipeline.recipe import Recipe
from maskplan.pipeline.report.write import SCHEMA

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_SCALARS: Mapping[Any, str] = {str: "string", Path: "string", int: "integer", float: "number", bool: "boolean"}

# Records that the report writes otherwise than field by field: a pattern as text, and image sets without the sample of
# digests that serves the refusal of overlaps.
_AS_TEXT = (Pattern,)
_OMITTED_FIELDS: Mapping[type, tuple[str, ...]] = {ImageSet: ("sketch", "members")}


def report_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of report.json.

    Records become objects with all their fields required, but for those that are left out where empty, and no others
    allowed; `Literal` becomes an enum, a tuple an array, and `None` null.
    """
    defs: dict[str, Any] = {}

    def of(annotation: Any) -> dict[str, Any]:
        return _schema_of(annotation, defs)

    engine = _table(
        _fields(EngineFile, defs, omit=("layers", "provenance"))
        | {
            "backend_reason": of(str),
            "ran_on": of(Backend),
            "fidelity": of(Fidelity | None),
            "sparsity": _table(
                {
                    "requested": of(bool),
                    **{f"{state}_layers": of(int) for state in ("sparse", "dense", "unknown")},
                    "layers": of(tuple[LayerSparsity, ...]),
                }
            ),
        },
        optional=_optional(EngineFile),
    )
    permutation = _table(
        _fields(Permutation, defs)
        | {name: of(float) for name in ("kept_before", "kept_after", "kept_bound", "efficacy")}
        | {"reason": of(None)}
    )
    masks = _table(
        _fields(MaskSet, defs)
        | {name: of(int) for name in ("masked_layers", "masked_parameters")}
        | {"masked_macs_percent": of(float | None), "kept_magnitude_percent": of(float)}
    )
    compiled = _table(_fields(CompileReport, defs) | {"reason": of(None)})
    sections = {
        "schema": {"const": SCHEMA},
        "model": _table(
            _fields(Provenance, defs) | {"seed": of(int), "precision": of(Precision)}, optional=_optional(Provenance)
        ),
        "permutation": {"oneOf": [of(None), _table({"reason": of(str)}), permutation]},
        "masks": masks,
        "mask_statistics": of(MaskStatistics | None),
        "conformance": of(ConformanceReport),
        "calibration": of(CalibrationReport | None),
        "engine": engine,
        "dense_engine": engine,
        "compile": {"oneOf": [of(None), _table({"reason": of(str)}), compiled]},
        "parity": of(ParityReport),
        "depth": of(DepthReport | None),
        "timing": of(TimingReport),
        "refine": of(Refinement | None),
        "recipe": of(Recipe),
        "command": of(str),
        "versions": of(dict[str, str]),
    }
    defs["CheckReport"] = _table(
        _fields(ConformanceReport, defs) | {"compile": of(CompileResult)}, optional=("compile",)
    )
    return {
        "$schema": DIALECT,
        "title": "report.json of maskplan",
        "description": "Accuracies and agreement are in percent, drops in points, times in milliseconds.",
        **_table(sections),
        "$defs": {name: defs[name] for name in sorted(defs)},
    }


def _schema_of(annotation: Any, defs: dict[str, Any]) -> dict[str, Any]:
    """The schema of what `encode` writes for a value of this type; records are added to `defs`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (None, type(None)):
        return {"type": "null"}
    if annotation in _SCALARS or annotation in _AS_TEXT:
        return {"type": _SCALARS.get(annotation, "string")}
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        if annotation.__name__ not in defs:
            defs[annotation.__name__] = {}  # so that a record that holds its own kind ends
            defs[annotation.__name__] = _table(_fields(annotation, defs), optional=_optional(annotation))
        return {"$ref": f"#/$defs/{annotation.__name__}"}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (types.UnionType, typing.Union):
        return _union([_schema_of(a, defs) for a in arguments])
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return {"type": "array", "items": _schema_of(arguments[0], defs)}
    if origin is tuple:
        items = [_schema_of(a, defs) for a in arguments]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    if origin in (dict, Mapping) and arguments[0] is str:
        return {"type": "object", "additionalProperties": _schema_of(arguments[1], defs)}
    raise TypeError(f"no JSON Schema for {annotation}")


def _union(options: list[dict[str, Any]]) -> dict[str, Any]:
    """Any of the options; plain types are listed in one keyword."""
    if all(set(option) == {"type"} for option in options):
        return {"type": [option["type"] for option in options]}
    return {"anyOf": options}


def _fields(record: type, defs: dict[str, Any], omit: tuple[str, ...] = ()) -> dict[str, Any]:
    hints = typing.get_type_hints(record)
    skipped = {*omit, *_OMITTED_FIELDS.get(record, ())}
    names = [f.name for f in dataclasses.fields(record) if f.name not in skipped]
    return {name: _schema_of(hints[name], defs) for name in names}


def _optional(record: type) -> frozenset[str]:
    """Fields that `encode` leaves out where they are empty."""
    return frozenset(f.name for f in dataclasses.fields(record) if f.metadata.get("omit_empty"))


def _table(properties: Mapping[str, Any], optional: Collection[str] = ()) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def main() -> None:
    """Print the schema."""
    print(json.dumps(report_schema(), indent=1))


if __name__ == "__main__":
    main()
