"""Read the layers of a finished engine from the builder's log.

With detailed profiling verbosity TensorRT-RTX's builder prints, at severity VERBOSE, one description for each layer after
the line `Layers:`. It shows types, formats and ONNX nodes; kernels are chosen on the GPU that runs the plan, so there is
nothing about sparse kernels in it. Roles follow from kinds, operations and types:

| role | the layer |
|---|---|
| `product` | convolves or multiplies matrices, with whatever was fused into it |
| `quantize` | a kernel without a product that rounds to integers; it may do other elementwise work as well |
| `dequantize` | a kernel without a product that reads quantized values and writes floats |
| `cast` | only converts types, and may move data |
| `reformat` | only moves data: another memory layout, or the graph's own Transpose, Concat or Slice |
| `no_kernel` | does not run on the GPU (shapes), or only orders streams |
| `other` | anything else: pooling, reductions, elementwise work, kinds that are not known here |

Versions differ: 1.4 prints `Format/Datatype: Half`, later ones `Datatype: Half, Format: (NHWC) ...`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from maskplan.engines.evidence import metadata_nodes
from maskplan.pipeline.core.choices import (
    CAST,
    DEQUANTIZE,
    NO_KERNEL,
    OTHER,
    PRODUCT,
    QUANTIZE,
    REFORMAT,
    LayerRole,
)
from maskplan.pipeline.core.compilation import CompiledLayer, CompiledProfile, TensorFormat

_HEAD = "Layers:\n"
_NAME = "Name: "
_NEXT_LAYER = re.compile(r"\n(?=Name: )")
_AFTER = re.compile(r"\n\n(?:I/O Tensors|Engine Metadata|Bindings):")
_TENSOR = re.compile(
    r" \{ Name: .*?(?:, Location: \w+)?, Dimensions: \[[-\d,]*\](?:, \w+: \[[-\d,]*\])*"
    r", (?:Format/)?Datatype: (?P<dtype>\w+)(?:, Format: (?:\((?P<layout>[^()]+)\))?[^{}]*)? \}",
    re.DOTALL,
)
_GENERATED = re.compile(r"__myl_(?P<operations>\w+?)_myl\d+_\d+")
_OPERATION = re.compile(r"[A-Z][a-z0-9]*")
_GRAPH_NUMBER = re.compile(r"_myl(\d+)_\d+$")
_PROFILE = re.compile(r" \[profile (\d+)\]")

_PRODUCT_KINDS = re.compile("correlation|conv|convolution|deconv|gemm|fc|matmul|fusion")
_PRODUCT_OPERATIONS = frozenset({"Corr", "Conv", "Deco", "Fc", "Gemm", "Matm", "Bmm"})
_NO_KERNEL_KINDS = frozenset(
    {"shape_call", "signal", "wait", "TrainStation", "DeviceToShapeHost", "ShapeHostToDevice", "ShapeDeviceToHost"}
)
_MOVES = frozenset({"Move", "Copy", "Tran", "Resh", "Repl", "Conc", "Slic", "Pad", "Gath"})
_QUANTIZED = re.compile(r"U?Int[48]|FP[48]\w*|E4M3\w*|E5M2\w*", re.IGNORECASE)


@dataclass(frozen=True)
class EngineLayers:
    """All layers of an engine: by profile, in order, and the descriptions that could not be read."""

    profiles: tuple[tuple[CompiledLayer, ...], ...]
    unread: tuple[str, ...]


def is_layer_list(message: str) -> bool:
    """Whether a message of the builder is the list of layers."""
    return message.startswith(_HEAD)


def parse_engine_layers(message: str, profiles: int = 1) -> EngineLayers:
    """Parse the builder's list of layers.

    Nothing is guessed: a description that does not have the known form is returned as it is.

    Args:
        message: The builder's message that begins with `Layers:`.
        profiles: How many optimization profiles the engine has.
    """
    body = _AFTER.split(message.removeprefix(_HEAD), maxsplit=1)[0]
    texts = [text for text in _NEXT_LAYER.split(body.strip("\n")) if text.strip()]
    layers = [(text, _parse_layer(text)) for text in texts]
    of_graph = _profiles_of_graphs(texts) if profiles > 1 else {}
    by_profile: list[list[CompiledLayer]] = [[] for _ in range(max(profiles, 1))]
    unread = [text for text, layer in layers if layer is None]
    for text, layer in layers:
        if layer is None:
            continue
        number = of_graph.get(_graph_number(layer.name), 0)
        if number < len(by_profile):
            by_profile[number].append(layer)
        else:
            unread.append(text)
    return EngineLayers(tuple(map(tuple, by_profile)), tuple(unread))


def count_layers(profile: str | None, layers: Iterable[CompiledLayer]) -> CompiledProfile:
    """The layers of one profile with their counts; most frequent first."""
    layers = tuple(layers)
    return CompiledProfile(
        profile=profile,
        layers=layers,
        kinds=_counts(layer.kind for layer in layers),
        roles=_counts(layer.role for layer in layers),
        products=_counts(layer.dtype or "unknown" for layer in layers if layer.role == PRODUCT),
    )


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def _parse_layer(text: str) -> CompiledLayer | None:
    # Names are free text and may hold any of the labels; those of layers stand before all others, those of nodes behind.
    name, _, rest = text.rpartition(", LayerType: ")
    kind, found_inputs, rest = rest.partition(", Inputs: [")
    rest, found_metadata, metadata = rest.rpartition(", Metadata: ")
    tensors, found_tactic, _ = rest.rpartition("], Tactic")
    before, found_outputs, out = tensors.partition("], Outputs: [")
    inputs, outputs = _parse_tensors(before.partition("], Constants: [")[0]), _parse_tensors(out)
    complete = found_inputs and found_metadata and found_tactic and found_outputs and kind.isidentifier()
    if not (name.startswith(_NAME) and complete) or inputs is None or outputs is None:
        return None
    name = name.removeprefix(_NAME)
    generated = _GENERATED.fullmatch(name)
    operations = tuple(_OPERATION.findall(generated["operations"])) if generated else ()
    return CompiledLayer(
        name=_PROFILE.sub("", name),
        kind=kind,
        role=_role(kind, operations, inputs, outputs),
        dtype=next((tensor.dtype for tensor in (*inputs, *outputs)), None),
        inputs=inputs,
        outputs=outputs,
        operations=operations,
        nodes=tuple(metadata_nodes(metadata)),
    )


def _parse_tensors(text: str) -> tuple[TensorFormat, ...] | None:
    """The tensors of a list without its brackets; None if it has another form."""
    tensors, at = [], 0
    while at < len(text):
        match = _TENSOR.match(text, at)
        if match is None:
            return None
        tensors.append(TensorFormat(match["dtype"], match["layout"]))
        at = match.end()
        if text[at : at + 1] == ",":
            at += 1
    return tuple(tensors)


def _role(
    kind: str, operations: Sequence[str], inputs: Sequence[TensorFormat], outputs: Sequence[TensorFormat]
) -> LayerRole:
    if _PRODUCT_KINDS.fullmatch(kind) or _PRODUCT_OPERATIONS.intersection(operations):
        return PRODUCT
    if kind in _NO_KERNEL_KINDS:
        return NO_KERNEL
    if not operations:
        return OTHER
    if "Roun" in operations or ("Cast" in operations and _quantized(outputs) and not _quantized(inputs)):
        return QUANTIZE
    if "Cast" in operations and _quantized(inputs) and not _quantized(outputs):
        return DEQUANTIZE
    if _MOVES.issuperset(operations):
        return REFORMAT
    return CAST if _MOVES.union({"Cast"}).issuperset(operations) else OTHER


def _quantized(tensors: Iterable[TensorFormat]) -> bool:
    return any(_QUANTIZED.fullmatch(tensor.dtype) for tensor in tensors)


def _graph_number(name: str) -> str:
    """The number of the compiled graph that a layer belongs to: the compiler makes one or more for each profile."""
    match = _GRAPH_NUMBER.search(name)
    return match[1] if match else ""


def _profiles_of_graphs(texts: Iterable[str]) -> dict[str, int]:
    """The profile of each compiled graph: names of the first profile's tensors have no mark, those of others do."""
    found: dict[str, int] = {}
    for text in texts:
        name = re.match(r"Name: (.*?), LayerType: ", text, re.DOTALL)
        marked = _PROFILE.search(text)
        if name and marked:
            found[_graph_number(name[1])] = int(marked[1])
    return found
