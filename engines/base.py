"""What every engine can do, and the adapter that makes any of them a Polygraphy runner."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.artifacts import Profile, TensorSpec
from pipeline.errors import InputError

if TYPE_CHECKING:
    from polygraphy.backend.base import BaseRunner

Arrays = Mapping[str, npt.NDArray[Any]]


class Engine(Protocol):
    """A loaded engine. `infer` takes and returns host arrays by name; any batch within the profiles will do."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def infer(self, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run once."""
        ...

    def close(self) -> None:
        """Free what the engine holds; it cannot be used afterwards."""
        ...


class Classifier:
    """An engine with one image input and one output of logits, whatever these are called.

    Args:
        engine: The engine; it is closed with the classifier.
        name: For messages.
        profiles: Batch sizes that the engine was built for; none where any batch will do.

    Raises:
        InputError: The engine has other inputs or outputs.
    """

    def __init__(self, engine: Engine, name: str, profiles: tuple[Profile, ...] = ()) -> None:
        self.name = name
        self._profiles = profiles
        self._engine = engine
        if len(engine.inputs) != 1 or len(engine.outputs) != 1 or len(engine.inputs[0].shape) != 4:
            raise InputError(
                "not an image classifier",
                where=name,
                found=f"inputs {[(i.name, i.shape) for i in engine.inputs]}, outputs {[o.name for o in engine.outputs]}",
                fix="give a model with one input (N, channels, H, W) and one output (N, classes)",
            )
        self.input = engine.inputs[0]
        self.output = engine.outputs[0]

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size that the graph accepts, if it is not dynamic."""
        return self.input.shape[0]

    @property
    def largest_batch(self) -> int:
        """The most images that one call takes; unbounded where the engine has no profiles."""
        return max((p.max for p in self._profiles), default=sys.maxsize)

    def logits(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Images (N, channels, H, W) to logits (N, classes), float32."""
        feeds = {self.input.name: images.astype(np.dtype(self.input.dtype), copy=False)}
        output = self._engine.infer(feeds)[self.output.name]
        return output.astype(np.float32, copy=False)

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()

    def __enter__(self) -> Classifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def polygraphy_runner(classifier: Classifier, name: str) -> BaseRunner:
    """Wrap a classifier for Polygraphy's comparator under common names; closing it stays with the caller."""
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    class ClassifierRunner(BaseRunner):  # type: ignore[misc, unused-ignore]
        def activate_impl(self) -> None:
            pass

        def get_input_metadata_impl(self) -> Any:
            shape = [d if d is not None else -1 for d in classifier.input.shape]
            return TensorMetadata().add("input", np.dtype(np.float32), shape)

        def infer_impl(self, feed_dict: Arrays) -> dict[str, npt.NDArray[Any]]:
            started = time.perf_counter()
            logits = classifier.logits(feed_dict["input"])
            self.inference_time = time.perf_counter() - started
            return {"logits": logits}

        def deactivate_impl(self) -> None:
            pass

    return ClassifierRunner(name)


def quiet_polygraphy() -> None:
    """Polygraphy narrates every comparison; our reports do that."""
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = {"": G_LOGGER.CRITICAL}
