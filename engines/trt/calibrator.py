"""The entropy calibrator of TensorRT 10's implicit INT8 mode: TensorRT requests batches and measures ranges itself.

TensorRT 11 has neither calibrators nor that mode and needs Q/DQ nodes in the graph, which 10 supports as well. Use the
implicit mode only for its sparse INT8 kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maskplan.engines.trt.cuda import Context
from maskplan.engines.trt.versions import member
from maskplan.pipeline.core.artifacts import TensorSpec
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.files import write_atomically

log = logging.getLogger(__name__)

Batches = Callable[[], Iterator[npt.NDArray[np.float32]]]


@dataclass(frozen=True)
class ImplicitInt8:
    """Calibration data for TensorRT.

    Attributes:
        batches: Starts a pass over preprocessed images (N, channels, H, W), float32.
        batch: Batch size; an incomplete last batch is skipped, because TensorRT accepts full batches only.
        cache: TensorRT's calibration cache. If it exists it is read and no image is used, otherwise it is written.
    """

    batches: Batches
    batch: int
    cache: Path | None = None


@contextmanager
def calibrating(trt: Any, builder: Any, config: Any, spec: TensorSpec, source: ImplicitInt8) -> Iterator[None]:
    """Calibrate builds inside the block on `source`; layers that are not INT8 run in FP16.

    Args:
        trt: The TensorRT module.
        builder: The builder of the network.
        config: The build configuration, with its profiles.
        spec: The network's only input.
        source: Images, or the cache of a previous calibration.

    Raises:
        InputError: This TensorRT has no implicit INT8 mode.
        Exception: Any error while reading or copying images, raised after the build; TensorRT would only stop.
    """
    base = member(trt, "IInt8EntropyCalibrator2")
    int8, fp16 = member(trt.BuilderFlag, "INT8"), member(trt.BuilderFlag, "FP16")
    if base is None or int8 is None or fp16 is None:
        raise InputError(
            f"TensorRT {trt.__version__} has no implicit INT8 mode",
            fix="quantize the graph instead: maskplan calibrate model.onnx --float-dtype fp16, then build that",
        )
    context = Context()
    with context.active():
        calibrator = _calibrator(base, source, context)
        config.set_flag(int8)
        config.set_flag(fp16)
        config.int8_calibrator = calibrator
        shape = (source.batch, *(d or 1 for d in spec.shape[1:]))
        profile = builder.create_optimization_profile()
        profile.set_shape(spec.name, shape, shape, shape)
        if not config.set_calibration_profile(profile):
            raise InputError("TensorRT rejects the calibration shapes", where=spec.name, found=shape)
        try:
            yield
        finally:
            calibrator.memory = None
    if calibrator.failure is not None:
        raise calibrator.failure


def _calibrator(base: Any, source: ImplicitInt8, context: Context) -> Any:
    class Calibrator(base):  # type: ignore[misc]
        """Called by TensorRT; exceptions are stored, because they must not propagate through C++."""

        def __init__(self) -> None:
            super().__init__()
            self.failure: BaseException | None = None
            self.memory: Any = None
            self._batches = source.batches()

        def get_batch_size(self) -> int:
            return source.batch

        def get_batch(self, names: list[str]) -> list[int] | None:
            try:
                images = next(self._batches, None)
                if images is None or len(images) < source.batch:
                    return None
                contiguous = np.ascontiguousarray(images)
                if self.memory is None:
                    self.memory = context.allocate(contiguous.nbytes)
                context.copy_in(self.memory, contiguous)
                context.synchronize()
            except BaseException as failure:
                self.failure = failure
                return None
            return [int(self.memory)]

        def read_calibration_cache(self) -> bytes | None:
            if source.cache is None or not source.cache.is_file():
                return None
            log.info("reading calibration ranges from %s", source.cache)
            return source.cache.read_bytes()

        def write_calibration_cache(self, cache: Any) -> None:
            try:
                if source.cache is not None and not source.cache.is_file():
                    write_atomically(source.cache, bytes(cache), option="--calibration-cache")
            except BaseException as failure:
                self.failure = failure

    return Calibrator()
