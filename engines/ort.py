"""ONNX Runtime on the CPU: the engine file is the ONNX file, which the runtime optimizes for its host at load."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy.typing as npt

from maskplan.engines.base import Arrays, CallTiming
from maskplan.exporters.external_data import external_tensors, load_external_data
from maskplan.exporters.metadata import describe_onnx, parse_onnx
from maskplan.pipeline.core.artifacts import EngineFile, OnnxModel, Profile, TensorSpec
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.files import read_bytes, write_atomically

NO_SPARSE_KERNELS = (
    "ONNX Runtime on a CPU has no sparse kernels: zeros cost as much as any number, so timing shows no sparsity gain"
)


class OrtEngine:
    """An ONNX file in an ONNX Runtime session.

    Args:
        path: The file.
        optimized: False switches graph optimization off, for a reference that shares little with the optimized session.

    Raises:
        InputError: ONNX Runtime does not accept the file.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    last_timing: CallTiming | None = None

    def __init__(self, path: Path, *, optimized: bool = True) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Several sessions take turns in one process; threads that spin would take time from the others.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common base but this
            raise InputError(
                "ONNX Runtime does not accept the file",
                where=path,
                found=str(error).partition("\n")[0],
                fix="check it with `maskplan check`",
            ) from error
        self._path = path
        self.inputs = tuple(_spec(v) for v in self._session.get_inputs())
        self.outputs = tuple(_spec(v) for v in self._session.get_outputs())

    def infer(self, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run once.

        Raises:
            InputError: The feeds do not fit the inputs, or the graph fails on them.
        """
        names = [spec.name for spec in self.outputs]
        try:
            return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
        except Exception as error:
            raise InputError(
                "ONNX Runtime cannot run the model",
                where=self._path,
                found=str(error).partition("\n")[0],
                fix="check the input's shape and type",
            ) from error

    def close(self) -> None:
        """Drop the session."""
        del self._session


def build_ort(onnx_model: OnnxModel, profiles: tuple[Profile, ...], sparse_weights: bool, out: Path) -> EngineFile:
    """Copy the ONNX file to its place, external weights included, and see that ONNX Runtime loads it.

    The copy is not optimized ahead: an optimized graph would be tied to this host's CPU and this release of ONNX Runtime.

    Raises:
        InputError: ONNX Runtime does not accept the file, or its weights do not fit into one file.
    """
    import onnxruntime

    started = time.perf_counter()
    data = read_bytes(onnx_model.path)
    model = parse_onnx(data, onnx_model.path)
    if external_tensors(model):
        load_external_data(model, onnx_model.path.parent, where=onnx_model.path)
        data = model.SerializeToString()
    OrtEngine(onnx_model.path).close()
    sha256 = write_atomically(out, data)
    described = describe_onnx(out)
    return EngineFile(
        path=out,
        sha256=sha256,
        bytes=len(data),
        backend="onnxruntime",
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
        notes=(NO_SPARSE_KERNELS,) if sparse_weights else (),
    )


def _spec(value: Any) -> TensorSpec:
    kinds = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}
    shape = tuple(d if isinstance(d, int) else None for d in value.shape)
    return TensorSpec(value.name, kinds.get(value.type, value.type.removeprefix("tensor(").removesuffix(")")), shape)
