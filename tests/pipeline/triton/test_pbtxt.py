"""The reader of protobuf's text format, against protobuf's own."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import json_format, struct_pb2, text_format
from hypothesis import given, settings
from hypothesis import strategies as st

from maskplan.pipeline.triton.pbtxt import Message, parse, quoted

VALUES = st.recursive(
    st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def value_of(message: Message) -> Any:
    """A google.protobuf.Value, as JSON."""
    for part in message.messages("struct_value"):
        return {f.text("key"): value_of(f.messages("value")[0]) for f in part.messages("fields")}
    for part in message.messages("list_value"):
        return [value_of(item) for item in part.messages("values")]
    return message.text("string_value")


@settings(max_examples=40)
@given(st.dictionaries(st.text(), VALUES, max_size=4), st.booleans(), st.booleans(), st.booleans())
def test_what_protobuf_writes_is_read(values: dict[str, Any], one_line: bool, utf8: bool, short: bool) -> None:
    struct = json_format.ParseDict(values, struct_pb2.Struct())
    text = text_format.MessageToString(struct, as_one_line=one_line, as_utf8=utf8, use_short_repeated_primitives=short)
    assert value_of(parse(f"struct_value {{ {text} }}")) == values


@settings(max_examples=50)
@given(st.text())
def test_what_is_quoted_is_read_by_protobuf_and_by_us(text: str) -> None:
    line = f"string_value: {quoted(text)}"
    assert line.isascii()
    assert text_format.Parse(line, struct_pb2.Value()).string_value == text
    assert parse(line).text("string_value") == text


def test_lists_brackets_comments_and_separators_of_every_kind() -> None:
    message = parse("""# a comment { [
a: [ 1, -2, 3.5e3 ], a: 4; b < c: 'x' "y" # end of line
> b: { c: TYPE_FP32 } d [ { c: "1" }, < c: "2" > ] e: []""")
    assert message.texts("a") == ["1", "-2", "3.5e3", "4"]
    assert [m.text("c") for m in message.messages("b")] == ["xy", "TYPE_FP32"]
    assert [m.text("c") for m in message.messages("d")] == ["1", "2"]
    assert (message.texts("e"), message.text("f", "none"), message.messages("a")) == ([], "none", [])


@pytest.mark.parametrize(
    "text", ["a", "a:", "a: {", "a { b: 1", "}", "a: 1 }", 'a: "x', "a: [1", "a: [1 { ]", "a { b: 1 >", "a: €"]
)
def test_what_is_not_the_format_is_refused(text: str) -> None:
    with pytest.raises(text_format.ParseError):
        text_format.Parse(text, struct_pb2.Struct(), allow_unknown_field=True)
    with pytest.raises(ValueError, match=r"."):
        parse(text)


def test_a_long_comment_before_nonsense_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="cannot parse"):
        parse("#" * 5000 + "\n" + "# #" * 50 + "\n€")


def test_a_lone_surrogate_is_quoted_and_deep_nesting_is_no_config() -> None:
    assert parse("name: " + quoted("a\ud800")).text("name") == "a\\ud800"
    with pytest.raises(ValueError, match="nested"):
        parse("a {" * 100_000)
