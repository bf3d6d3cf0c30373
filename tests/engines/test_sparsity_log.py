"""The sparsity lines of a builder's log, after the formats of TensorRT 8, 10 and 11."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from maskplan.engines.evidence import (
    SparsityLog,
    parse_sparsity_log,
)

ELIGIBLE = "[I] [TRT] (Sparsity) Layers eligible for sparse math: Conv_3 + Relu_4, Gemm_725"
PICKED = "[I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers:"
LOG_B = (
    "[V] [TRT] (Sparsity) Found 1 layer(s) eligible to use sparse tactics: a",
    "[V] [TRT] (Sparsity) Chose 1 layer(s) using sparse tactics: a",
)


@pytest.mark.parametrize(
    ("lines", "log"),
    [
        ([], SparsityLog((), (), (), 0)),
        ([ELIGIBLE, PICKED], SparsityLog(("Conv_3 + Relu_4", "Gemm_725"), (), ((2, 0),), 0)),
        (
            [ELIGIBLE, f"{PICKED} Gemm_725\n"],
            SparsityLog(("Conv_3 + Relu_4", "Gemm_725"), ("Gemm_725",), ((2, 1),), 0),
        ),
        (["[I] [TRT] (Sparsity) Layers eligible for sparse math:", PICKED], SparsityLog((), (), ((0, 0),), 0)),
        (
            [
                "[03/23/2021-00:14:05] [I] [TRT] (Sparsity) Layers eligible for sparse math: conv1, conv2, conv3",
                "[TensorRT] INFO: (Sparsity) TRT inference plan picked sparse implementation for layers: conv2, conv3",
            ],
            SparsityLog(("conv1", "conv2", "conv3"), ("conv2", "conv3"), ((3, 2),), 0),
        ),
        (
            [
                "(Sparsity) Found 39 layer(s) eligible to use sparse tactics",
                "(Sparsity) Chose 0 layer(s) using sparse tactics",
            ],
            SparsityLog((), (), ((39, 0),), 0),
        ),
        (
            [
                "\x1b[0;33m[V] [TRT] (Sparsity) Found 2 layer(s) eligible to use sparse tactics: a + PWN(b, c), d\x1b[0m",
                "[V] [TRT] (Sparsity) Chose 1 layer(s) using sparse tactics: d",
            ],
            SparsityLog(("a + PWN(b, c)", "d"), ("d",), ((2, 1),), 0),
        ),
        (
            [
                "(Sparsity) Found 0 layer(s) eligible to use sparse tactics:",
                "(Sparsity) Chose 0 layer(s) using sparse tactics: ",
            ],
            SparsityLog((), (), ((0, 0),), 0),
        ),
    ],
)
def test_both_forms_of_log_lines_are_read(lines: list[str], log: SparsityLog) -> None:
    assert parse_sparsity_log(lines) == log
    around = ["[I] Building", *lines, "sparse tactics", "Found 9 layer(s) eligible to use sparse tactics"]
    assert parse_sparsity_log(iter(around)) == log


def test_every_pair_is_kept_in_order_and_every_name_once() -> None:
    found, chose = "(Sparsity) Found {} layer(s) eligible to use sparse tactics: {}", "(Sparsity) Chose {} layer(s) "
    lines = [
        found.format(2, "b, a"),
        chose.format(1) + "using sparse tactics: b",
        found.format(196, ""),
        chose.format(140) + "using sparse tactics",
        found.format(2, "a, c"),
        chose.format(2) + "using sparse tactics: c, b",
    ]
    assert parse_sparsity_log(lines) == SparsityLog(("b", "a", "c"), ("b", "c"), ((2, 1), (196, 140), (2, 2)), 0)


@pytest.mark.parametrize(
    ("lines", "unread", "counts"),
    [
        (["(Sparsity) Found"], 1, ()),
        (["(Sparsity) Found many layer(s) eligible to use sparse tactics"], 1, ()),
        (["(Sparsity) Found -1 layer(s) eligible to use sparse tactics"], 1, ()),
        (["(Sparsity) Found 3 layer(s) eligible to use sparse tactics: a, b"], 1, ()),
        (["(Sparsity) Found 3 layer(s) eligible to use sparse tactics and more"], 1, ()),
        (["(Sparsity) something new", "(Sparsity)"], 2, ()),
        (["(Sparsity) Chose 3 layer(s) using sparse tactics"], 1, ()),
        (["(Sparsity) Found 3 layer(s) eligible to use sparse tactics"], 1, ()),
        (
            ["(Sparsity) Found 3 layer(s) eligible to use sparse tactics"] * 2
            + ["(Sparsity) Chose 1 layer(s) using sparse tactics"],
            1,
            ((3, 1),),
        ),
    ],
)
def test_malformed_lines_are_skipped_and_counted(
    lines: list[str], unread: int, counts: tuple[tuple[int, int], ...]
) -> None:
    assert parse_sparsity_log(lines) == SparsityLog((), (), counts, unread)


# Properties: whatever is done to what TensorRT says, no state is claimed that it did not say.


@given(st.sampled_from([ELIGIBLE, f"{PICKED} Gemm_725", *LOG_B]), st.integers(0, 200), st.characters(), st.booleans())
@settings(max_examples=400, deadline=None)
def test_a_changed_word_in_a_log_line_is_not_read(line: str, at: int, character: str, insert: bool) -> None:
    start = line.index("(Sparsity) ") + len("(Sparsity) ")
    fixed = line[start : line.index(":", start)]
    at %= len(fixed)
    changed = fixed[:at] + character + fixed[at + (not insert) :]
    assume(changed.strip() != fixed.strip() and "\x1b" not in changed)
    log = parse_sparsity_log([line.replace(fixed, changed)])
    number = re.search(r"\d+", changed)
    told = not log.unread or log.eligible or log.chosen
    assert not told or (number and re.sub(r"\d+", "N", changed) == re.sub(r"\d+", "N", fixed) and int(number[0]) == 1)
