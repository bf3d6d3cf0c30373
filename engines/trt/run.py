"""A TensorRT plan behind the Engine protocol, through Polygraphy's runner."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from engines.base import Arrays
from engines.trt.build import import_tensorrt
from pipeline.artifacts import EngineFile, TensorSpec
from pipeline.errors import InputError
from pipeline.files import read_bytes


class TrtEngine:
    """A plan, deserialised after its digest was checked.

    Raises:
        HostError: TensorRT is not here.
        InputError: The plan was built by another TensorRT or for another GPU.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __init__(self, engine: EngineFile) -> None:
        trt = import_tensorrt()
        if str(trt.__version__) != engine.runtime_version:
            raise InputError(
                "the plan is of another TensorRT",
                where=engine.path,
                found=f"built by {engine.runtime_version}, here is {trt.__version__}",
                fix="build it again on this host",
            )
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner
        from polygraphy.exception import PolygraphyException

        self._profiles = engine.profiles
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self._runner = TrtRunner(EngineFromBytes(read_bytes(engine.path)))
        try:
            self._runner.activate()
        except PolygraphyException as error:
            raise InputError(
                "TensorRT cannot load the plan",
                where=engine.path,
                found=str(error),
                fix="build it again on this host's GPU",
            ) from error

    def infer(self, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run once, in the profile tuned closest to the batch.

        Raises:
            InputError: The batch is outside every profile.
        """
        batch = next(iter(feeds.values())).shape[0]
        fitting = [i for i, p in enumerate(self._profiles) if p.min <= batch <= p.max]
        if not fitting:
            raise InputError(
                "the batch is outside every profile",
                found=f"{batch}; profiles {', '.join(map(str, self._profiles))}",
            )
        self._runner.set_profile(min(fitting, key=lambda i: abs(self._profiles[i].opt - batch)))
        return dict(self._runner.infer(dict(feeds)))

    def close(self) -> None:
        """Free the engine."""
        self._runner.deactivate()
