"""The subset of Protobuf's text format that Triton configs use: a parser without protobuf, and quoting of strings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

_TOKEN = re.compile(
    r"""(?:\s|#[^\n]*(?:\n|\Z))*(?:("(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')|([\w.+-]+)|([{}<>\[\]:,;])|\Z)"""
)
_CLOSES = {"{": "}", "<": ">"}


class Message:
    """The fields of one message in order; scalars are text, strings are unquoted.

    Args:
        fields: (name, value) pairs; a repeated field occurs several times.
    """

    def __init__(self, fields: list[tuple[str, str | Message]]) -> None:
        self._fields = fields

    def texts(self, name: str) -> list[str]:
        """All scalars of a field."""
        return [value for key, value in self._fields if key == name and isinstance(value, str)]

    def text(self, name: str, default: str = "") -> str:
        """The last scalar of a field, which overrides earlier ones."""
        return (self.texts(name) or [default])[-1]

    def messages(self, name: str) -> list[Message]:
        """All messages of a field."""
        return [value for key, value in self._fields if key == name and isinstance(value, Message)]


def parse(text: str) -> Message:
    """Parse a message.

    Raises:
        ValueError: The text is not in the text format, or messages are nested too deeply.
    """
    tokens = list(_tokens(text))
    try:
        message, end = _message(tokens, 0, "")
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if end != len(tokens):
        raise ValueError(f"unexpected {tokens[end]}")
    return message


def quoted(text: str) -> str:
    """Quote a string for the text format; anything but printable ASCII becomes octal escapes."""
    plain = "".join(c if " " <= c <= "~" and c not in '"\\' else _octal(c) for c in text)
    return f'"{plain}"'


def _octal(character: str) -> str:
    # A lone surrogate, which JSON can hold, has no bytes in UTF-8.
    return "".join(f"\\{byte:03o}" for byte in character.encode(errors="backslashreplace"))


def _tokens(text: str) -> Iterator[str]:
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"cannot parse {text[at : at + 20]!r}")
        at = match.end()
        if match.lastindex is not None:
            yield match.group(match.lastindex)


def _message(tokens: list[str], at: int, closing: str) -> tuple[Message, int]:
    """Parse fields from `at` up to the closing bracket or the end; also returns that position."""
    fields: list[tuple[str, str | Message]] = []
    while at < len(tokens) and tokens[at] != closing:
        name = tokens[at]
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"expected a field name, found {name}")
        at += 1
        if _peek(tokens, at) == ":":
            at += 1
        if _peek(tokens, at) == "[":
            at += 1
            while _peek(tokens, at) != "]":
                value, at = _value(tokens, at)
                fields.append((name, value))
                if _peek(tokens, at) == ",":
                    at += 1
            at += 1
        else:
            value, at = _value(tokens, at)
            fields.append((name, value))
        if at < len(tokens) and tokens[at] in ",;":
            at += 1
    return Message(fields), at


def _value(tokens: list[str], at: int) -> tuple[str | Message, int]:
    token = _peek(tokens, at)
    if token in _CLOSES:
        message, end = _message(tokens, at + 1, _CLOSES[token])
        if _peek(tokens, end) != _CLOSES[token]:
            raise ValueError(f"{token} is not closed")
        return message, end + 1
    if token[0] in "\"'":
        text = ""
        while at < len(tokens) and tokens[at][0] in "\"'":  # adjacent strings are concatenated
            text += _unquoted(tokens[at])
            at += 1
        return text, at
    if re.fullmatch(r"[\w.+-]+", token):
        return token, at + 1
    raise ValueError(f"expected a value, found {token}")


def _unquoted(token: str) -> str:
    # The escapes are the same as in Python's bytes literals; both come from C.
    escaped = "".join(c if c.isascii() else "".join(f"\\x{byte:02x}" for byte in c.encode()) for c in token)
    try:
        value = ast.literal_eval(f"b{escaped}")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"not a string: {token}") from error
    return bytes(value).decode(errors="replace")


def _peek(tokens: list[str], at: int) -> str:
    if at >= len(tokens):
        raise ValueError("unexpected end of the text")
    return tokens[at]
