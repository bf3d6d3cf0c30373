"""What a network returns: for each output, logits over an axis of classes, or values."""

from __future__ import annotations

from collections.abc import Sequence

from maskplan.pipeline.core.artifacts import OutputKind, TensorSpec
from maskplan.pipeline.core.choices import LOGITS, VALUES, OutputType
from maskplan.pipeline.core.errors import InputError, listed

_FLOATS = ("float32", "float16", "float64")


def guess_kinds(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> tuple[OutputKind, ...]:
    """The kinds of a graph's outputs by their shapes.

    Logits are floats (N, classes) or of unknown shape if they are the only output for one image, and floats
    (N, classes, H, W) with the size of the input image and another number of channels than it. Everything else is values.
    """
    return tuple(OutputKind(o.name, LOGITS if _looks_like_logits(o, inputs, outputs) else VALUES) for o in outputs)


def _looks_like_logits(output: TensorSpec, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    shape = output.shape
    if output.dtype not in _FLOATS:
        return False
    images = [i for i in inputs if len(i.shape) == 4]
    if len(shape) == 2:
        return len(outputs) == 1 and shape[1] != 1
    if not shape:
        return len(outputs) == len(inputs) == len(images) == 1
    if len(shape) != 4 or len(images) != 1 or shape[1] is None or shape[1] < 2:
        return False
    return shape[2:] == images[0].shape[2:] and None not in shape[2:] and shape[1] != images[0].shape[1]


def parse_kinds(texts: Sequence[str], guessed: Sequence[OutputKind], where: object = None) -> tuple[OutputKind, ...]:
    """`["out:logits", "boxes:values", "mask:logits:3"]` over the guessed kinds.

    Raises:
        InputError: A text is no name and kind, or there is no such output.
    """
    given, problems = {}, []
    for text in texts:
        name, kind, axis = _split(text)
        if kind is None:
            problems.append(f"{text!r} is not NAME:logits, NAME:logits:AXIS or NAME:values")
        elif name not in {g.name for g in guessed}:
            problems.append(f"no output is called {name!r}")
        else:
            given[name] = OutputKind(name, kind, axis)
    if problems:
        names = ", ".join(g.name for g in guessed)
        raise InputError("invalid --outputs", where=where, found=listed(problems), fix=f"the outputs are {names}")
    return tuple(given.get(g.name, g) for g in guessed)


def _split(text: str) -> tuple[str, OutputType | None, int]:
    name, _, last = text.rpartition(":")
    if last in (LOGITS, VALUES) and name:
        return name, LOGITS if last == LOGITS else VALUES, 1
    start, _, kind = name.rpartition(":")
    if kind == LOGITS and start and last.isdecimal() and int(last) > 0:
        return start, LOGITS, int(last)
    return text, None, 1
