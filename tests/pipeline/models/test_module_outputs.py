"""Names and order of what modules return, whatever it is."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from maskplan.pipeline.core.artifacts import OutputKind, TensorSpec
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.models.module_outputs import classes_of, flat_outputs, named_tensors

A, B, C = torch.zeros(2, 3), torch.ones(2, 3, 4, 4), torch.arange(3)
Pair = namedtuple("Pair", "first second")


@dataclass
class Boxes:
    boxes: Any
    scores: Any = None
    levels: Any = None


class Record(OrderedDict[str, Any]):
    """A dict with fields, as transformers has them: fields of None are no keys."""

    logits: Any = None


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (A, {"logits": A}),
        (B, {"output": B}),
        ([A], {"output0": A}),
        ((A, None, B), {"output0": A, "output2": B}),
        ({"out": B, "aux": A}, {"out": B, "aux": A}),
        ({0: A, 1: B}, {"0": A, "1": B}),
        (Pair(A, B), {"first": A, "second": B}),
        (Boxes(A, levels=[B, (C,)]), {"boxes": A, "levels.0": B, "levels.1.0": C}),
        (SimpleNamespace(y=A, name="net"), {"y": A}),
        (Record(logits=A, hidden=None), {"logits": A}),
        ({"input": A}, {"input.out": A}),
        ({"a": {"b": A}, "a.b": B}, {"a.b": A, "a.b_2": B}),
        ({"out": A, "size": (3, 4), "shape": B.shape, "loss": 0.5}, {"out": A}),
    ],
)
def test_tensors_are_named_after_their_places(returned: Any, expected: dict[str, torch.Tensor]) -> None:
    found = named_tensors(returned)
    assert list(found) == list(expected)
    assert all(found[name] is tensor for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("returned", "told"), [(None, "NoneType without"), ([], "list without"), ({"a": A, "b": object()}, "b is object")]
)
def test_what_is_no_tensor_is_told_by_its_name(returned: Any, told: str) -> None:
    with pytest.raises(InputError, match="does not return tensors") as caught:
        named_tensors(returned)
    assert told in str(caught.value.found)


class Returns(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: torch.Tensor) -> Any:
        return self.make(x)


def test_flat_outputs_are_a_tuple_of_distinct_tensors_and_only_in_the_context() -> None:
    module = Returns(lambda x: {"same": x, "twice": [B, B]})
    with flat_outputs(module):
        flat = module(A)
    assert [torch.equal(a, b) for a, b in zip(flat, (A, B, B), strict=True)] == [True] * 3
    assert flat[0] is not A
    assert flat[1] is not flat[2]
    assert isinstance(module(A), dict)


def test_a_single_tensor_stays_one() -> None:
    for module in (Returns(lambda x: B), Returns(lambda x: [B])):
        with flat_outputs(module):
            assert module(A) is B


@pytest.mark.parametrize(
    ("shape", "kind", "classes"),
    [
        ((None, 10), OutputKind("logits", "logits"), 10),
        ((None, 10), OutputKind("logits", "values"), 0),
        ((8, 10), OutputKind("logits", "logits"), 0),
        ((None, 10, 4), OutputKind("logits", "logits"), 0),
    ],
)
def test_a_classifier_returns_logits_for_each_image(
    shape: tuple[int | None, ...], kind: OutputKind, classes: int
) -> None:
    assert classes_of([TensorSpec("logits", "float32", shape)], [kind]) == classes
    assert classes_of([TensorSpec("logits", "float32", shape)] * 2, [kind] * 2) == 0
