"""Either side of a comparison, whatever it is: an engine, an ONNX file or a checkpoint."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maskplan.engines.base import Classifier
from maskplan.engines.build import open_engine
from maskplan.engines.ort import OrtEngine
from maskplan.engines.sidecar import read_engine, sidecar_path
from maskplan.exporters.metadata import load_onnx, read_provenance
from maskplan.exporters.onnx_export import ExportOptions, export_onnx
from maskplan.pipeline.core.artifacts import Preprocessing, Provenance
from maskplan.pipeline.core.choices import TENSORRT
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.models.checkpoint import read_checkpoint, rebuild_module


@dataclass(frozen=True)
class OpenedModel:
    """An opened model; `provenance` is None for a foreign file."""

    classifier: Classifier
    provenance: Provenance | None

    @property
    def classes(self) -> int:
        """Number of outputs; found by one run where the graph does not say."""
        shape = self.classifier.output.shape
        known = shape[-1] if shape else None
        if known is not None:
            return known
        one = tuple(d or 1 for d in self.classifier.input.shape)
        return int(self.classifier.logits(np.zeros(one, np.float32)).shape[-1])


@contextlib.contextmanager
def open_model(path: Path) -> Iterator[OpenedModel]:
    """Open a file by what it is; a checkpoint is exported to a temporary ONNX file, which needs PyTorch.

    Raises:
        InputError: The file is missing, damaged, or of no known kind.
    """
    with contextlib.ExitStack() as stack:
        if path.suffix == ".plan" or (path.suffix == ".onnx" and sidecar_path(path).is_file()):
            record = read_engine(path)
            profiles = record.profiles if record.backend == TENSORRT else ()
            yield OpenedModel(
                stack.enter_context(Classifier(open_engine(record), path.name, profiles)), record.provenance
            )
        elif path.suffix == ".onnx":
            provenance = read_provenance(load_onnx(path), path)
            yield OpenedModel(stack.enter_context(Classifier(OrtEngine(path), path.name)), provenance)
        elif path.suffix == ".safetensors":
            checkpoint = read_checkpoint(path)
            made = checkpoint.provenance
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="maskplan-")))
            (exported,) = export_onnx(rebuild_module(checkpoint), made, ExportOptions(), {"fp32": folder / "side.onnx"})
            yield OpenedModel(stack.enter_context(Classifier(OrtEngine(exported.path), path.name)), made)
        else:
            raise InputError(
                "not something to compare",
                where=path,
                fix="give an engine, an .onnx file, or a checkpoint of maskplan",
            )


def shared_preprocessing(sides: Sequence[OpenedModel], mean: str | None, std: str | None) -> Preprocessing:
    """The preprocessing of both: from the record of either, or for foreign files from the input's shape and the options.

    Raises:
        InputError: Both have a record and they differ, or a foreign input has no fixed size.
    """
    known = [s.provenance.preprocessing for s in sides if s.provenance is not None]
    if known:
        if any(k != known[0] for k in known):
            raise InputError(
                "the models want different preprocessing",
                found=f"{known[0]}; {known[1]}",
                fix="compare models of one input",
            )
        return known[0]
    _, channels, height, width = sides[0].classifier.input.shape
    if channels not in (1, 3) or height is None or width is None:
        raise InputError(
            "the input's size is not fixed",
            where=sides[0].classifier.name,
            found=sides[0].classifier.input.shape,
            fix="export with fixed image sizes",
        )
    return Preprocessing(
        channels, height, width, 0, "bilinear", _numbers(mean, channels, 0.0), _deviations(std, channels)
    )


def _deviations(text: str | None, count: int) -> tuple[float, ...]:
    values = _numbers(text, count, 1.0)
    if min(values) <= 0:
        raise InputError("not a deviation", found=repr(text), fix="deviations are above zero")
    return values


def _numbers(text: str | None, count: int, default: float) -> tuple[float, ...]:
    if text is None:
        return (default,) * count
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != count or not all(map(math.isfinite, values)):
        raise InputError(
            "not one number a channel",
            found=repr(text),
            fix=f"write {count} numbers with commas between them",
        )
    return values
