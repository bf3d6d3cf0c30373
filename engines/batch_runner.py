"""An engine of any network behind one call that takes any number of samples."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from maskplan.engines.base import CallTiming, Engine
from maskplan.pipeline.core.artifacts import Profile

Array = npt.NDArray[Any]


class BatchRunner:
    """Runs samples through an engine, in batches that it accepts.

    Args:
        engine: The engine; `close` closes it too.
        name: Name in messages.
        profiles: Batch sizes that the engine was built for; empty if it accepts any.
    """

    def __init__(self, engine: Engine, name: str, profiles: tuple[Profile, ...] = ()) -> None:
        self.name = name
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self.last_timing: CallTiming | None = None
        self._engine = engine
        self._profiles = profiles

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size that the graph accepts; None if the batch is dynamic. 1 where an input has no batch axis."""
        first = {spec.shape[0] if spec.shape else 1 for spec in self.inputs}
        return None if first == {None} else next(iter(first)) if len(first) == 1 else 1

    @property
    def has_no_batch(self) -> bool:
        """Whether the inputs' first axes are no batch: an input is a scalar, or they declare different sizes."""
        return len({spec.shape[0] if spec.shape else 0 for spec in self.inputs}) > 1 or not all(
            spec.shape for spec in self.inputs
        )

    @property
    def max_batch(self) -> int:
        """The largest batch size of one call; `sys.maxsize` without profiles."""
        return self.fixed_batch or max((p.max for p in self._profiles), default=sys.maxsize)

    def batch_for(self, samples: int) -> int:
        """The smallest supported batch size of at least `samples`, which must not exceed `max_batch`."""
        if self.fixed_batch is not None:
            return self.fixed_batch
        if not self._profiles or any(p.min <= samples <= p.max for p in self._profiles):
            return samples
        return min(p.min for p in self._profiles if p.min > samples)

    def run(self, feeds: Mapping[str, Array], *, whole: bool | None = None) -> dict[str, Array]:
        """Outputs by name for samples by input name.

        Sets `last_timing` to the sum over the calls, or to None if the engine does not measure time.

        Args:
            feeds: One row for each sample, the same number for every input.
            whole: The feeds are what one run takes, with its batch axis if there is one; None where an input has none.
        """
        self.last_timing = None
        if self.has_no_batch if whole is None else whole:
            return self._infer(feeds)
        count = len(next(iter(feeds.values())))
        step = min(self.max_batch, count)
        parts = []
        for start in range(0, count, step):
            rows = {name: array[start : start + step] for name, array in feeds.items()}
            size = len(next(iter(rows.values())))
            batch = self.batch_for(size)
            outputs = self._infer({name: _padded(array, batch) for name, array in rows.items()})
            parts.append({n: a[:size] if batch > size and a.shape[:1] == (batch,) else a for n, a in outputs.items()})
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        # The engines of one comparison may take floats of different widths.
        outputs = self._engine.infer({spec.name: _as_type(feeds[spec.name], spec.dtype) for spec in self.inputs})
        timing = self._engine.last_timing
        if timing is not None:
            self.last_timing = timing if self.last_timing is None else self.last_timing + timing
        return outputs

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()

    def __enter__(self) -> BatchRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _as_type(array: Array, dtype: str) -> Array:
    return array.astype(dtype, copy=False) if array.dtype.kind == "f" and array.dtype != dtype else array


def _padded(array: Array, batch: int) -> Array:
    """Repeat the last row up to a batch size that the engine accepts."""
    missing = batch - len(array)
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing else array
