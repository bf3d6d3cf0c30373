"""Build a plan of an ONNX file with TensorRT-RTX, or with TensorRT, real or fake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskplan.engines.build import BuildOptions, build_engine
from maskplan.engines.trt.options import TrtOptions
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.core.artifacts import EngineFile, Profile
from maskplan.pipeline.core.choices import Backend

PROFILES = (Profile(1, 1, 1), Profile(1, 8, 16))


def build(
    source: Path,
    *,
    backend: Backend = "tensorrt",
    sparse: bool = True,
    profiles: tuple[Profile, ...] = PROFILES,
    **options: Any,
) -> EngineFile:
    chosen = BuildOptions(backend, profiles, sparse, TrtOptions(**options))
    return build_engine(describe_onnx(source), chosen, source.with_name("engine.plan"))
