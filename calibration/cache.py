"""Ranges on disk: the range cache (JSON, keyed by model, images and options) and TensorRT's calibration cache (text)."""

from __future__ import annotations

import json
import math
import re
import struct
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from maskplan.calibration.ranges import RangeOptions, Ranges
from maskplan.calibration.scales import MAX_INT8
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.files import read_bytes, write_atomically, write_json

FORMAT = "maskplan ranges 1"

TENSORRT_HEADER = "TRT-101600-EntropyCalibration2"
"""The header that is written by default: that of TensorRT 10.16's entropy calibrator."""

_HEADER = re.compile(r"TRT-\d+-\w+")
_ENTRY = re.compile(r"(.+): ?([0-9a-fA-F]{1,8})", re.DOTALL)


@dataclass(frozen=True)
class CacheKey:
    """What ranges depend on.

    Attributes:
        model: Digest of the FP32 model.
        data: Digest of the preprocessed images.
        options: How the ranges were chosen.
    """

    model: str
    data: str
    options: RangeOptions


def write_cache(path: Path, key: CacheKey, ranges: Ranges) -> str:
    """Write the ranges as JSON: sorted, one tensor per line.

    Returns:
        The sha256 digest of the file.

    Raises:
        HostError: The folder cannot be written.
        ValueError: A range is negative, NaN or infinite.
    """
    tables = {"amax": ranges.amax, "largest": ranges.largest}
    if bad := [name for table in tables.values() for name, value in table.items() if not _is_range(value)]:
        raise ValueError(f"not ranges: {bad}")
    content = {
        **{title: {name: float(table[name]) for name in sorted(table)} for title, table in tables.items()},
        "data": key.data,
        "format": FORMAT,
        "model": key.model,
        "options": dict(sorted(asdict(key.options).items())),
    }
    return write_json(path, dict(sorted(content.items())), option="--cache")


def read_cache(path: Path, key: CacheKey) -> Ranges:
    """The ranges that `write_cache` wrote for the same key.

    Raises:
        InputError: The file is missing, is not a range cache, or belongs to another model, other images or other options.
    """
    try:
        content = json.loads(read_bytes(path), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, and of repeated names
        raise _not_a_cache(path, error) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _not_a_cache(path, f"no format {FORMAT!r}")
    expected = {"model": key.model, "data": key.data, "options": asdict(key.options)}
    differing = [name for name, value in expected.items() if content.get(name) != value]
    if differing:
        other = {"model": "another model", "data": "other images", "options": "other options"}
        raise InputError(
            f"the range cache belongs to {' and '.join(other[name] for name in differing)}",
            where=path,
            found="; ".join(
                f"{n} {_format_value(content.get(n))}, expected {_format_value(expected[n])}" for n in differing
            ),
            fix="delete the file to measure the ranges again, or give another file",
        )
    tables = [table for title in ("amax", "largest") if isinstance(table := content.get(title), dict)]
    if len(tables) < 2:
        raise _not_a_cache(path, "no ranges")
    if bad := [f"{name}: {value!r}" for table in tables for name, value in table.items() if not _is_range(value)]:
        raise _not_a_cache(path, f"not ranges: {listed(bad)}")
    return Ranges(*({name: float(value) for name, value in table.items()} for table in tables))


def write_tensorrt_cache(path: Path, amax: Mapping[str, float], header: str = TENSORRT_HEADER) -> str:
    """Write a calibration cache in the format of TensorRT 10: one tensor and its scale per line, in the given order.

    The scale is amax / 127 as a big-endian float32 in hexadecimal. A tensor whose values are all zero gets the scale 1.

    Returns:
        The sha256 digest of the file.

    Raises:
        HostError: The folder cannot be written.
        ValueError: A name is empty or contains a line break, or a range has no positive float32 scale.
    """
    if not _HEADER.fullmatch(header):
        raise ValueError(f"not a header of TensorRT: {header!r}")
    lines = [header]
    for name, value in amax.items():
        scale = value / MAX_INT8 if value else 1.0
        if not name or "\n" in name:
            raise ValueError(f"not a name for one line: {name!r}")
        try:
            bits = struct.pack(">f", scale)
        except OverflowError as error:
            raise ValueError(f"no float32 scale for {name}: {value:g}") from error
        if not 0 < struct.unpack(">f", bits)[0] < math.inf:
            raise ValueError(f"no float32 scale for {name}: {value:g}")
        lines.append(f"{name}: {bits.hex()}")
    return write_atomically(path, ("\n".join(lines) + "\n").encode(), option="--export-trt-cache")


def read_tensorrt_cache(path: Path) -> tuple[str, dict[str, float]]:
    """Read the header and the ranges of a TensorRT calibration cache; writing both again gives the same scales.

    Raises:
        InputError: The file is missing or is not a calibration cache; the message names every line that cannot be read.
    """
    try:
        text = read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise InputError(
            "not a calibration cache of TensorRT",
            where=path,
            found=error,
            fix="give the text file that a calibrator wrote",
        ) from error
    # Not splitlines: names may contain characters that Unicode treats as line breaks.
    header, *lines = text.split("\n")
    header = header.removesuffix("\r")
    problems = (
        [] if _HEADER.fullmatch(header) else [f"line 1: {header[:80]!r} is not a header such as {TENSORRT_HEADER}"]
    )
    amax: dict[str, float] = {}
    for number, line in enumerate(lines, 2):
        entry = line.removesuffix("\r")
        if not entry:
            continue
        match = _ENTRY.fullmatch(entry)
        if match is None:
            problems.append(f"line {number}: {entry[:80]!r} is not `tensor: 8 hexadecimal digits`")
            continue
        name, digits = match.groups()
        (scale,) = struct.unpack(">f", bytes.fromhex(digits.zfill(8)))
        if name in amax:
            problems.append(f"line {number}: {name!r} is repeated")
        elif not (math.isfinite(scale) and scale >= 0):
            problems.append(f"line {number}: the scale of {name!r} is {scale:g}")
        else:
            amax[name] = scale * MAX_INT8
    if problems:
        raise InputError(
            "the calibration cache cannot be read",
            where=path,
            found=listed(problems),
            fix="correct these lines, or calibrate again",
        )
    return header, amax


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"repeated: {listed(sorted({n for n in names if names.count(n) > 1}))}")
    return content


def _is_range(value: object) -> bool:
    # Compared, not converted to float: integers in JSON may be too large.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def _format_value(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={value[name]}" for name in sorted(value))
    return str(value)


def _not_a_cache(path: Path, found: object) -> InputError:
    return InputError("not a range cache", where=path, found=found, fix="delete the file to measure the ranges again")
