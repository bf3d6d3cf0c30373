"""The rule on which weights can ever be N:M."""

from __future__ import annotations

import pytest

from maskplan.pipeline.masking.eligibility import ineligible_reason


@pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul"])
@pytest.mark.parametrize(("channels", "m"), [(4, 4), (64, 4), (12, 6), (3, 1)])
def test_an_ungrouped_op_with_whole_groups_is_eligible(op: str, channels: int, m: int) -> None:
    assert ineligible_reason(op, channels, 1, m) is None


@pytest.mark.parametrize(
    ("op", "channels", "groups", "m", "reason"),
    [
        ("Conv", 3, 1, 4, "channels_not_multiple_of_4"),
        ("Conv", 58, 1, 4, "channels_not_multiple_of_4"),
        ("Gemm", 10, 1, 4, "channels_not_multiple_of_4"),
        ("MatMul", 4, 1, 6, "channels_not_multiple_of_4"),
        ("Conv", 8, 2, 4, "grouped"),
        ("Conv", 1, 32, 4, "grouped"),
        ("ConvTranspose", 64, 1, 4, "unsupported_op"),
        ("ConvTranspose", 3, 3, 4, "unsupported_op"),
        ("LSTM", 64, 1, 4, "unsupported_op"),
    ],
)
def test_what_cannot_run_sparse_has_a_reason(op: str, channels: int, groups: int, m: int, reason: str) -> None:
    assert ineligible_reason(op, channels, groups, m) == reason


def test_groups_of_four_are_the_default() -> None:
    assert ineligible_reason("Conv", 6, 1) is not None
    assert ineligible_reason("Conv", 8, 1) is None
