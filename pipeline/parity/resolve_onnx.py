"""Find or export the ONNX graph behind a model file, for comparisons that need intermediate tensors."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

from maskplan.engines.sidecar import read_engine, sidecar_path
from maskplan.exporters.onnx_export import ExportOptions, export_onnx
from maskplan.pipeline.core.choices import GPU_BACKENDS
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.files import sha256_of
from maskplan.pipeline.models.checkpoint import read_checkpoint, rebuild_module

log = logging.getLogger(__name__)


@contextlib.contextmanager
def resolve_onnx(path: Path) -> Iterator[Path]:
    """The ONNX file of an engine, an ONNX file or a checkpoint.

    For a TensorRT plan it is the file that the plan was built from, found in the plan's folder by its digest. A checkpoint
    is exported to a temporary file, which needs PyTorch.

    Raises:
        InputError: The file is missing, damaged or of an unknown kind, or a plan's ONNX file is not in its folder.
    """
    if path.suffix == ".plan":
        yield _source_of_plan(path)
    elif path.suffix == ".onnx":
        if sidecar_path(path).is_file():
            record = read_engine(path)
            yield _source_of_plan(path) if record.backend in GPU_BACKENDS else path
        else:
            yield path
    elif path.suffix == ".safetensors":
        checkpoint = read_checkpoint(path)
        with tempfile.TemporaryDirectory(prefix="maskplan-") as folder:
            (exported,) = export_onnx(
                rebuild_module(checkpoint),
                checkpoint.provenance,
                ExportOptions(),
                {"fp32": Path(folder) / "model.onnx"},
            )
            yield exported.path
    else:
        raise InputError(
            "cannot compare the layers of this kind of file",
            where=path,
            fix="give an ONNX file, an engine whose ONNX file is in the same folder, or a checkpoint of maskplan",
        )


def _source_of_plan(plan: Path) -> Path:
    """The ONNX file that a plan was built from: a plan's own intermediate tensors can no longer be marked as outputs."""
    record = read_engine(plan)
    for candidate in sorted(plan.parent.glob("*.onnx")):
        if sha256_of(candidate) == record.onnx_sha256:
            log.info("%s: comparing the layers of %s, which it was built from", plan.name, candidate.name)
            return candidate
    raise InputError(
        "a TensorRT plan does not show its intermediate tensors",
        where=plan,
        found=f"the ONNX file that it was built from (sha256 {record.onnx_sha256[:12]}) is not in its folder",
        fix="give that ONNX file instead of the plan, or copy it to the plan's folder",
    )
