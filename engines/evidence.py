"""Find which layers of a TensorRT engine run sparse, from the engine inspector's JSON and the builder's log.

A layer's state is derived from its kernel's name (`engines/kernel_names.py`) unless its other fields contradict it:

| state | the layer | its kernel's name |
|---|---|---|
| `sparse` | a type for which TensorRT has sparse kernels, one group | a known sparse kernel |
| `dense` | a convolution or matrix product | a known dense kernel |
| `unknown` | anything else | missing, opaque, truncated, modified, or of an unknown family |

`HasSparseWeights` (`AllowSparse` in TensorRT 8) is ignored: it describes the weights, not the kernel, and is 1 for layers
that run dense too (NVIDIA/TensorRT issue 4020).

An engine with several profiles lists each layer once per profile: `conv` for the first, `conv [profile 1]` for the second.
`parse_layers` returns all of them, `totals` counts each layer once.
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
from maskplan.pipeline.core.artifacts import LayerSparsity
from maskplan.pipeline.core.choices import DENSE, FP32, SPARSE, UNKNOWN, LayerState, OnnxPrecision
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.weight_ops import LIKELY_SPEEDUP_CHANNELS

T = TypeVar("T")

GROUPED = "grouped"
NOT_2TO4 = "not_2to4"
NO_FP32_KERNELS = "no_documented_fp32_kernels"
LOW_OPTIMIZATION = "optimization_level_below_3"
FLOAT_OUTPUT = "quantized_input_float_output"
FEW_CHANNELS = "likely_few_channels"

# From this optimization level on, the builder tries all tactics.
_FULL_SEARCH_LEVEL = 3

# Layer types that may run sparse kernels; `correlation`, `gemm` and `fusion` are names from Myelin, TensorRT's compiler.
_CAN_BE_SPARSE = re.compile(
    r"(?:Cask|CaskGemm|CaskFlatten|Gemm|Cublas|Cudnn|FusedConvAct)?(?:Convolution|FullyConnected|MatrixMultiply)"
    r"|CaskConvActPool|CaskJitConv|CaskGemm|conv|correlation|conv_act_pool|gemm|fusion"
)
# Layer types with weights but no known sparse kernel: grouped and transposed convolutions.
_ALWAYS_DENSE = re.compile(
    r"Cuda(?:Depthwise|Group)Convolution|(?:Cask|CaskGemm|Gemm|Cudnn)?Deconvolution(?:V2)?|deconv"
)
_WEIGHTED_PARAMETERS = re.compile("Convolution|Deconvolution|FullyConnected|MatrixMultiply")

# Layer types without weights.
_WEIGHTLESS = re.compile(
    "Reformat|NoOp|Identity|Cast|Copy|Constant|Shuffle|Slice|Concat|Concatenation|Padding|Resize|Gather|Scatter|Select"
    "|(?:Cask|Tiled|Cudnn)?Pooling|maxpool|avgpool|Activation|ElementWise|PointWise(?:V2|V3)?|Unary|Reduce"
    "|(?:Cask)?SoftMax(?:V2)?|TopK|ArgMax|Scale|LRN|Quantize|Dequantize|Range|Fill|Signal|Wait"
    "|Shape|ShapeHostToDevice|ShapeDeviceToHost|DeviceToShapeHost|HostToDeviceCopy"
)
_REFORMATTING = "Reformatting CopyNode for "

_QUANTIZED = re.compile(r"u?int8|fp8|float8|e4m3|e5m2", re.IGNORECASE)
_FLOAT = re.compile(r"fp16|fp32|bf16|half|b?float", re.IGNORECASE)
_TYPE_PAIR = re.compile(r"(?:u?int8|i8|u8|f16|bf16|tf32|f32|i32|e4m3|e5m2){2}")
_QUANTIZED_TO_FLOAT = re.compile(r"(?:u?int8|i8|u8|e4m3|e5m2)(?:f16|bf16|f32)")

_PROFILE = re.compile(r"\s*\[profile \d+\]\s*$")
_MYELIN_NAME = re.compile(r"_myl\d+_\d+$")
_NO_NODE = ("(Unnamed Layer", "{ForeignNode[", "__myl", _REFORMATTING)
_METADATA_NODE = "[ONNX Layer: "

_COLOR = re.compile(r"\x1b\[[0-9;]*m")
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
    """Sparsity messages in a builder's log. They count what the builder considered; the inspector shows what runs.

    Attributes:
        eligible: Unique names of layers with 2:4 weights, in order of appearance; fused names as written by TensorRT.
        chosen: Unique names of layers that got sparse kernels, in order of appearance.
        counts: Every (eligible, chosen) pair in order; one build may log several.
        unread: Number of sparsity lines that could not be parsed or have no counterpart.
    """

    eligible: tuple[str, ...]
    chosen: tuple[str, ...]
    counts: tuple[tuple[int, int], ...]
    unread: int


@dataclass(frozen=True)
class Totals:
    """Number of layers in each state; a layer counts once, regardless of the number of profiles."""

    sparse: int
    dense: int
    unknown: int


def parse_layers(
    inspector_json: str | bytes, masked: Mapping[str, tuple[int, int]] | None = None
) -> tuple[LayerSparsity, ...]:
    """Parse the layers that have or may have weights, in the engine's order, once per profile.

    Layer types without weights (reformat, pooling, shuffle, pointwise and similar) are skipped. Plugins, Myelin's generated
    kernels, whole subgraphs (`ForeignNode`) and layers with nothing but a name are `unknown`.

    C follows from the number of weights, OutMaps, Groups and Kernel, else from the inputs' second dimension. K is OutMaps.

    Args:
        inspector_json: Output of `get_engine_information` or `trtexec --exportLayerInfo` of TensorRT 8.5 to 11. It names
            kernels only for engines built with detailed profiling verbosity.
        masked: (C, K) of masked weights by node or weight name, for layers whose JSON has no sizes.

    Returns:
        One record per layer and profile. `reason` is set for dense layers where the JSON alone shows it: `GROUPED` and
        `FLOAT_OUTPUT`. `with_reasons` adds the others.

    Raises:
        InputError: Not JSON, or not an object with a list of Layers.
    """
    sizes = _by_node(masked or {})
    return tuple(
        _layer(value, number, sizes)
        for number, value in enumerate(_parse_entries(inspector_json))
        if not _cannot_hold_weights(value)
    )


def with_reasons(
    layers: Iterable[LayerSparsity], *, conforming: Collection[str], precision: OnnxPrecision, optimization_level: int
) -> tuple[LayerSparsity, ...]:
    """Set the reason why each dense layer does not run sparse, as far as it is known.

    The first reason that applies:

    | reason | applies when | confidence |
    |---|---|---|
    | `GROUPED` | the convolution has groups | stated by TensorRT's developers: sparse kernels are not tried (issue 4054) |
    | `NOT_2TO4` | no weight of the layer's nodes is 2:4 | certain |
    | `NO_FP32_KERNELS` | the graph is FP32 | sparse kernels are documented for FP16 and INT8 only |
    | `LOW_OPTIMIZATION` | the builder's level is below 3 | it tries fewer kernels, possibly no sparse ones |
    | `FLOAT_OUTPUT` | the layer has quantized inputs and float outputs | reported by users: move the Q/DQ nodes |
    | `FEW_CHANNELS` | C or K is below 256 | likely: a rule of thumb; the builder keeps the kernel it measures as faster |

    The reason is None if none of these applies: most often the builder measured a dense kernel as faster.

    Args:
        layers: Result of `parse_layers`.
        conforming: Names of ONNX nodes with 2:4 weights, or of the weights if nodes are named after them (`a.conv.weight`
            for node `a.conv`). If no layer has any of these names, they belong to another graph and `NOT_2TO4` is not used.
        precision: Precision of the ONNX file.
        optimization_level: The builder's optimization level, 0 to 5.
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
        if precision == FP32:
            return NO_FP32_KERNELS
        if optimization_level < _FULL_SEARCH_LEVEL:
            return LOW_OPTIMIZATION
        if layer.reason == FLOAT_OUTPUT:
            return FLOAT_OUTPUT
        channels = [count for count in (layer.c, layer.k) if count is not None]
        return FEW_CHANNELS if channels and min(channels) < LIKELY_SPEEDUP_CHANNELS else None

    return tuple(replace(layer, reason=reason(layer)) for layer in layers)


def totals(layers: Iterable[LayerSparsity]) -> Totals:
    """Count the layers in each state; a layer listed for several profiles counts once.

    A layer is sparse if it runs sparse in any profile, dense if it runs dense in all, otherwise unknown. Layers are
    identified by name without the profile suffix; layers with the same name within one profile are different layers.
    """
    states: dict[tuple[str, int], set[str]] = {}
    seen: Counter[str] = Counter()
    for layer in layers:
        states.setdefault((_PROFILE.sub("", layer.name), seen[layer.name]), set()).add(layer.state)
        seen[layer.name] += 1
    sparse = sum(SPARSE in found for found in states.values())
    dense = sum(found == {DENSE} for found in states.values())
    return Totals(sparse, dense, len(states) - sparse - dense)


def parse_sparsity_log(lines: Iterable[str]) -> SparsityLog:
    """Parse the sparsity lines of a builder's log; other lines, and text before `(Sparsity)`, are ignored.

    TensorRT 8 lists layer names; 10 counts them and may list them after a colon. A line whose list contradicts its count is
    counted as unread.
    """
    names: dict[str, dict[str, None]] = {"eligible": {}, "chosen": {}}
    counts: list[tuple[int, int]] = []
    eligible: int | None = None
    unread = 0
    for line in lines:
        _, marker, text = _COLOR.sub("", line).partition(_SPARSITY)
        if not marker:
            continue
        parsed = _parse_sparsity_line(text.strip())
        if parsed is None:
            unread += 1
            continue
        kind, count, listed = parsed
        names[kind].update(dict.fromkeys(listed))
        if kind == "eligible":
            unread += eligible is not None
            eligible = count
        elif eligible is None:
            unread += 1
        else:
            counts.append((eligible, count))
            eligible = None
    unread += eligible is not None
    return SparsityLog(tuple(names["eligible"]), tuple(names["chosen"]), tuple(counts), unread)


def metadata_nodes(metadata: str) -> list[str]:
    """The ONNX nodes in a layer's metadata: `[ONNX Layer: a]`, with control characters or nothing between them.

    TensorRT-RTX may append a remark of its own, such as `__gemm_from_conv1x1`.
    """
    nodes = (part.rpartition("]")[0] for part in metadata.split(_METADATA_NODE)[1:])
    return [node for node in nodes if node]


def _parse_entries(inspector_json: str | bytes) -> list[Any]:
    """The entries of Layers, each a dictionary, a name, or anything else that JSON can hold."""
    try:
        text = inspector_json.removeprefix("\ufeff") if isinstance(inspector_json, str) else inspector_json
        # TensorRT separates the nodes in Metadata with control characters, possibly unescaped; strict parsing rejects them.
        parsed = json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise _unusable(f"not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise _unusable(f"JSON, but a {type(parsed).__name__}, not an object")
    if "Layers" not in parsed:
        raise _unusable(
            f"an object without the key Layers; its keys are {', '.join(map(repr, list(parsed)[:5])) or 'none'}"
        )
    layers = parsed["Layers"]
    if not isinstance(layers, list):
        raise _unusable(f"Layers is a {type(layers).__name__}, not a list")
    return layers


def _unusable(found: str) -> InputError:
    return InputError(
        "the layer information cannot be read: expected a JSON object with a list of Layers",
        where="the engine inspector's JSON",
        found=found,
        fix="use the file that `trtexec --exportLayerInfo` writes for an engine built with --profilingVerbosity=detailed",
    )


def _cannot_hold_weights(value: Any) -> bool:
    """Whether the layer's type, or its name if there is nothing else, excludes weights and no field contradicts that."""
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
    # A layer with several masked convolutions merges them, so no single size applies.
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


def _state(fields: Mapping[str, Any], kernel: str | None) -> LayerState:
    """The state by the kernel's name, if the layer's type and groups are consistent with it."""
    by_name = kernel_state(kernel)
    can_be_sparse = _has(fields, "LayerType", _CAN_BE_SPARSE)
    if by_name == SPARSE:
        groups = fields.get("Groups", 1)
        return SPARSE if can_be_sparse and type(groups) is int and groups in (0, 1) else UNKNOWN
    return by_name if can_be_sparse or _has(fields, "LayerType", _ALWAYS_DENSE) else UNKNOWN


def _reason(fields: Mapping[str, Any], kernel: str) -> str | None:
    """Why a layer runs dense, as far as its own fields show."""
    if (_count(fields.get("Groups")) or 1) > 1:
        return GROUPED
    input_kind, output_kind = _value_kind(fields.get("Inputs")), _value_kind(fields.get("Outputs"))
    if input_kind is None or output_kind is None:
        # Dynamic shapes have no formats; the first types in a kernel's name are those of input and output.
        types = next((word for word in kernel.split("_") if _TYPE_PAIR.fullmatch(word)), "")
        return FLOAT_OUTPUT if _QUANTIZED_TO_FLOAT.fullmatch(types) else None
    return FLOAT_OUTPUT if (input_kind, output_kind) == ("quantized", "float") else None


def _value_kind(tensors: Any) -> str | None:
    """Whether a layer's first input or output is `quantized` or `float`, in the notation of any version."""
    if not isinstance(tensors, list) or not tensors or not isinstance(tensors[0], dict):
        return None
    for key in ("DataType", "Datatype", "Format/Datatype", "Format"):
        text = _text(tensors[0].get(key)) or ""
        if _QUANTIZED.search(text):
            return "quantized"
        if _FLOAT.search(text):
            return "float"
    return None


def _channels(fields: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """C over all groups, and K, each None if unknown."""
    k, groups = _count(fields.get("OutMaps")), _count(fields.get("Groups"))
    weights, kernel = fields.get("Weights"), fields.get("Kernel")
    count = _count(weights.get("Count")) if isinstance(weights, dict) else None
    taps = [_count(side) for side in kernel] if isinstance(kernel, list) else [None]
    window = math.prod(side or 0 for side in taps)
    if k and groups and count and window:
        c, rest = divmod(count * groups, k * window)
        if c and not rest:
            return c, k
    # With a fused residual the JSON does not say which input is the convolution's, so all inputs must agree.
    inputs = fields.get("Inputs")
    shapes = [i.get("Dimensions") for i in inputs if isinstance(i, dict)] if isinstance(inputs, list) else []
    seen = {_count(shape[1]) if isinstance(shape, list) and len(shape) in (4, 5) else None for shape in shapes}
    return (seen.pop() if len(seen) == 1 else None), k


def _nodes(name: str, metadata: str) -> tuple[str, ...]:
    """ONNX nodes in the parser's metadata, then further ones in the layer's name, without profile suffixes."""
    nodes = metadata_nodes(metadata)
    fused = _PROFILE.sub("", name)
    parts = _MYELIN_NAME.sub("", fused).split("+") if _MYELIN_NAME.search(fused) else re.split(r" \+ | \|\| ", fused)
    for part in parts:
        # Fused pointwise operations are written PWN(PWN(a), PWN(b)).
        pieces = [p.rstrip(")") for p in part.replace("PWN(", "").split(", ")] if "PWN(" in part else [part]
        nodes.extend(p for p in pieces if p and not p.startswith(_NO_NODE))
    return tuple(dict.fromkeys(bare for node in nodes if (bare := _PROFILE.sub("", node))))


def _by_node(values: Mapping[str, T]) -> dict[str, T]:
    """The values by their own names, and by the node names that the exporter derives from weight names."""
    return {name.removesuffix(".weight"): value for name, value in values.items()} | dict(values)


def _parse_sparsity_line(text: str) -> tuple[str, int, list[str]] | None:
    """Parse a sparsity line: `eligible` or `chosen`, number of layers, and their names if listed; None if unreadable."""
    for pattern, kind in _LISTED.items():
        if match := pattern.fullmatch(text):
            names = _split(match[1])
            return kind, len(names), names
    for pattern, kind in _COUNTED.items():
        if match := pattern.fullmatch(text):
            count, names = int(match[1]), _split(match[2] or "")
            return (kind, count, names) if len(names) in (0, count) else None
    return None


def _split(text: str) -> list[str]:
    """Split at commas; a comma within brackets is part of a name."""
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
