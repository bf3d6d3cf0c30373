"""Run an ONNX file with chosen intermediate tensors as outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from maskplan.exporters.external_data import external_tensors, locate_external
from maskplan.exporters.metadata import load_onnx
from maskplan.pipeline.core.artifacts import TensorSpec
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.ort_session import open_session, run_session

Run = Callable[[npt.NDArray[np.float32]], dict[str, npt.NDArray[Any]]]

_FLOATS = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}


class Intermediates:
    """An ONNX file of one image input, to be run on ONNX Runtime with any of its tensors marked as outputs.

    Graph optimization is off, so that a tensor's value does not depend on which others are marked. ONNX Runtime reads
    external data from the file's folder, so the model may exceed the 2 GiB of one ONNX file.

    Args:
        path: The ONNX file.
        shape: Shape of one image, (channels, H, W).

    Attributes:
        model: The parsed model, without external data.
        batch: Images per run: 1, or the fixed batch size of the graph.

    Raises:
        InputError: The file cannot be read, takes no images of this shape, or has external data outside its folder.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path = path
        self.model = load_onnx(path)
        self._external = False
        for tensor in external_tensors(self.model):
            locate_external(tensor, path.parent)
            self._external = True
        constants = {tensor.name for tensor in self.model.graph.initializer}
        sources = [value for value in self.model.graph.input if value.name not in constants]
        dims = [max(d.dim_value, 0) for d in sources[0].type.tensor_type.shape.dim] if sources else []
        fits = len(dims) == 4 and all(d in (0, asked) for d, asked in zip(dims[1:], shape, strict=True))
        if len(sources) != 1 or not fits:
            found = ", ".join(
                f"{v.name} {[d.dim_value or None for d in v.type.tensor_type.shape.dim]}" for v in sources
            )
            raise InputError(
                "the model does not accept the images",
                where=path,
                found=f"images {shape}, inputs {found or 'none'}",
                fix="compare models with one image input of one size",
            )
        self.batch: int = max(dims[0], 1)
        self._source = sources[0]
        self._shape = shape

    def float_outputs(self, names: Sequence[str]) -> dict[str, TensorSpec]:
        """The float tensors among `names` with their types and shapes for one batch; None is a size known only at run time.

        Raises:
            InputError: ONNX Runtime does not accept the file.
        """
        return {
            v.name: TensorSpec(v.name, _FLOATS[v.type], tuple(d if isinstance(d, int) else None for d in v.shape))
            for v in self._session(names).get_outputs()
            if v.type in _FLOATS
        }

    def open(self, names: Sequence[str]) -> Run:
        """A function from images (N, channels, H, W) to these tensors, in the graph's own types.

        Images run `batch` at a time; a short last batch is padded with its last image. Tensors without a batch axis are
        concatenated as if they had one.

        Raises:
            InputError: ONNX Runtime does not accept the file. The function raises it if the graph fails.
        """
        session = self._session(names)
        source = session.get_inputs()[0]
        dtype = np.dtype(_FLOATS.get(source.type, "float32"))

        def one(images: npt.NDArray[np.float32]) -> list[npt.NDArray[Any]]:
            missing = self.batch - len(images)
            filled = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)]) if missing else images
            values = run_session(session, names, {source.name: filled.astype(dtype, copy=False)}, self.path)
            return [v[: len(images)] if missing and v.shape[:1] == (self.batch,) else v for v in values]

        def run(images: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[Any]]:
            parts = [one(images[i : i + self.batch]) for i in range(0, len(images), self.batch)]
            joined = [p[0] if len(p) == 1 or p[0].ndim == 0 else np.concatenate(p) for p in zip(*parts, strict=True)]
            return dict(zip(names, joined, strict=True))

        return run

    def _session(self, names: Sequence[str]) -> Any:
        marked = onnx.ModelProto()
        marked.CopyFrom(self.model)
        # With the images' own size, ONNX Runtime infers every shape that does not depend on values.
        (source,) = [value for value in marked.graph.input if value.name == self._source.name]
        for dim, size in zip(source.type.tensor_type.shape.dim, (self.batch, *self._shape), strict=True):
            dim.dim_value = size
        del marked.graph.value_info[:]
        # Only the requested tensors are computed; ONNX Runtime infers their types.
        del marked.graph.output[:]
        marked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        external_data_dir = self.path.parent if self._external else None
        return open_session(marked.SerializeToString(), self.path, optimized=False, external_data_dir=external_data_dir)
