"""Records to JSON and back, and the errors for JSON that does not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskplan.pipeline.core.artifacts import (
    EngineFile,
    ImageSet,
    LayerSparsity,
    Preprocessing,
    Profile,
    Provenance,
    TensorSpec,
)
from maskplan.pipeline.core.serialization import decode, encode, parse_json, parse_toml


@dataclass(frozen=True)
class Inner:
    number: int
    share: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    flag: bool
    pair: tuple[float, float]
    many: tuple[Inner, ...]
    maybe: Inner | None
    table: dict[str, int]
    path: Path
    extra: tuple[str, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class Choices:
    RENAMED_FIELDS: ClassVar[Mapping[str, str]] = {"kind": "layout", "old_backend": "backend"}

    layout: Literal["channel", "flat"]
    backend: Literal["tensorrt", "onnxruntime"] | None = None
    states: tuple[Literal["sparse", "dense"], ...] = ()


words = st.text(max_size=10)
finite = st.floats(allow_nan=False, allow_infinity=False)
inners = st.builds(Inner, st.integers(), finite)
outers = st.builds(
    Outer,
    name=words,
    flag=st.booleans(),
    pair=st.tuples(finite, finite),
    many=st.lists(inners, max_size=3).map(tuple),
    maybe=st.none() | inners,
    table=st.dictionaries(words, st.integers(), max_size=3),
    path=st.sampled_from(
        [Path("/somewhere/x/a.bin"), Path("/somewhere/x/b/c"), Path("/elsewhere/d"), Path("/somewhere/x")]
    ),
    extra=st.lists(words, max_size=2).map(tuple),
)
GOOD: dict[str, Any] = {
    "name": "n",
    "flag": True,
    "pair": [1.0, 2.0],
    "many": [{"number": 1}],
    "maybe": None,
    "table": {"a": 1},
    "path": "p",
}


@given(outers)
@settings(max_examples=60, deadline=None)
def test_a_record_survives_json(record: Outer) -> None:
    assert decode(Outer, json.loads(json.dumps(encode(record)))) == record


@given(outers)
@settings(max_examples=60, deadline=None)
def test_a_record_survives_a_move_of_its_folder(record: Outer) -> None:
    """Paths below the folder follow it; others stay."""
    moved = decode(Outer, json.loads(json.dumps(encode(record, Path("/somewhere/x")))), Path("/new"))
    stays = not record.path.is_relative_to("/somewhere/x")
    assert moved.path == (record.path if stays else Path("/new") / record.path.relative_to("/somewhere/x"))
    assert encode(moved) | {"path": ""} == encode(record) | {"path": ""}


def test_the_record_of_an_engine_survives_json() -> None:
    preprocessing = Preprocessing(3, 8, 8, 0, "nearest", (0.0, 0.5, 1.0), (1.0, 1.0, 1.0))
    images = (ImageSet("train", 3, "ab", ("cd",)),)
    provenance = Provenance("m", False, "random", "00", 2, ("a", "b"), preprocessing, image_sets=images)
    spec = (TensorSpec("input", "float32", (None, 3, 8, 8)),)
    layers = (LayerSparsity("conv", None, "unknown", None, 4),)
    engine = EngineFile(
        Path("/out/e.plan"),
        "ee",
        5,
        "tensorrt",
        "fp16",
        "10.3",
        "GPU",
        "9.0",
        None,
        True,
        "strong",
        (Profile(1, 2, 4),),
        spec,
        spec,
        "ff",
        1.5,
        provenance,
        layers,
        ("note",),
    )
    assert decode(EngineFile, json.loads(json.dumps(encode(engine, Path("/out")))), Path("/out")) == engine


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_json_cannot_hold_become_none(value: float) -> None:
    assert encode({"a": [value, 1.0]}) == {"a": [None, 1.0]}


def test_keys_of_a_table_become_text() -> None:
    assert encode({1: (2, 3)}) == {"1": [2, 3]}


def test_an_integer_is_accepted_for_a_float() -> None:
    assert decode(Inner, {"number": 1, "share": 2}) == Inner(1, 2.0)
    assert isinstance(decode(Inner, {"number": 1, "share": 2}).share, float)


def test_fields_with_defaults_may_be_left_out() -> None:
    assert decode(Outer, GOOD).many == (Inner(1, 0.5),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 5}, "Outer.name: expected str, found 5"),
        ({"name": None}, "Outer.name: expected str, found None"),
        ({"flag": 1}, "Outer.flag: expected bool, found 1"),
        ({"flag": "true"}, "Outer.flag: expected bool"),
        ({"pair": [1.0]}, "Outer.pair: expected 2 items"),
        ({"pair": [1.0, "b"]}, "Outer.pair: expected float, found 'b'"),
        ({"pair": [1.0, True]}, "Outer.pair: expected float, found True"),
        ({"pair": 5}, "Outer.pair: expected a list"),
        ({"pair": "ab"}, "Outer.pair: expected a list"),
        ({"many": [{"number": 1}, {"number": 1.5}]}, "Outer.many[1].number: expected int, found 1.5"),
        ({"many": [{"number": True}]}, "Outer.many[0].number: expected int, found True"),
        ({"many": [{}]}, "Outer.many[0]: expected the fields ['number', 'share'], found ['number']"),
        ({"many": {"number": 1}}, "Outer.many: expected a list"),
        ({"maybe": 5}, "Outer.maybe: expected a table"),
        ({"table": [1]}, "Outer.table: expected a table"),
        ({"table": {"a": "b"}}, "Outer.table.a: expected int, found 'b'"),
        ({"path": 5}, "Outer.path: expected a path"),
        ({"surplus": 1}, "found ['surplus']"),
    ],
)
def test_an_error_names_the_field_and_what_was_expected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="expected") as raised:
        decode(Outer, GOOD | change)
    assert message in str(raised.value)


@pytest.mark.parametrize("missing", sorted(GOOD))
def test_a_missing_field_is_named(missing: str) -> None:
    with pytest.raises(ValueError, match="expected the fields") as raised:
        decode(Outer, {k: v for k, v in GOOD.items() if k != missing})
    assert f"found ['{missing}']" in str(raised.value)


def test_a_value_that_is_not_a_table_is_refused() -> None:
    for value in (None, 5, "text", [1]):
        with pytest.raises(ValueError, match="Inner: expected a table"):
            decode(Inner, value)


def test_a_long_value_is_shortened_in_the_error() -> None:
    with pytest.raises(ValueError, match="expected int") as raised:
        decode(Inner, {"number": "x" * 10_000})
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("layout", ["channel", "flat"])
def test_a_member_of_a_closed_set_is_accepted(layout: str) -> None:
    assert decode(Choices, {"layout": layout}).layout == layout


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"layout": "rows"}, "Choices.layout: expected one of channel, flat, found 'rows'"),
        ({"layout": "Channel"}, "Choices.layout: expected one of channel, flat"),
        ({"layout": None}, "Choices.layout: expected one of channel, flat, found None"),
        ({"layout": ["flat"]}, "Choices.layout: expected one of channel, flat"),
        ({"layout": "flat", "backend": "tvm"}, "Choices.backend: expected one of tensorrt, onnxruntime, found 'tvm'"),
        ({"layout": "flat", "states": ["dense", "unknown"]}, "Choices.states[1]: expected one of sparse, dense"),
    ],
)
def test_a_value_outside_a_closed_set_is_refused(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="expected one of") as raised:
        decode(Choices, value)
    assert message in str(raised.value)


def test_an_optional_choice_may_be_none() -> None:
    assert decode(Choices, {"layout": "flat", "backend": None}) == Choices("flat")


def test_a_renamed_field_is_read_under_its_old_name() -> None:
    assert decode(Choices, {"kind": "flat", "old_backend": "tensorrt"}) == Choices("flat", "tensorrt")


def test_the_new_name_of_a_field_takes_precedence_over_the_old_one() -> None:
    assert decode(Choices, {"kind": "flat", "layout": "channel"}).layout == "channel"


def test_the_value_of_a_renamed_field_is_checked_under_its_new_name() -> None:
    with pytest.raises(ValueError, match=r"Choices\.layout: expected one of channel, flat, found 'rows'"):
        decode(Choices, {"kind": "rows"})


def test_a_record_is_written_under_the_new_names() -> None:
    assert encode(Choices("flat")) == {"layout": "flat", "backend": None, "states": []}


def test_an_engine_sidecar_from_before_a_rename_is_read() -> None:
    assert EngineFile.RENAMED_FIELDS == {"stripped": "strip_plan"}
    spec = [{"name": "input", "dtype": "float32", "shape": [None, 3, 8, 8]}]
    old = {
        "path": "e.plan", "sha256": "ee", "bytes": 5, "backend": "tensorrt", "precision": "fp16",
        "runtime_version": "10.3", "device": "GPU", "compute_capability": "9.0", "device_memory_bytes": None,
        "sparse_weights": True, "typing": "strong", "profiles": [], "inputs": spec, "outputs": spec,
        "onnx_sha256": "ff", "build_s": 1.5, "provenance": None, "stripped": True,
    }  # fmt: skip
    assert decode(EngineFile, old).strip_plan


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "{", b"\xff\xfe\xff", '{"a": 1' + "0" * 6000 + "}"]
)
def test_what_json_cannot_hold_or_python_cannot_read_is_one_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_json(text)


@pytest.mark.parametrize("data", [b"a = " + b"[" * 100_000, b"a = " + b"9" * 5000, b"\xff", b"a ="])
def test_what_toml_cannot_hold_or_python_cannot_read_is_one_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_toml(data)


def test_an_integer_of_thousands_of_digits_does_not_fit_a_record() -> None:
    for value in (10**4000, -(10**400)):
        with pytest.raises(ValueError, match="number: expected fewer than 302 digits, found a longer integer"):
            decode(Inner, {"number": value})
