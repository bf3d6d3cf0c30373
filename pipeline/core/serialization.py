"""Frozen dataclasses to JSON values and back, checked against their annotations."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
# Larger integers are no numbers of ours, and Python neither prints them nor converts them to float.
_MAX_INTEGER = 1 << 1000


def parse_json(text: str | bytes) -> Any:
    """The values of a JSON text.

    Raises:
        ValueError: Not JSON, nested too deeply, or an integer of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def parse_toml(data: bytes) -> dict[str, Any]:
    """The tables of a TOML text.

    Raises:
        ValueError: Not TOML, nested too deeply, or an integer of thousands of digits.
    """
    try:
        return tomllib.loads(data.decode())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def encode(value: object, root: Path | None = None) -> Any:
    """A JSON-ready copy of a record.

    Paths below `root` become relative to it, so that a folder can be moved; numbers that JSON cannot hold become None. Empty
    values of fields with `omit_empty` in their metadata are left out.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: encode(getattr(value, f.name), root)
            for f in dataclasses.fields(value)
            if getattr(value, f.name) or not f.metadata.get("omit_empty")
        }
    if isinstance(value, Path):
        if root is not None and value.is_relative_to(root):
            return value.relative_to(root).as_posix()
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): encode(v, root) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [encode(v, root) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def decode(kind: type[T], value: Any, root: Path | None = None) -> T:
    """The inverse of `encode` for a record type.

    Fields of files written before a rename are read by the record's `RENAMED_FIELDS` (old name to new name).

    Raises:
        ValueError: The value does not fit the type (a field missing, or of the wrong kind).
    """
    try:
        return typing.cast(T, _decode(kind, value, root, kind.__name__))
    except RecursionError as error:
        raise ValueError(f"{kind.__name__}: nested too deeply") from error


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _decode(kind: Any, value: Any, root: Path | None, at: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (inner,) = [a for a in arguments if a is not type(None)]
        return _decode(inner, value, root, at)
    if origin is typing.Literal:
        _expect(value in arguments, at, f"one of {', '.join(map(str, arguments))}", value)
        return value
    if origin is tuple:
        _expect(isinstance(value, list), at, "a list", value)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_decode(arguments[0], v, root, f"{at}[{i}]") for i, v in enumerate(value))
        _expect(len(value) == len(arguments), at, f"{len(arguments)} items", value)
        return tuple(_decode(a, v, root, at) for a, v in zip(arguments, value, strict=True))
    if origin is dict:
        _expect(isinstance(value, dict), at, "a table", value)
        return {k: _decode(arguments[1], v, root, f"{at}.{k}") for k, v in value.items()}
    if kind is Path:
        _expect(isinstance(value, str), at, "a path", value)
        return root / value if root is not None else Path(value)
    if dataclasses.is_dataclass(kind):
        _expect(isinstance(value, dict), at, "a table", value)
        value = with_new_names(kind, value)
        hints = _hints(typing.cast(type, kind))
        names = {f.name for f in dataclasses.fields(kind)}
        required = {
            f.name
            for f in dataclasses.fields(kind)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        wrong = sorted(set(value) - names) + sorted(required - set(value))
        _expect(not wrong, at, f"the fields {sorted(names)}", wrong)
        fields = {n: _decode(hints[n], v, root, f"{at}.{n}") for n, v in value.items()}
        return typing.cast(Any, kind)(**fields)
    if isinstance(value, int):
        _expect(abs(value) < _MAX_INTEGER, at, f"fewer than {len(str(_MAX_INTEGER))} digits", value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (int, float, str, bool):
        _expect(type(value) is kind, at, kind.__name__, value)
    return value


def with_new_names(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a record's values with renamed fields under their new names; a value under the new name takes precedence."""
    renamed: Mapping[str, str] = getattr(kind, "RENAMED_FIELDS", {})
    old = {renamed[name]: value for name, value in values.items() if name in renamed}
    return {**old, **{name: value for name, value in values.items() if name not in renamed}}


def _expect(holds: bool, at: str, wanted: str, found: object) -> None:
    if not holds:
        raise ValueError(f"{at}: expected {wanted}, found {_shown(found)}")


def _shown(value: object) -> str:
    # Python does not convert integers of thousands of digits.
    too_long = isinstance(value, int) and abs(value) >= _MAX_INTEGER
    return "a longer integer" if too_long else f"{value!r:.200}"
