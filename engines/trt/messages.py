"""What the library says about a node, in words that a user of the model can act on, and a way out."""

from __future__ import annotations

import re

NOT_SUPPORTED = "the operator is not supported, at least not with these attributes, inputs and outputs"
NO_PLUGIN = "there is no operator and no plugin of this name and domain"
_NO_TYPE = "of a type that the library does not know"

# Places in the library's sources, and the checks that failed there.
_PLACES = (
    re.compile(r"\s*In [\w:~<>]+(?:\(\))? at /\S+?:\d+"),
    re.compile(r"^Assertion failed: "),
    re.compile(r"^.*?(?:==|\|\||&&|>=|<=)[^:]*(?:::\w+)*: (?=[A-Z])"),
    re.compile(r"^Invalid Node - [^\n]*(?:\n|$)"),
    re.compile(r"\b\w+::\w+: Error Code \d+: [\w ]+ ?(?=\()"),
    re.compile(r"^\[\w+\.\w+::\w+::\d+\] Error Code \d+: [\w ]+ ?(?=\()"),
)
_CONDITION = re.compile(r'^.*&& "(?P<text>[^"]+)"$', re.DOTALL)
_WITHOUT_DRIVER = re.compile(r"\(cudaError 35: ")
_IN_BRACKETS = re.compile(r"\s*\((?P<text>.*)\)\s*", re.DOTALL)

_WAYS_OUT = (
    (NOT_SUPPORTED, "write it with other operators, or export with another opset"),
    ("was not found in plugin registry", "write it with other operators, or export with another opset"),
    (NO_PLUGIN, "remove this operator, or export it as operators of ONNX itself"),
    (_NO_TYPE, "change the types of the graph's inputs and tensors to float, half, int8, int32, int64 or bool"),
    (
        "input has type Int32 but must have type",
        "keep biases in floating point: `maskplan calibrate` does, onnxruntime's quantizer with QuantizeBias=False",
    ),
    ("zero point", "quantize symmetrically, with a zero point of 0: `maskplan calibrate` does"),
    ("same input types", "make the types of its inputs equal with a Cast"),
)
_CHECK = "see whether onnx.checker.check_model(model, full_check=True) accepts the file, and export it again"


def readable(text: str) -> str:
    """A message without the library's own file names and conditions, and without complaints that there is no driver."""
    lines = [line for line in text.strip().split("\n") if not _WITHOUT_DRIVER.search(line)]
    shortened = []
    for line in lines or [text.strip()]:
        for place in _PLACES:
            line = place.sub("", line)
        bracketed = _IN_BRACKETS.fullmatch(line)
        line = bracketed["text"] if bracketed else line
        condition = _CONDITION.fullmatch(line)
        shortened.append(condition["text"] if condition else line.rpartition("): ")[2] or line)
    found = "; ".join(dict.fromkeys(line.strip() for line in shortened if line.strip()))
    if "ONNX date type" in found:
        return f"an input or a tensor is {_NO_TYPE}"
    return found or text.strip()


def way_out(reason: str, default: str = _CHECK) -> str:
    """What to do about a reason that `readable` or this module gave."""
    return next((fix for part, fix in _WAYS_OUT if part in reason), default)
