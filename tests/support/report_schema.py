"""Validate what tests write against the published JSON Schema of report.json."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

PUBLISHED = Path(__file__).parents[2] / "docs" / "report.schema.json"


def validate_report(path: Path) -> dict[str, Any]:
    """The report's values; fails with every violation of the schema."""
    values: dict[str, Any] = json.loads(path.read_text())
    validate_values(values)
    return values


def validate_values(values: object, record: str | None = None) -> None:
    """Validate a whole report's JSON values, or those of one record of `$defs`, such as `ParityReport`."""
    problems = [f"{error.json_path}: {error.message:.300}" for error in _validator(record).iter_errors(values)]
    assert not problems, "\n".join(problems)


@cache
def _validator(record: str | None) -> Draft202012Validator:
    schema = json.loads(PUBLISHED.read_text())
    if record is not None:
        assert record in schema["$defs"], record
        schema = {"$schema": schema["$schema"], "$ref": f"#/$defs/{record}", "$defs": schema["$defs"]}
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)
