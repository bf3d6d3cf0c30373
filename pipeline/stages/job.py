"""What the stages of one run share: the job, its images, and a network with its ONNX files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from maskplan.pipeline.core.artifacts import Checkpoint, ImageSet, OnnxModel
from maskplan.pipeline.core.choices import FP16, FP32, FloatPrecision
from maskplan.pipeline.core.reports import CalibrationReport, ConformanceReport
from maskplan.pipeline.data.dataset import Dataset
from maskplan.pipeline.models.checkpoint import ModelOptions
from maskplan.pipeline.models.graph_digest import GraphDigest
from maskplan.pipeline.models.sources import SourceFile
from maskplan.pipeline.permutation.record import Permuted
from maskplan.pipeline.recipe import Recipe
from maskplan.pipeline.stages.workspace import Workspace


@dataclass(frozen=True)
class Job:
    """What every stage of one run has at hand: the folder, the model and the options; `code` is known after `load`."""

    ws: Workspace
    model: ModelOptions
    recipe: Recipe
    device: str = "auto"
    code: str = ""

    @property
    def code_key(self) -> dict[str, str]:
        """For the key of every stage that builds the module: what the code of the user's own file computes."""
        return {"code": self.code} if self.code else {}


@dataclass(frozen=True)
class Loaded:
    """The dense checkpoint; for a model in a file, also what that file imported, and the graph of its module.

    Models of libraries have neither: their names identify them.
    """

    checkpoint: Checkpoint
    sources: tuple[SourceFile, ...]
    graph: GraphDigest | None


@dataclass(frozen=True)
class ImageSets:
    """Digests of the three parts of the data."""

    train: ImageSet
    select: ImageSet
    val: ImageSet

    @property
    def shaping(self) -> tuple[ImageSet, ...]:
        """The parts that may shape masks, statistics and ranges; `val` may not."""
        return (self.train, self.select)


@dataclass(frozen=True)
class Images:
    """The data with its digests."""

    data: Dataset
    sets: ImageSets


@dataclass(frozen=True)
class SyntheticImages:
    """The file of pixels (N, H, W, channels) uint8 that were made from the dense network."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class OnnxPair:
    """The ONNX files of one network whose float parts are FP32 and FP16."""

    fp32: OnnxModel
    fp16: OnnxModel

    def of(self, precision: FloatPrecision) -> OnnxModel:
        return {FP32: self.fp32, FP16: self.fp16}[precision]


@dataclass(frozen=True)
class ConformancePair:
    """The verdicts on an `OnnxPair`."""

    fp32: ConformanceReport
    fp16: ConformanceReport

    def of(self, precision: FloatPrecision) -> ConformanceReport:
        return {FP32: self.fp32, FP16: self.fp16}[precision]


@dataclass(frozen=True)
class Quantized:
    """One network in INT8: with FP32 elsewhere for ONNX Runtime, and with FP16 elsewhere for TensorRT."""

    models: OnnxPair
    report: CalibrationReport


@dataclass(frozen=True)
class Network:
    """A checkpoint and the ONNX files made from it; `int8` is None unless the run asked for INT8."""

    checkpoint: Checkpoint
    floats: OnnxPair
    int8: Quantized | None = None

    @property
    def deployed(self) -> OnnxPair:
        """The files that engines are built from."""
        return self.floats if self.int8 is None else self.int8.models


@dataclass(frozen=True)
class PermuteResult:
    """The permuted checkpoint, or the reason why the channels stay in their order."""

    permuted: Permuted | None
    reason: str | None
