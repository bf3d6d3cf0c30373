"""Frozen records of the files that stages exchange. They contain paths, shapes and digests, never live objects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from maskplan.pipeline.core.choices import (
    LOGITS,
    Backend,
    LayerState,
    Layout,
    OnnxPrecision,
    OutputType,
    SparseFlagEffect,
)


@dataclass(frozen=True)
class Pattern:
    """N:M, at most `n` non-zeros in each group of `m`."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class TensorSpec:
    """A graph's input or output; None in `shape` is a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class OutputKind:
    """One output.

    Attributes:
        name: As in the graph.
        kind: `logits`, of which the largest along `axis` is the prediction, or `values`.
        axis: Of the classes; the other axes but the batch are places, such as pixels.
    """

    name: str
    kind: OutputType
    axis: int = 1

    def __str__(self) -> str:
        return f"{self.name}:{self.kind}" + (f":{self.axis}" if self.kind == LOGITS and self.axis != 1 else "")


@dataclass(frozen=True)
class Preprocessing:
    """How an image file becomes an input tensor; it travels with the weights.

    Attributes:
        channels: 3 for RGB, 1 for gray.
        height: Rows of the input tensor.
        width: Columns of the input tensor.
        resize: Length of the shorter side before the center crop; 0 resizes straight to (height, width).
        interpolation: `bilinear`, `bicubic` or `nearest`.
        mean: Subtracted from values in [0, 1], one number per channel.
        std: Divides the result, one number per channel.
    """

    channels: int
    height: int
    width: int
    resize: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class ImageSet:
    """The images that masks or statistics were made from, or that a comparison used.

    Attributes:
        role: `train`, `select` or `val`.
        images: How many.
        sha256: Digest of the images' own digests, sorted.
        sketch: Only in artifacts of earlier versions: at most 512 of the smallest digests.
        members: The set in a few bits an image, to find images that are shared with another set (`data/membership.py`).
        labeled_sha256: Digest of the images in their order, with their labels and the names of the classes.
    """

    role: str
    images: int
    sha256: str
    sketch: tuple[str, ...] = ()
    members: str = ""
    labeled_sha256: str = ""

    @property
    def key(self) -> str:
        """What a stage that reads the images with their labels depends on."""
        return f"{self.sha256}:{self.labeled_sha256}"


def merge_image_sets(known: Iterable[ImageSet], added: Iterable[ImageSet]) -> tuple[ImageSet, ...]:
    """Both without repetition: one record for each role and content, the last one, at the place of the first."""
    return tuple({(images.role, images.sha256): images for images in (*known, *added)}.values())


@dataclass(frozen=True)
class Provenance:
    """What a set of weights is and how it was made; copied from the checkpoint into the ONNX file and the engine.

    Attributes:
        model: Its name on the command line, without folders.
        trained: False if the weights, or the weights that they were made from, are random.
        origin: Where the dense weights came from.
        dense_sha256: Digest of the dense checkpoint's tensors.
        classes: Number of classes of a classifier; 0 for other networks.
        labels: Class names in the order of the outputs; empty if unknown.
        preprocessing: For its inputs.
        masked: Names of the masked weights; empty for a dense model.
        pattern: `2:4`, or None for a dense model.
        layout: `channel` or `flat`, or None for a dense model.
        method: How the masks were chosen; None for a dense model.
        recalibrated_images: Images that BatchNorm statistics were re-estimated from; 0 if they were not.
        image_sets: Images that masks or statistics were made from.
        permutation: Digest of the permutation file that reordered the channels; None for the model's own order.
        folded: Names of weights that the model's own code computes, such as standardized ones, and that the checkpoint
            stores as computed.
        outputs: What the network returns, unless it is a classifier.
    """

    model: str
    trained: bool
    origin: str
    dense_sha256: str
    classes: int
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    masked: tuple[str, ...] = ()
    pattern: str | None = None
    layout: Layout | None = None
    method: str | None = None
    recalibrated_images: int = 0
    image_sets: tuple[ImageSet, ...] = ()
    permutation: str | None = None
    # Left out where empty, so that files of other models do not change.
    folded: tuple[str, ...] = field(default=(), metadata={"omit_empty": True})
    outputs: tuple[OutputKind, ...] = field(default=(), metadata={"omit_empty": True})


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors file of a model's parameters and buffers."""

    path: Path
    sha256: str
    bytes: int
    provenance: Provenance


@dataclass(frozen=True)
class Layer:
    """A weight-bearing layer as seen in one forward pass.

    Attributes:
        name: The weight's name in the checkpoint.
        op: `Conv`, `ConvTranspose` or `Gemm`.
        shape: (K, C, R, S) for a convolution, (K, C) for a linear layer.
        groups: Of the convolution; 1 for a linear layer.
        position: Order of first use, from 0; None when the forward pass does not use it.
        macs: Multiply-accumulates for one image.
        computed: The operator reads a value that is computed from the weight, such as a standardized one.
        fixed: The weight is a table, such as bins or a blur, and no trained parameter.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    groups: int
    position: int | None
    macs: int
    computed: bool = False
    fixed: bool = False


@dataclass(frozen=True)
class MaskedLayer:
    """One mask and how much of its weight's magnitude it keeps (`kept` and the best possible `kept_best`, 0 to 1)."""

    name: str
    shape: tuple[int, ...]
    groups: int
    macs: int
    kept: float
    kept_best: float


@dataclass(frozen=True)
class DenseLayer:
    """A layer that stays dense, and why."""

    name: str
    shape: tuple[int, ...]
    macs: int
    reason: str


@dataclass(frozen=True)
class Learning:
    """Cost of learning the masks, and its results on the `select` part.

    `start` refers to the masks that learning started from (magnitude, layer-wise or given ones), `end` to the chosen masks;
    `groups_changed` is the fraction of groups in which they differ. Divergence is the distillation loss against the dense
    network; top-1 is in percent, None without labels or classes.
    """

    recipe: str
    epochs: int
    steps: int
    images: int
    seconds: float
    groups_changed: float
    select_divergence_start: float
    select_divergence_end: float
    select_top1_start: float | None
    select_top1_end: float | None


@dataclass(frozen=True)
class MaskSet:
    """A safetensors file with a bool tensor for each masked weight, under the weight's own name and shape.

    `permutation` is that of the weights that the masks were chosen for.
    """

    path: Path
    sha256: str
    model: str
    pattern: Pattern
    layout: Layout
    method: str
    weights_sha256: str
    masked: tuple[MaskedLayer, ...]
    dense: tuple[DenseLayer, ...]
    learning: Learning | None = None
    image_sets: tuple[ImageSet, ...] = ()
    permutation: str | None = None


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX file; `provenance` is None for a file of another tool."""

    path: Path
    sha256: str
    bytes: int
    precision: OnnxPrecision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    provenance: Provenance | None


@dataclass(frozen=True)
class ShapeRange:
    """Whole shapes of one input of which more than the batch is dynamic, such as the size of images."""

    name: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def __str__(self) -> str:
        return ":".join([self.name, *("x".join(map(str, shape)) for shape in (self.min, self.opt, self.max))])


@dataclass(frozen=True)
class Profile:
    """Batch sizes that an engine accepts and is tuned for, and shapes of inputs of which more than the batch is dynamic."""

    min: int
    opt: int
    max: int
    # Left out where empty, so that files of other engines do not change.
    shapes: tuple[ShapeRange, ...] = field(default=(), metadata={"omit_empty": True})

    def __str__(self) -> str:
        return ",".join(map(str, self.shapes)) or f"{self.min}:{self.opt}:{self.max}"


@dataclass(frozen=True)
class LayerSparsity:
    """Evidence for one engine layer.

    Attributes:
        kernel: The tactic's name; None if the runtime does not report it.
        state: `sparse`, `dense` or `unknown`.
        c: Input channels of all groups together; None if unknown.
        k: Output channels; None if unknown.
        nodes: The ONNX nodes fused into the layer; empty if unknown.
        reason: Why it runs dense, as `engines/evidence.py` lists; None for other states, and where nothing is known.
    """

    name: str
    kernel: str | None
    state: LayerState
    c: int | None
    k: int | None
    nodes: tuple[str, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class EngineFile:
    """An engine and the content of its sidecar.

    Attributes:
        onnx_sha256: Digest of the ONNX file that it was built from.
        sparse_weights: Whether the builder was allowed sparse kernels.
        typing: `strong` when tensor types come from the ONNX file alone.
        layers: Evidence of what runs sparse, if the runtime provides any.
        version_compatible: Also loads in later versions of the runtime.
        hardware_compatible: Also runs on newer GPUs than the kind that it was built on.
        refittable: Its weights can be replaced.
        strip_plan: It contains no weights and cannot run until it is refitted.
        batched: Whether each image of a batch has one row in every output; None if unknown.
        targets: Kinds of GPUs that it was built for, such as `sm86`; empty for the backend's usual ones.
        sparse_flag: What the sparse flag changed, where that was measured by a second build without it.
        notes: What a reader should know, such as a backend without sparse kernels.
    """

    RENAMED_FIELDS: ClassVar[Mapping[str, str]] = {"stripped": "strip_plan"}

    path: Path
    sha256: str
    bytes: int
    backend: Backend
    precision: OnnxPrecision
    runtime_version: str
    device: str
    compute_capability: str | None
    device_memory_bytes: int | None
    sparse_weights: bool
    typing: str
    profiles: tuple[Profile, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    onnx_sha256: str
    build_s: float
    provenance: Provenance | None
    layers: tuple[LayerSparsity, ...] = ()
    notes: tuple[str, ...] = ()
    version_compatible: bool = False
    hardware_compatible: bool = False
    refittable: bool = False
    strip_plan: bool = False
    batched: bool | None = None
    targets: tuple[str, ...] = field(default=(), metadata={"omit_empty": True})
    sparse_flag: SparseFlagEffect | None = field(default=None, metadata={"omit_empty": True})


@dataclass(frozen=True)
class Deployment:
    """A model's folder in a Triton model repository and the version that was written."""

    folder: Path
    version: int
    platform: str
    files: tuple[Path, ...]
