"""Which layers of a TensorRT engine run sparse: the evidence in the engine inspector's JSON and in the builder's log.

A layer's state is what its kernel's name says (`engines/kernel_names.py`), unless the rest of its description contradicts:

| state | the layer | its kernel's name |
|---|---|---|
| `sparse` | of a type that TensorRT's sparse kernels are for, with one group | a known sparse kernel's |
| `dense` | of a type that convolves or multiplies | a known dense kernel's |
| `unknown` | anything else | none, opaque, cut, changed, or of a family not seen so far |

`HasSparseWeights` (`AllowSparse` in TensorRT 8) speaks of weights and of what the builder may do, not of the kernel: it
is 1 for layers that run dense (NVIDIA/TensorRT issue 4020). It is not read.

An engine with several profiles lists each layer once for each: `conv` for the first, `conv [profile 1]` for the second.
`layers_of` keeps them all, `totals` counts them as one.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from maskplan.engines.kernel_names import kernel_state
from maskplan.exporters.weight_ops import LIKELY_SPEEDUP_CHANNELS
from maskplan.pipeline.core.artifacts import LayerSparsity
from maskplan.pipeline.core.choices import DENSE, SPARSE, UNKNOWN
from maskplan.pipeline.core.errors import InputError

T = TypeVar("T")

GROUPED = "grouped"
NOT_2TO4 = "not_2to4"
NO_FP32_KERNELS = "no_documented_fp32_kernels"
LOW_OPTIMIZATION = "optimization_level_below_3"
FLOAT_OUTPUT = "quantized_input_float_output"
FEW_CHANNELS = "likely_few_channels"

_FULL_SEARCH = 3

# Layer types whose weights a sparse kernel may multiply; `correlation`, `gemm` and `fusion` are Myelin's.
_CAN_BE_SPARSE = re.compile(
    r"(?:Cask|CaskGemm|CaskFlatten|Gemm|Cublas|Cudnn|FusedConvAct)?(?:Convolution|FullyConnected|MatrixMultiply)"
    r"|CaskConvActPool|CaskJitConv|CaskGemm|conv|correlation|conv_act_pool|gemm|fusion"
)
# Those that hold weights, and for which no sparse kernel is known: with groups, and transposed.
_ALWAYS_DENSE = re.compile(
    r"Cuda(?:Depthwise|Group)Convolution|(?:Cask|CaskGemm|Gemm|Cudnn)?Deconvolution(?:V2)?|deconv"
)
_WEIGHTED_PARAMETERS = re.compile("Convolution|Deconvolution|FullyConnected|MatrixMultiply")

# Layer types that never hold such weights.
_WEIGHTLESS = re.compile(
    "Reformat|NoOp|Identity|Cast|Copy|Constant|Shuffle|Slice|Concat|Concatenation|Padding|Resize|Gather|Scatter|Select"
    "|(?:Cask|Tiled|Cudnn)?Pooling|maxpool|avgpool|Activation|ElementWise|PointWise(?:V2|V3)?|Unary|Reduce"
    "|(?:Cask)?SoftMax(?:V2)?|TopK|ArgMax|Scale|LRN|Quantize|Dequantize|Range|Fill|Signal|Wait"
    "|Shape|ShapeHostToDevice|ShapeDeviceToHost|DeviceToShapeHost|HostToDeviceCopy"
)
_REFORMATTING = "Reformatting CopyNode for "

_QUANTISED = re.compile(r"u?int8|fp8|float8|e4m3|e5m2", re.IGNORECASE)
_FLOAT = re.compile(r"fp16|fp32|bf16|half|b?float", re.IGNORECASE)
_TYPE_PAIR = re.compile(r"(?:u?int8|i8|u8|f16|bf16|tf32|f32|i32|e4m3|e5m2){2}")
_QUANTISED_TO_FLOAT = re.compile(r"(?:u?int8|i8|u8|e4m3|e5m2)(?:f16|bf16|f32)")

_PROFILE = re.compile(r"\s*\[profile \d+\]\s*$")
_MYELIN_NAME = re.compile(r"_myl\d+_\d+$")
_NO_NODE = ("(Unnamed Layer", "{ForeignNode[", "__myl", _REFORMATTING)
_METADATA_BREAK = re.compile(r"[\x1e\x1f]|(?<=\])(?=\[ONNX Layer: )")
_METADATA_NODE = re.compile(r"\s*\[ONNX Layer: (.+)\]\s*", re.DOTALL)

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_SPARSITY = "(Sparsity)"
_LISTED = {
    re.compile(r"Layers eligible for sparse math:(.*)"): "eligible",
    re.compile(r"TRT inference plan picked sparse implementation for layers:(.*)"): "chosen",
}
_COUNTED = {
    re.compile(r"Found (\d{1,9}) layer\(s\) eligible to use sparse tactics(?::(.*)|\.?)"): "eligible",
    re.compile(r"Chose (\d{1,9}) layer\(s\) using sparse tactics(?::(.*)|\.?)"): "chosen",
}


@dataclass(frozen=True)
class SparsityLog:
    """What a builder's log says of sparsity; it counts what the builder weighed, the inspector says what runs.

    Attributes:
        eligible: Names of layers whose weights are 2:4, each once, in the order seen; fused names as TensorRT joins them.
        chosen: Names of layers given sparse kernels, likewise.
        counts: Every (found, chosen) pair in the order seen; one build may log several.
        unread: Lines about sparsity that could not be read, or that lack their other half.
    """

    eligible: tuple[str, ...]
    chosen: tuple[str, ...]
    counts: tuple[tuple[int, int], ...]
    unread: int


@dataclass(frozen=True)
class Totals:
    """How many layers are in each state, each layer counted once however many profiles it is listed for."""

    sparse: int
    dense: int
    unknown: int


def layers_of(
    inspector_json: str | bytes, masked: Mapping[str, tuple[int, int]] | None = None
) -> tuple[LayerSparsity, ...]:
    """The layers that hold weights, or may hold them, in the engine's order; once for each profile the engine has.

    Layers that cannot hold weights for a sparse kernel (reformat, pooling, shuffle, pointwise and their like, by layer
    type) are left out: they are neither dense nor unknown. Plugins, Myelin's generated kernels and whole subgraphs
    (`ForeignNode`) stay in as unknown, and so does every layer that has a name only.

    C comes from the weights' count, OutMaps, Groups and Kernel, else from the inputs' second dimension; K is OutMaps.

    Args:
        inspector_json: As `get_engine_information` or `trtexec --exportLayerInfo` give it, of TensorRT 8.5 to 11. Only
            engines built with detailed profiling verbosity tell kernels.
        masked: (C, K) of masked weights by node name or weight name, for layers where the JSON does not tell them.

    Returns:
        Records whose `reason` is set for dense layers where this JSON alone tells it: `GROUPED` and `FLOAT_OUTPUT`.
        `with_reasons` adds the others.

    Raises:
        InputError: It is no JSON, or not an object with a list of Layers.
    """
    sizes = _by_node(masked or {})
    return tuple(
        _layer(value, number, sizes)
        for number, value in enumerate(_parsed(inspector_json))
        if not _cannot_hold_weights(value)
    )


def with_reasons(
    layers: Iterable[LayerSparsity], *, conforming: Collection[str], precision: str, optimization_level: int
) -> tuple[LayerSparsity, ...]:
    """Say of each dense layer why it is not sparse, as far as that is known.

    The first of these that holds:

    | reason | holds when | how sure |
    |---|---|---|
    | `GROUPED` | the convolution has groups | TensorRT's developers: sparse kernels are not tried (issue 4054) |
    | `NOT_2TO4` | no weight of the layer's nodes is 2:4 | certain |
    | `NO_FP32_KERNELS` | the graph is FP32 | sparse kernels are documented for FP16 and INT8 only |
    | `LOW_OPTIMIZATION` | the builder's level is below 3 | it tries fewer kernels there, perhaps no sparse ones |
    | `FLOAT_OUTPUT` | the layer takes quantized values and gives floats | seen by others: move the Q/DQ nodes |
    | `FEW_CHANNELS` | C or K is below 256 | likely: a rule of thumb, the builder keeps what it times as faster |

    None is left where none of these holds: the builder then most often timed a dense kernel as faster.

    Args:
        layers: From `layers_of`.
        conforming: Names of the ONNX nodes whose weights are 2:4, or of these weights where nodes are named after them
            (`a.conv.weight` of node `a.conv`). When it has names and no layer has any of them, the names are of another
            graph and `NOT_2TO4` is not said.
        precision: Of the ONNX file: `fp32`, `fp16` or `int8`.
        optimization_level: The builder's, 0 to 5.
    """
    layers, known = tuple(layers), set(_by_node(dict.fromkeys(conforming)))
    comparable = not known or any(known.intersection(layer.nodes) for layer in layers)

    def reason(layer: LayerSparsity) -> str | None:
        if layer.state != DENSE:
            return None
        if layer.reason == GROUPED:
            return GROUPED
        if comparable and layer.nodes and not known.intersection(layer.nodes):
            return NOT_2TO4
        if precision == "fp32":
            return NO_FP32_KERNELS
        if optimization_level < _FULL_SEARCH:
            return LOW_OPTIMIZATION
        if layer.reason == FLOAT_OUTPUT:
            return FLOAT_OUTPUT
        channels = [count for count in (layer.c, layer.k) if count is not None]
        return FEW_CHANNELS if channels and min(channels) < LIKELY_SPEEDUP_CHANNELS else None

    return tuple(replace(layer, reason=reason(layer)) for layer in layers)


def totals(layers: Iterable[LayerSparsity]) -> Totals:
    """Count the layers in each state; the same layer in several profiles is one.

    A layer is sparse if it runs sparse in any profile, dense if it runs dense in all, and else unknown. It is told by its
    name without the profile; layers that share a name within a profile are different ones.
    """
    states: dict[tuple[str, int], set[str]] = {}
    seen: Counter[str] = Counter()
    for layer in layers:
        states.setdefault((_PROFILE.sub("", layer.name), seen[layer.name]), set()).add(layer.state)
        seen[layer.name] += 1
    sparse = sum(SPARSE in found for found in states.values())
    dense = sum(found == {DENSE} for found in states.values())
    return Totals(sparse, dense, len(states) - sparse - dense)


def sparsity_log(lines: Iterable[str]) -> SparsityLog:
    """Read the builder's lines about sparsity out of a log; other lines, and what comes before `(Sparsity)`, are skipped.

    TensorRT 8 lists the layers' names; 10 counts them and may list them after a colon. A list that contradicts its count
    makes the line unreadable.
    """
    names: dict[str, dict[str, None]] = {"eligible": {}, "chosen": {}}
    counts: list[tuple[int, int]] = []
    found: int | None = None
    unread = 0
    for line in lines:
        _, marker, text = _COLOUR.sub("", line).partition(_SPARSITY)
        if not marker:
            continue
        told = _told(text.strip())
        if told is None:
            unread += 1
            continue
        which, count, listed = told
        names[which].update(dict.fromkeys(listed))
        if which == "eligible":
            unread += found is not None
            found = count
        elif found is None:
            unread += 1
        else:
            counts.append((found, count))
            found = None
    unread += found is not None
    return SparsityLog(tuple(names["eligible"]), tuple(names["chosen"]), tuple(counts), unread)


def _parsed(inspector_json: str | bytes) -> list[Any]:
    """The entries of Layers."""
    try:
        text = inspector_json.removeprefix("\ufeff") if isinstance(inspector_json, str) else inspector_json
        # TensorRT parts the nodes in Metadata by control characters, which it may write as they are.
        parsed = json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise _unusable(f"no JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise _unusable(f"JSON, but a {type(parsed).__name__} and no object")
    if "Layers" not in parsed:
        raise _unusable(f"an object without Layers; it has {', '.join(map(repr, list(parsed)[:5])) or 'nothing'}")
    layers = parsed["Layers"]
    if not isinstance(layers, list):
        raise _unusable(f"Layers is a {type(layers).__name__}, not a list")
    return layers


def _unusable(found: str) -> InputError:
    return InputError(
        "the layer information cannot be read: expected a JSON object with a list of Layers",
        where="the engine inspector's JSON",
        found=found,
        fix="give the file of `trtexec --exportLayerInfo`, for an engine built with --profilingVerbosity=detailed",
    )


def _cannot_hold_weights(value: Any) -> bool:
    """Whether a layer's type says so, or its name where it has nothing else, and nothing contradicts it."""
    if isinstance(value, str):
        return value.startswith(_REFORMATTING)
    if not isinstance(value, dict) or not _has(value, "LayerType", _WEIGHTLESS):
        return False
    weighted = "Weights" in value or _has(value, "ParameterType", _WEIGHTED_PARAMETERS)
    return not weighted and kernel_state(_text(value.get("TacticName"))) == UNKNOWN


def _layer(value: Any, number: int, sizes: Mapping[str, tuple[int, int]]) -> LayerSparsity:
    fields: dict[str, Any] = value if isinstance(value, dict) else {"Name": value}
    name, kernel = _text(fields.get("Name")), _text(fields.get("TacticName"))
    nodes = _nodes(name or "", _text(fields.get("Metadata")) or "")
    c, k = _channels(fields)
    # Two masked convolutions in one layer were merged side by side: neither's size is the layer's.
    masked = {node.removesuffix(".weight"): sizes[node] for node in nodes if node in sizes}
    if len(masked) == 1:
        ((masked_c, masked_k),) = masked.values()
        c, k = c or masked_c, k or masked_k
    state = _state(fields, kernel)
    return LayerSparsity(
        name=name or f"layer {number}",
        kernel=kernel,
        state=state,
        c=c,
        k=k,
        nodes=nodes,
        reason=_reason(fields, kernel or "") if state == DENSE else None,
    )


def _state(fields: Mapping[str, Any], kernel: str | None) -> str:
    """The kernel's word, where the layer's type and groups allow it."""
    told = kernel_state(kernel)
    can_be_sparse = _has(fields, "LayerType", _CAN_BE_SPARSE)
    if told == SPARSE:
        groups = fields.get("Groups", 1)
        return SPARSE if can_be_sparse and type(groups) is int and groups in (0, 1) else UNKNOWN
    return told if can_be_sparse or _has(fields, "LayerType", _ALWAYS_DENSE) else UNKNOWN


def _reason(fields: Mapping[str, Any], kernel: str) -> str | None:
    """Why a layer runs dense, as far as its own description tells."""
    if (_count(fields.get("Groups")) or 1) > 1:
        return GROUPED
    taken, given = _value_kind(fields.get("Inputs")), _value_kind(fields.get("Outputs"))
    if taken is None or given is None:
        # Formats are not told for dynamic shapes; the first types in a kernel's name are those of input and output.
        types = next((word for word in kernel.split("_") if _TYPE_PAIR.fullmatch(word)), "")
        return FLOAT_OUTPUT if _QUANTISED_TO_FLOAT.fullmatch(types) else None
    return FLOAT_OUTPUT if (taken, given) == ("quantized", "float") else None


def _value_kind(tensors: Any) -> str | None:
    """Whether a layer's first input or output is `quantized` or `float`, whichever way the version writes it."""
    if not isinstance(tensors, list) or not tensors or not isinstance(tensors[0], dict):
        return None
    for key in ("DataType", "Datatype", "Format/Datatype", "Format"):
        text = _text(tensors[0].get(key)) or ""
        if _QUANTISED.search(text):
            return "quantized"
        if _FLOAT.search(text):
            return "float"
    return None


def _channels(fields: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """C over all groups, and K."""
    k, groups = _count(fields.get("OutMaps")), _count(fields.get("Groups"))
    weights, kernel = fields.get("Weights"), fields.get("Kernel")
    count = _count(weights.get("Count")) if isinstance(weights, dict) else None
    taps = [_count(side) for side in kernel] if isinstance(kernel, list) else [None]
    window = math.prod(side or 0 for side in taps)
    if k and groups and count and window:
        c, rest = divmod(count * groups, k * window)
        if c and not rest:
            return c, k
    # With a residual added, it is not told which input is which; they must agree.
    inputs = fields.get("Inputs")
    shapes = [i.get("Dimensions") for i in inputs if isinstance(i, dict)] if isinstance(inputs, list) else []
    seen = {_count(shape[1]) if isinstance(shape, list) and len(shape) in (4, 5) else None for shape in shapes}
    return (seen.pop() if len(seen) == 1 else None), k


def _nodes(name: str, metadata: str) -> tuple[str, ...]:
    """ONNX nodes in the parser's metadata, then those in the layer's name that the metadata leaves out; no profiles."""
    nodes = [match[1] for part in _METADATA_BREAK.split(metadata) if (match := _METADATA_NODE.fullmatch(part))]
    fused = _PROFILE.sub("", name)
    parts = _MYELIN_NAME.sub("", fused).split("+") if _MYELIN_NAME.search(fused) else re.split(r" \+ | \|\| ", fused)
    for part in parts:
        # A run of pointwise operations is written PWN(PWN(a), PWN(b)).
        pieces = [p.rstrip(")") for p in part.replace("PWN(", "").split(", ")] if "PWN(" in part else [part]
        nodes.extend(p for p in pieces if p and not p.startswith(_NO_NODE))
    return tuple(dict.fromkeys(bare for node in nodes if (bare := _PROFILE.sub("", node))))


def _by_node(values: Mapping[str, T]) -> dict[str, T]:
    """The values by their own names, and by the names of the nodes that the exporter names after weights."""
    return {name.removesuffix(".weight"): value for name, value in values.items()} | dict(values)


def _told(text: str) -> tuple[str, int, list[str]] | None:
    """What a line about sparsity speaks of (`eligible` or `chosen`), how many layers, and their names if listed."""
    for pattern, which in _LISTED.items():
        if match := pattern.fullmatch(text):
            names = _split(match[1])
            return which, len(names), names
    for pattern, which in _COUNTED.items():
        if match := pattern.fullmatch(text):
            count, names = int(match[1]), _split(match[2] or "")
            return (which, count, names) if len(names) in (0, count) else None
    return None


def _split(text: str) -> list[str]:
    """Names between commas; a comma within brackets belongs to a name."""
    names, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth <= 0:
            names.append("")
        else:
            names[-1] += character
    names = text.split(",") if depth else names
    return [name.strip() for name in names if name.strip()]


def _has(fields: Mapping[str, Any], key: str, values: re.Pattern[str]) -> bool:
    return values.fullmatch(_text(fields.get(key)) or "") is not None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _count(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None
