"""An ONNX file whose intermediate tensors can be asked for, a few at a time."""

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
from maskplan.pipeline.core.ort_session import open_session

Run = Callable[[npt.NDArray[np.float32]], dict[str, npt.NDArray[Any]]]

_FLOATS = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}


class Intermediates:
    """An ONNX file of one image input, to be run on ONNX Runtime with any of its tensors marked as outputs.

    Graph optimization is off: a marked tensor is what its node computes, whichever others are marked. ONNX Runtime reads
    external data from the file's own folder, so there may be more of it than one ONNX file can hold.

    Args:
        path: The ONNX file.
        shape: Of one image, (channels, H, W).

    Attributes:
        model: As parsed; external data stays outside.
        batch: Images that one run takes: 1, or the batch that the graph is fixed to.

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
        dims = [d.dim_value for d in sources[0].type.tensor_type.shape.dim] if sources else []
        fits = len(dims) == 4 and all(d in (0, asked) for d, asked in zip(dims[1:], shape, strict=True))
        if len(sources) != 1 or not fits:
            found = ", ".join(
                f"{v.name} {[d.dim_value or None for d in v.type.tensor_type.shape.dim]}" for v in sources
            )
            raise InputError(
                "the model does not take the images",
                where=path,
                found=f"images {shape}, inputs {found or 'none'}",
                fix="compare models with one image input of one size",
            )
        self.batch: int = max(dims[0], 1)
        self._source = sources[0]
        self._shape = shape

    def float_outputs(self, names: Sequence[str]) -> dict[str, TensorSpec]:
        """What these tensors are at one batch, those of floats only; None in a shape is what only a run can tell.

        Raises:
            InputError: ONNX Runtime does not accept the file.
        """
        return {
            v.name: TensorSpec(v.name, _FLOATS[v.type], tuple(d if isinstance(d, int) else None for d in v.shape))
            for v in self._session(names).get_outputs()
            if v.type in _FLOATS
        }

    def open(self, names: Sequence[str]) -> Run:
        """A function from images (N, channels, H, W) to these tensors, in the types that the graph has them.

        Images go through `batch` at a time; a last part that is too short is filled up with its last image. Tensors without
        a batch axis are joined as if they had one.

        Raises:
            InputError: ONNX Runtime does not accept the file; the function raises it where the graph fails.
        """
        session = self._session(names)
        source = session.get_inputs()[0]
        dtype = np.dtype(_FLOATS.get(source.type, "float32"))

        def one(images: npt.NDArray[np.float32]) -> list[npt.NDArray[Any]]:
            missing = self.batch - len(images)
            filled = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)]) if missing else images
            try:
                values = session.run(list(names), {source.name: filled.astype(dtype, copy=False)})
            except Exception as error:  # onnxruntime's exceptions have no common base but this
                raise InputError(
                    "ONNX Runtime cannot run the model",
                    where=self.path,
                    found=str(error).partition("\n")[0],
                    fix="check the input's shape and type",
                ) from error
            return [v[: len(images)] if missing and v.shape[:1] == (self.batch,) else v for v in values]

        def run(images: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[Any]]:
            parts = [one(images[i : i + self.batch]) for i in range(0, len(images), self.batch)]
            joined = [p[0] if len(p) == 1 or p[0].ndim == 0 else np.concatenate(p) for p in zip(*parts, strict=True)]
            return dict(zip(names, joined, strict=True))

        return run

    def _session(self, names: Sequence[str]) -> Any:
        marked = onnx.ModelProto()
        marked.CopyFrom(self.model)
        # With the images' own size every shape that can be told without a run is told.
        (source,) = [value for value in marked.graph.input if value.name == self._source.name]
        for dim, size in zip(source.type.tensor_type.shape.dim, (self.batch, *self._shape), strict=True):
            dim.dim_value = size
        del marked.graph.value_info[:]
        # Only what is asked for is computed; ONNX Runtime infers the types.
        del marked.graph.output[:]
        marked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        external_data_dir = self.path.parent if self._external else None
        return open_session(marked.SerializeToString(), self.path, optimized=False, external_data_dir=external_data_dir)
