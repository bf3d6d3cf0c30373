"""Either side of a comparison as an ONNX file, for what only a graph can tell."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

from maskplan.engines.sidecar import read_engine, sidecar_path
from maskplan.exporters.onnx_export import ExportOptions, export_onnx
from maskplan.pipeline.core.choices import TENSORRT
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.files import sha256_of
from maskplan.pipeline.models.checkpoint import read_checkpoint, rebuild_module

log = logging.getLogger(__name__)


@contextlib.contextmanager
def resolve_onnx(path: Path) -> Iterator[Path]:
    """The ONNX file behind an engine, an ONNX file or a checkpoint.

    A TensorRT plan stands for the file that it was built from, which is looked for beside it by its digest; a checkpoint is
    exported to a temporary file, which needs PyTorch.

    Raises:
        InputError: The file is missing, damaged, or of no known kind, or a plan's ONNX file is not beside it.
    """
    if path.suffix == ".plan":
        yield _beside(path)
    elif path.suffix == ".onnx":
        if sidecar_path(path).is_file():
            record = read_engine(path)
            yield _beside(path) if record.backend == TENSORRT else path
        else:
            yield path
    elif path.suffix == ".safetensors":
        checkpoint = read_checkpoint(path)
        with tempfile.TemporaryDirectory(prefix="maskplan-") as folder:
            (exported,) = export_onnx(
                rebuild_module(checkpoint), checkpoint.provenance, ExportOptions(), {"fp32": Path(folder) / "side.onnx"}
            )
            yield exported.path
    else:
        raise InputError(
            "not something with layers to compare",
            where=path,
            fix="give an ONNX file, an engine that lies beside its ONNX file, or a checkpoint of maskplan",
        )


def _beside(plan: Path) -> Path:
    """The ONNX file that a plan was built from; a plan's own intermediate tensors cannot be marked any more."""
    record = read_engine(plan)
    for candidate in sorted(plan.parent.glob("*.onnx")):
        if sha256_of(candidate) == record.onnx_sha256:
            log.info("%s: looking into %s, which it was built from", plan.name, candidate.name)
            return candidate
    raise InputError(
        "a TensorRT plan does not show its intermediate tensors",
        where=plan,
        found=f"no ONNX file with sha256 {record.onnx_sha256[:12]}, which it was built from, beside it",
        fix="give that ONNX file in the plan's place, or copy it into the plan's folder",
    )
