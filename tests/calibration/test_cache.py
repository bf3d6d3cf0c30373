"""Caches come back as they went, and only for what they were made for."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskplan.calibration.cache import (
    TENSORRT_HEADER,
    CacheKey,
    read_cache,
    read_tensorrt_cache,
    write_cache,
    write_tensorrt_cache,
)
from maskplan.calibration.ranges import RangeOptions, Ranges
from maskplan.pipeline.core.errors import InputError

KEY = CacheKey("m" * 64, "d" * 64, RangeOptions("entropy"))
AMAX = {"relu: 2": 6.0, "conv": 0.1, "a b": 3.4028234663852886e38, "zeros": 0.0, "äö\u2028": 1e-30}
RANGES = Ranges(AMAX, {name: 1.5 * min(amax, 1e30) for name, amax in AMAX.items()})


def test_ranges_come_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    write_cache(path, KEY, RANGES)
    assert read_cache(path, KEY) == RANGES


def test_the_file_is_sorted_json_of_one_tensor_a_line(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    one = write_cache(path, KEY, RANGES)
    assert one == write_cache(path, KEY, Ranges(*(dict(reversed(t.items())) for t in (RANGES.amax, RANGES.largest))))
    content = json.loads(path.read_text())
    assert list(content) == sorted(content)
    assert list(content["amax"]) == list(content["largest"]) == sorted(AMAX)
    before = path.read_text().splitlines()
    write_cache(path, KEY, replace(RANGES, amax=AMAX | {"conv": 0.2}))
    changed = [line for line in path.read_text().splitlines() if line not in before]
    assert changed == ['    "conv": 0.2,']


def test_a_cache_of_another_model_is_refused_with_both_digests(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    write_cache(path, KEY, RANGES)
    with pytest.raises(InputError, match="belongs to another model") as caught:
        read_cache(path, replace(KEY, model="f" * 64))
    assert "m" * 64 in str(caught.value)
    assert "f" * 64 in str(caught.value)
    assert str(path) in str(caught.value)


def test_other_images_and_options_are_refused_together(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    write_cache(path, KEY, RANGES)
    with pytest.raises(InputError, match="belongs to other images and other options") as caught:
        read_cache(path, CacheKey(KEY.model, "e" * 64, RangeOptions("percentile", 99.9)))
    for text in ("d" * 64, "e" * 64, "method=entropy", "method=percentile", "percentile=99.9"):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "Expecting"),
        ("[]", "no format"),
        ('{"format": "other"}', "no format"),
        ('{"amax": {"a": 1, "a": 2}}', "repeated: a"),
        ("\udcff", "decode"),
    ],
)
def test_what_is_no_cache_is_refused(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "ranges.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match="not a range cache") as caught:
        read_cache(path, KEY)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "value", [-1, "6", None, True, float("nan"), float("inf"), 10**400], ids=lambda value: str(value)[:9]
)
@pytest.mark.parametrize("table", ["amax", "largest"])
def test_what_is_no_range_is_refused(tmp_path: Path, value: object, table: str) -> None:
    path = tmp_path / "ranges.json"
    write_cache(path, KEY, RANGES)
    content = json.loads(path.read_text())
    content[table]["conv"] = value
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="conv"):
        read_cache(path, KEY)


def test_a_missing_cache_and_bad_ranges_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="file not found"):
        read_cache(tmp_path / "ranges.json", KEY)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="conv"):
            write_cache(tmp_path / "ranges.json", KEY, Ranges({"conv": bad}, {}))
    assert not list(tmp_path.iterdir())


def test_a_calibration_cache_of_tensorrt_is_read(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_text("TRT-8601-EntropyCalibration2\ninput: 3c010a14\n(Unnamed Layer* 3) [Conv]: out: 3f800000\n")
    header, amax = read_tensorrt_cache(path)
    assert header == "TRT-8601-EntropyCalibration2"
    assert amax == {
        "input": 127 * struct.unpack(">f", b"\x3c\x01\x0a\x14")[0],
        "(Unnamed Layer* 3) [Conv]: out": 127.0,
    }
    assert amax["input"] == pytest.approx(1.0002, abs=1e-4)
    copy = tmp_path / "copy"
    write_tensorrt_cache(copy, amax, header)
    assert copy.read_bytes() == path.read_bytes()


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\n"), min_size=1)
SCALES = st.integers(1, 0x7F7FFFFF)


@settings(deadline=None)
@given(bits=st.dictionaries(NAMES, SCALES))
def test_tables_come_back_to_the_last_bit(tmp_path_factory: pytest.TempPathFactory, bits: dict[str, int]) -> None:
    one, other = (tmp_path_factory.getbasetemp() / name for name in ("table", "copy"))
    one.write_bytes("".join([f"{TENSORRT_HEADER}\n", *(f"{name}: {b:08x}\n" for name, b in bits.items())]).encode())
    header, amax = read_tensorrt_cache(one)
    assert list(amax) == list(bits)
    write_tensorrt_cache(other, amax, header)
    assert other.read_bytes() == one.read_bytes()


def test_zeros_get_the_scale_1_and_short_digits_are_read(tmp_path: Path) -> None:
    path = tmp_path / "table"
    write_tensorrt_cache(path, {"zeros": 0.0, "relu": 127.0})
    assert path.read_text() == f"{TENSORRT_HEADER}\nzeros: 3f800000\nrelu: 3f800000\n"
    path.write_bytes(f"{TENSORRT_HEADER}\r\na: 0\r\nb: 800000\r\n\r\n".encode())
    assert read_tensorrt_cache(path) == (TENSORRT_HEADER, {"a": 0.0, "b": 127 * 2.0**-126})


def test_every_malformed_line_is_named_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "table"
    lines = [
        "TRT-x",
        "good: 3c010a14",
        "no digits",
        "long: 3c010a1400",
        "good: 3c010a14",
        "nan: 7fc00000",
        "neg: bf800000",
    ]
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match="cannot be read") as caught:
        read_tensorrt_cache(path)
    for told in (
        "line 1",
        "line 3: 'no digits'",
        "line 4: 'long",
        "line 5: 'good' is repeated",
        "line 6: the scale of",
    ):
        assert told in str(caught.value)
    assert "line 2" not in str(caught.value)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not a calibration cache"):
        read_tensorrt_cache(path)


@pytest.mark.parametrize(
    "amax", [{"a\nb": 1.0}, {"": 1.0}, {"a": -1.0}, {"a": 1e-60}, {"a": 1e60}, {"a": float("nan")}]
)
def test_names_and_scales_without_a_valid_line_are_not_written(tmp_path: Path, amax: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"no float32 scale|not a name"):
        write_tensorrt_cache(tmp_path / "table", amax)
    assert not list(tmp_path.iterdir())
