"""ONNX Runtime on the CPU: the engine file is the ONNX file itself, which the runtime optimizes when it loads it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy.typing as npt

from maskplan.engines.base import Arrays, CallTiming
from maskplan.exporters.external_data import external_tensors, load_external_data
from maskplan.exporters.metadata import describe_onnx, parse_onnx
from maskplan.exporters.run_shapes import set_shapes
from maskplan.pipeline.core.artifacts import EngineFile, OnnxModel, Profile, TensorSpec
from maskplan.pipeline.core.choices import ONNXRUNTIME
from maskplan.pipeline.core.files import read_bytes, write_atomically
from maskplan.pipeline.core.ort_session import UNFUSED, is_unfused, open_session, run_session

NO_SPARSE_KERNELS = (
    "ONNX Runtime on a CPU has no sparse kernels: zeros take as long as other weights, so sparsity saves no time"
)

PLANS_DID_NOT_RUN = (
    "the plans did not run on this host: accuracy and times are those of the ONNX files that they were built from, on"
    " ONNX Runtime"
)


class OrtEngine:
    """An ONNX file in an ONNX Runtime session.

    Args:
        path: The file.
        optimized: False disables graph optimization, for a reference that shares little code with the optimized session.

    Raises:
        InputError: ONNX Runtime does not accept the file.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    last_timing: CallTiming | None = None

    def __init__(self, path: Path, *, optimized: bool = True) -> None:
        self._session = open_session(path, optimized=optimized)
        self._path = path
        self.inputs = tuple(_spec(v) for v in self._session.get_inputs())
        self.outputs = tuple(_spec(v) for v in self._session.get_outputs())

    @property
    def is_unfused(self) -> bool:
        """Whether ONNX Runtime runs the file without fusing Q/DQ."""
        return is_unfused(self._session)

    def infer(self, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run once.

        Raises:
            InputError: The feeds do not match the inputs, or the graph fails on them.
        """
        names = [spec.name for spec in self.outputs]
        return dict(zip(names, run_session(self._session, names, feeds, self._path), strict=True))

    def close(self) -> None:
        """Release the session."""
        del self._session


def build_ort(onnx_model: OnnxModel, profiles: tuple[Profile, ...], sparse_weights: bool, out: Path) -> EngineFile:
    """Copy the ONNX file to `out`, with external weights inlined, and check that ONNX Runtime loads it.

    The copy declares the shapes of `onnx_model`, which may be other ones than the file's.

    The copy is not optimized in advance: an optimized graph would depend on this CPU and this release of ONNX Runtime.

    Raises:
        InputError: ONNX Runtime does not accept the file, or it exceeds the size limit of one ONNX file.
    """
    import onnxruntime

    started = time.perf_counter()
    data = read_bytes(onnx_model.path)
    model = parse_onnx(data, onnx_model.path)
    is_external = bool(external_tensors(model))
    if is_external:
        load_external_data(model, onnx_model.path.parent, where=onnx_model.path)
    # Not `or`: both change the model.
    if set_shapes(model, onnx_model.inputs, onnx_model.outputs) | is_external:
        data = model.SerializeToString()
    engine = OrtEngine(onnx_model.path)
    notes = [UNFUSED] if engine.is_unfused else []
    engine.close()
    sha256 = write_atomically(out, data)
    described = describe_onnx(out)
    return EngineFile(
        path=out,
        sha256=sha256,
        bytes=len(data),
        backend=ONNXRUNTIME,
        precision=described.precision,
        runtime_version=onnxruntime.__version__,
        device="CPU",
        compute_capability=None,
        device_memory_bytes=None,
        sparse_weights=False,
        typing="strong",
        profiles=profiles,
        inputs=described.inputs,
        outputs=described.outputs,
        onnx_sha256=onnx_model.sha256,
        build_s=round(time.perf_counter() - started, 3),
        provenance=described.provenance,
        notes=(*notes, *([NO_SPARSE_KERNELS] if sparse_weights else [])),
    )


def _spec(value: Any) -> TensorSpec:
    dtypes = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}
    # Some converters write a dynamic axis as -1.
    shape = tuple(d if isinstance(d, int) and d >= 0 else None for d in value.shape)
    return TensorSpec(value.name, dtypes.get(value.type, value.type.removeprefix("tensor(").removesuffix(")")), shape)
