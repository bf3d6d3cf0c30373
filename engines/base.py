"""What every engine can do, and the adapter that makes any of them a Polygraphy runner."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Profile, TensorSpec
from maskplan.pipeline.core.errors import InputError

if TYPE_CHECKING:
    from polygraphy.backend.base import BaseRunner

Arrays = Mapping[str, npt.NDArray[Any]]

_FLOATS = ("float32", "float16", "float64")


@dataclass(frozen=True)
class CallTiming:
    """Where the time of one call went, in milliseconds: the GPU's part and the copies by events, the whole on the host."""

    gpu_ms: float
    copy_in_ms: float
    copy_out_ms: float
    host_ms: float

    def __add__(self, other: CallTiming) -> CallTiming:
        return CallTiming(
            self.gpu_ms + other.gpu_ms,
            self.copy_in_ms + other.copy_in_ms,
            self.copy_out_ms + other.copy_out_ms,
            self.host_ms + other.host_ms,
        )


class Engine(Protocol):
    """A loaded engine. `infer` takes and returns host arrays by name; any batch within the profiles will do.

    `spent` tells of the last call, where the engine runs on a device with a clock of its own; it is None elsewhere.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    spent: CallTiming | None

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
        if not (_is_one_of(engine.inputs, ranks=(4,)) and _is_one_of(engine.outputs, ranks=(2, 0))):
            raise _not_a_classifier(name, f"inputs {_told(engine.inputs)}, outputs {_told(engine.outputs)}")
        self.input = engine.inputs[0]
        self.output = engine.outputs[0]
        self.spent: CallTiming | None = None

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size that the graph accepts, if it is not dynamic."""
        return self.input.shape[0]

    @property
    def largest_batch(self) -> int:
        """The most images that one call of the engine takes; unbounded where it has no profiles."""
        return self.fixed_batch or max((p.max for p in self._profiles), default=sys.maxsize)

    def batch_for(self, images: int) -> int:
        """The smallest batch that the engine takes and that holds so many images, at most `largest_batch`."""
        if self.fixed_batch is not None:
            return self.fixed_batch
        if not self._profiles or any(p.min <= images <= p.max for p in self._profiles):
            return images
        return min(p.min for p in self._profiles if p.min > images)

    def logits(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Images (N, channels, H, W) to logits (N, classes), float32; N > 0, in as many calls as the engine needs.

        `spent` then is the sum over these calls, or None where the engine tells no times.
        """
        self.spent = None
        step = min(self.largest_batch, len(images))
        if step == len(images) == self.batch_for(step):
            return self._infer(images)
        parts = [self._infer(self._filled(images[i : i + step])) for i in range(0, len(images), step)]
        return np.concatenate(parts)[: len(images)]

    def _filled(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Repeat the last image up to a batch that the engine takes."""
        missing = self.batch_for(len(images)) - len(images)
        return np.concatenate([images, np.repeat(images[-1:], missing, axis=0)]) if missing else images

    def _infer(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        feeds = {self.input.name: images.astype(np.dtype(self.input.dtype), copy=False)}
        output = self._engine.infer(feeds)[self.output.name]
        if self._engine.spent is not None:
            self.spent = self._engine.spent if self.spent is None else self.spent + self._engine.spent
        if output.ndim != 2:
            raise _not_a_classifier(self.name, f"an output of shape {output.shape}")
        return output.astype(np.float32, copy=False)

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()

    def __enter__(self) -> Classifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_one_of(specs: Sequence[TensorSpec], ranks: Sequence[int]) -> bool:
    """Whether there is one tensor of floats of such a rank; 0 is that of a shape that the graph does not tell."""
    return len(specs) == 1 and len(specs[0].shape) in ranks and specs[0].dtype in _FLOATS


def _not_a_classifier(name: str, found: str) -> InputError:
    return InputError(
        "not an image classifier",
        where=name,
        found=found,
        fix="give a model with one input (N, channels, H, W) and one output (N, classes), both of floats",
    )


def _told(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{s.name} {s.dtype} {s.shape}" for s in specs) or "none"


def polygraphy_runner(classifier: Classifier, name: str) -> BaseRunner:
    """Wrap a classifier for Polygraphy's comparator under common names; closing it stays with the caller."""
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    class ClassifierRunner(BaseRunner):  # type: ignore[misc, unused-ignore]
        def activate_impl(self) -> None:
            pass

        def get_input_metadata_impl(self) -> Any:
            shape = [-1, *(d if d is not None else -1 for d in classifier.input.shape[1:])]
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
