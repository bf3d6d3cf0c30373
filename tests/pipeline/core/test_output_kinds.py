"""Kinds of outputs: guessed by shape, or given."""

from __future__ import annotations

import pytest

from maskplan.pipeline.core.artifacts import OutputKind, TensorSpec
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.output_kinds import guess_kinds, parse_kinds

IMAGE = TensorSpec("x", "float32", (None, 3, 32, 48))


def guessed(*shapes: tuple[int | None, ...], dtype: str = "float32") -> list[str]:
    outputs = [TensorSpec(f"y{i}", dtype, shape) for i, shape in enumerate(shapes)]
    return [kind.kind for kind in guess_kinds([IMAGE], outputs)]


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((None, 10), "logits"),
        ((None, 1), "values"),
        ((), "logits"),
        ((None, 21, 32, 48), "logits"),
        ((None, 3, 32, 48), "values"),
        ((None, 1, 32, 48), "values"),
        ((None, 21, 16, 24), "values"),
        ((None, 21, None, None), "values"),
        ((None, 100, 4), "values"),
    ],
)
def test_one_output(shape: tuple[int | None, ...], kind: str) -> None:
    assert guessed(shape) == [kind]


def test_several_outputs_and_integers_are_values() -> None:
    assert guessed((None, 10), (None, 4)) == ["values", "values"]
    assert guessed((None, 21, 32, 48), (None, 21, 32, 48)) == ["logits", "logits"]
    assert guessed((None, 10), dtype="int64") == ["values"]


def test_given_kinds_replace_guessed_ones() -> None:
    known = (OutputKind("a:0", "values"), OutputKind("b", "logits"))
    assert parse_kinds(["a:0:logits:3", "b:values"], known) == (
        OutputKind("a:0", "logits", 3),
        OutputKind("b", "values"),
    )
    assert parse_kinds([], known) == known


def test_every_wrong_text_is_named() -> None:
    with pytest.raises(InputError) as error:
        parse_kinds(["b:boxes", "c:logits", "b:logits:0"], (OutputKind("b", "logits"),))
    for part in ("'b:boxes'", "'c'", "'b:logits:0'", "the outputs are b"):
        assert part in str(error.value)
