"""What NVIDIA's compiler made of an ONNX file: frozen records of its verdict and of the layers of the finished engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from maskplan.pipeline.core.choices import CONVERSIONS, LayerRole, OnnxPrecision


@dataclass(frozen=True)
class TensorFormat:
    """Type and memory layout of a tensor between two layers, as the compiler names them (`Half`, `NHWC`).

    `layout` is None in versions that do not show it.
    """

    dtype: str
    layout: str | None


@dataclass(frozen=True)
class CompiledLayer:
    """One layer of a finished engine.

    Attributes:
        name: As the compiler calls it.
        kind: As the compiler calls it: `correlation` is a convolution, `gemm` a matrix product, `kgen` a generated kernel.
        role: What it does.
        dtype: Type that it computes in: that of its first input, or else of its first output; None if it has neither.
        inputs: Formats of its inputs, without constants.
        outputs: Formats of its outputs.
        operations: What a generated kernel computes, in the compiler's abbreviations and order: `Mul`, `Cast`, `Relu`.
        nodes: The ONNX nodes that it computes, wholly or in part.
    """

    name: str
    kind: str
    role: LayerRole
    dtype: str | None
    inputs: tuple[TensorFormat, ...]
    outputs: tuple[TensorFormat, ...]
    operations: tuple[str, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class CompiledProfile:
    """The layers for one optimization profile; each profile is compiled by itself.

    Attributes:
        profile: Batch sizes as MIN:OPT:MAX; None where the graph's shapes are all fixed.
        layers: In the order of execution.
        kinds: Number of layers of each kind.
        roles: Number of layers of each role.
        products: Number of convolutions and matrix products by the type that they compute in, such as `Int8`.
    """

    profile: str | None
    layers: tuple[CompiledLayer, ...]
    kinds: dict[str, int]
    roles: dict[str, int]
    products: dict[str, int]

    @property
    def conversions(self) -> tuple[CompiledLayer, ...]:
        """Kernels that only change types or formats, and are not part of another one."""
        return tuple(layer for layer in self.layers if layer.role in CONVERSIONS)


@dataclass(frozen=True)
class CompileProblem:
    """Why the compiler does not take a file.

    Attributes:
        node: The ONNX node at fault, or its first output if it has no name; None where no node is known.
        op: Its operator.
        reason: Why.
        fix: A way out.
    """

    node: str | None
    op: str | None
    reason: str
    fix: str

    def __str__(self) -> str:
        return (
            self.reason if self.node is None else f"node {self.node} ({self.op or 'operator unknown'}): {self.reason}"
        )


@dataclass(frozen=True)
class CompileWarning:
    """A warning of the compiler, and how often it came."""

    text: str
    count: int


@dataclass(frozen=True)
class CompileResult:
    """The compiler's verdict on one ONNX file.

    Attributes:
        onnx: Name of the file.
        onnx_sha256: Its digest.
        precision: Its precision.
        compiler: Name of the library.
        version: Its version.
        accepted: Whether it made an engine.
        problems: Why not; empty if it did.
        profiles: Layers by profile; empty if it did not.
        warnings: Each once.
        unread_lines: Descriptions of layers in the compiler's log that could not be read, in full; the counts lack them.
        path: The plan, where it was kept.
        sha256: Digest of the plan; None without one.
        size_bytes: Its size.
        build_s: Duration of parsing and compiling.
    """

    onnx: str
    onnx_sha256: str
    precision: OnnxPrecision
    compiler: str
    version: str
    accepted: bool
    problems: tuple[CompileProblem, ...]
    profiles: tuple[CompiledProfile, ...]
    warnings: tuple[CompileWarning, ...]
    unread_lines: tuple[str, ...]
    path: Path | None
    sha256: str | None
    size_bytes: int | None
    build_s: float


@dataclass(frozen=True)
class CompileReport:
    """The verdicts on both ONNX files that engines are built from on a GPU host."""

    dense: CompileResult
    sparse: CompileResult

    @property
    def accepted(self) -> bool:
        return self.dense.accepted and self.sparse.accepted
