"""The Engine protocol, the classifier on top of it, and the adapter to Polygraphy's runner."""

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
    """Durations of one call in milliseconds: GPU work and copies from CUDA events, the whole call from the host's clock."""

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
    """A loaded engine. `infer` takes and returns host arrays by name, at any batch size within the profiles.

    `last_timing` holds the durations of the last call of an engine on a GPU; on a CPU it is None.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    last_timing: CallTiming | None

    def infer(self, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run once."""
        ...

    def close(self) -> None:
        """Release the engine's resources; it cannot be used afterwards."""
        ...


class Runner(Protocol):
    """An engine behind a call that takes any number of samples: a `Classifier`, or a `BatchRunner` of any network."""

    name: str
    inputs: tuple[TensorSpec, ...]
    last_timing: CallTiming | None

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size that the graph accepts; None if the batch is dynamic."""
        ...

    @property
    def max_batch(self) -> int:
        """The largest batch size of one call."""
        ...

    def batch_for(self, samples: int) -> int:
        """The smallest supported batch size of at least `samples`."""
        ...

    def run(self, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Outputs by name for rows by input name; sets `last_timing`."""
        ...


class Classifier:
    """An engine with one image input and one logits output, independent of their names.

    Args:
        engine: The engine; `close` closes it too.
        name: Name in messages.
        profiles: Batch sizes that the engine was built for; empty if it accepts any.

    Raises:
        InputError: The engine's inputs or outputs are not those of a classifier.
    """

    def __init__(self, engine: Engine, name: str, profiles: tuple[Profile, ...] = ()) -> None:
        self.name = name
        self._profiles = profiles
        self._engine = engine
        if not is_classifier(engine.inputs, engine.outputs):
            raise _not_a_classifier(
                name, f"inputs {_format_specs(engine.inputs)}, outputs {_format_specs(engine.outputs)}"
            )
        self.inputs = engine.inputs
        self.input = engine.inputs[0]
        self.output = engine.outputs[0]
        self.last_timing: CallTiming | None = None

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size that the graph accepts; None if the batch is dynamic."""
        return self.input.shape[0]

    @property
    def max_batch(self) -> int:
        """The largest batch size of one call; `sys.maxsize` without profiles."""
        return self.fixed_batch or max((p.max for p in self._profiles), default=sys.maxsize)

    def batch_for(self, images: int) -> int:
        """The smallest supported batch size of at least `images`, which must not exceed `max_batch`."""
        if self.fixed_batch is not None:
            return self.fixed_batch
        if not self._profiles or any(p.min <= images <= p.max for p in self._profiles):
            return images
        return min(p.min for p in self._profiles if p.min > images)

    def logits(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Compute logits (N, classes) of images (N, channels, H, W), float32, N > 0; in several calls if N > `max_batch`.

        Sets `last_timing` to the sum over these calls, or to None if the engine does not measure time.
        """
        self.last_timing = None
        step = min(self.max_batch, len(images))
        if step == len(images) == self.batch_for(step):
            return self._infer(images)
        parts = [self._infer(self._padded(images[i : i + step])) for i in range(0, len(images), step)]
        return np.concatenate(parts)[: len(images)]

    def run(self, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        """As `logits`, with tensors by name."""
        return {self.output.name: self.logits(feeds[self.input.name])}

    def _padded(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Repeat the last image up to a batch size that the engine accepts."""
        missing = self.batch_for(len(images)) - len(images)
        return np.concatenate([images, np.repeat(images[-1:], missing, axis=0)]) if missing else images

    def _infer(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        feeds = {self.input.name: images.astype(np.dtype(self.input.dtype), copy=False)}
        output = self._engine.infer(feeds)[self.output.name]
        timing = self._engine.last_timing
        if timing is not None:
            self.last_timing = timing if self.last_timing is None else self.last_timing + timing
        if output.ndim != 2:
            raise _not_a_classifier(self.name, f"output shape {output.shape}")
        return output.astype(np.float32, copy=False)

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()

    def __enter__(self) -> Classifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_classifier(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Whether there is one input of rank 4 and one output of rank 2, or of unknown shape, both floating point."""
    return _is_single_float(inputs, ranks=(4,)) and _is_single_float(outputs, ranks=(2, 0))


def _is_single_float(specs: Sequence[TensorSpec], ranks: Sequence[int]) -> bool:
    """Whether there is exactly one tensor, of floats and of one of these ranks; rank 0 means that its shape is unknown."""
    return len(specs) == 1 and len(specs[0].shape) in ranks and specs[0].dtype in _FLOATS


def _not_a_classifier(name: str, found: str) -> InputError:
    return InputError(
        "not an image classifier",
        where=name,
        found=found,
        fix="use a model with one input (N, channels, H, W) and one output (N, classes), both floating point",
    )


def _format_specs(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{s.name} {s.dtype} {s.shape}" for s in specs) or "none"


def polygraphy_runner(engine: Runner, name: str) -> BaseRunner:
    """Wrap an engine for Polygraphy; the caller closes it."""
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    class EngineRunner(BaseRunner):  # type: ignore[misc, unused-ignore]
        def activate_impl(self) -> None:
            pass

        def get_input_metadata_impl(self) -> Any:
            metadata = TensorMetadata()
            for spec in engine.inputs:
                metadata.add(spec.name, np.dtype(spec.dtype), [-1 if d is None else d for d in spec.shape])
            return metadata

        def infer_impl(self, feed_dict: Arrays) -> dict[str, npt.NDArray[Any]]:
            started = time.perf_counter()
            outputs = engine.run(feed_dict)
            self.inference_time = time.perf_counter() - started
            return outputs

        def deactivate_impl(self) -> None:
            pass

    return EngineRunner(name)


def quiet_polygraphy() -> None:
    """Silence Polygraphy's log of every comparison; our reports contain the results."""
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = {"": G_LOGGER.CRITICAL}
