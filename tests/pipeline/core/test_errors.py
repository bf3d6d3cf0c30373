"""One message with what failed, where, what was found and how to fix it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from maskplan.pipeline.core.errors import HostError, InputError, PipelineError, did_you_mean, host_error, listed


def test_a_message_has_a_line_for_each_thing_known() -> None:
    error = InputError("it broke", where=Path("/a/b"), found=3, fix="mend it")
    assert str(error) == "it broke\n  where: /a/b\n  found: 3\n  fix:   mend it"
    assert (error.what, error.where, error.found, error.fix) == ("it broke", Path("/a/b"), 3, "mend it")


def test_what_is_not_known_has_no_line() -> None:
    assert str(HostError("it broke")) == "it broke"
    assert str(HostError("it broke", fix="mend it")) == "it broke\n  fix:   mend it"


def test_a_found_value_of_zero_is_shown() -> None:
    assert "found: 0" in str(InputError("it broke", found=0))


def test_both_kinds_are_caught_as_one() -> None:
    assert issubclass(InputError, PipelineError)
    assert issubclass(HostError, PipelineError)
    assert not issubclass(InputError, HostError)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_named(number: int) -> None:
    error = host_error(OSError(number, os.strerror(number)), where="out")
    assert error.what == "the disk is full"
    assert (error.where, error.found) == ("out", os.strerror(number))
    assert "run the same command again" in str(error.fix)


def test_another_write_error_asks_for_another_folder() -> None:
    error = host_error(OSError(errno.EROFS, os.strerror(errno.EROFS)), where="out")
    assert error.what == "cannot write"
    assert "--output" in str(error.fix)


def test_the_fix_names_the_option_of_the_file() -> None:
    error = host_error(OSError(errno.EACCES, os.strerror(errno.EACCES)), where="r.json", option="--report")
    assert error.fix == "choose a folder that you may write to with --report"


def test_an_os_error_without_a_number_keeps_its_text() -> None:
    assert host_error(OSError("odd"), where="out").found == "odd"


@pytest.mark.parametrize(
    ("items", "text"),
    [
        ([], ""),
        (["a"], "a"),
        (["a", "b", "c"], "a, b, c"),
        (range(5), "0, 1, 2, 3, 4"),
        (range(6), "0, 1, 2, 3, 4 and 1 more"),
        (range(105), "0, 1, 2, 3, 4 and 100 more"),
    ],
)
def test_a_long_list_is_cut_and_counted(items: object, text: str) -> None:
    assert listed(items) == text  # type: ignore[arg-type]


def test_the_number_of_items_shown_can_be_chosen() -> None:
    assert listed((c for c in "abcd"), 2) == "a, b and 2 more"


def test_a_typo_is_recognized() -> None:
    assert did_you_mean("resnet5", ["resnet50", "vgg16"]) == "did you mean 'resnet50'?"
    assert "'resnet50'" in str(did_you_mean("resnte50", ["resnet50", "vgg16"]))


def test_no_more_than_three_words_are_offered() -> None:
    offered = did_you_mean("vgg1", [f"vgg1{i}" for i in range(9)])
    assert offered is not None
    assert offered.count(" or ") == 2


def test_a_word_unlike_any_other_gets_no_suggestion() -> None:
    assert did_you_mean("zebra", ["resnet50", "vgg16"]) is None
    assert did_you_mean("x", []) is None
