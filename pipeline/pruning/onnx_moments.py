"""Second moments of the inputs of an ONNX graph's weights, from activations that ONNX Runtime computes.

As `second_moments.py`, without PyTorch: the same sums over the same output positions, in the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx

from maskplan.exporters.layer_inputs import LayerCall, ObservedLayer, observed_graph, unfold, unfolded_shape
from maskplan.pipeline.core.artifacts import TensorSpec
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.ort_session import open_session, run_session
from maskplan.pipeline.data.samples import Feeds, Samples, TensorSamples
from maskplan.pipeline.pruning.second_moments import (
    MomentOptions,
    SecondMoments,
    parts_that_fit,
    positions_for,
    sampled_positions,
)

if TYPE_CHECKING:
    import onnxruntime

# Activations that are read out at once take about this much memory.
_SLICE_BYTES = 128 << 20

_Rows = npt.NDArray[np.float32]
Step = Callable[[int, int], None]


@dataclass(frozen=True)
class LayerMoments:
    """What was observed of one layer.

    Attributes:
        layer: The weight.
        moments: Of its inputs; None if no sample reached it.
        dtype: Of the inputs, and so of the outputs.
        macs: Multiplications of a sample.
    """

    layer: ObservedLayer
    moments: SecondMoments | None
    dtype: str
    macs: int


def onnx_moments(
    model: onnx.ModelProto,
    folder: Path,
    layers: Sequence[ObservedLayer],
    inputs: Sequence[TensorSpec],
    samples: Samples,
    options: MomentOptions,
    *,
    where: object,
    step: Step = lambda done, total: None,
) -> Iterator[LayerMoments]:
    """Yield the moments layer by layer, in the order given.

    Args:
        model: The graph; it may be changed only after the last layer.
        folder: Of its external data.
        layers: Weights of the graph.
        inputs: The graph's inputs.
        samples: To average over.
        options: Samples in a batch, positions and seed; all of `samples` are used.
        where: Name of the graph in messages.
        step: Called with the number of batches that were run, and of all.

    Raises:
        InputError: ONNX Runtime does not run the graph on the samples, or an input is NaN or infinite.
    """
    parts = list(parts_that_fit(layers, lambda layer: layer.columns))
    batches = -(-len(samples) // options.batch)
    for number, part in enumerate(parts):
        sums = [_Sums(layer, len(samples), options) for layer in part]
        graph = _ObservedGraph(model, folder, [call for layer in part for call in layer.calls], inputs, where)
        for done, batch in enumerate(_batches(samples, options.batch)):
            for one in sums:
                one.start_batch(done)
            for feeds, whole in batch:
                for values in graph.run(feeds, whole=whole):
                    for one in sums:
                        one.take(values, where)
            for one in sums:
                one.end_batch(where)
            step(number * batches + done + 1, len(parts) * batches)
        del graph
        while sums:
            # Removed before its moments are finished, so that at most one layer's moments are in memory twice.
            yield sums.pop(0).finish()


def _batches(samples: Samples, size: int) -> Iterator[list[tuple[Feeds, bool]]]:
    """Batches of samples; where each sample is what one run takes, as many runs as a batch has samples."""
    if not (isinstance(samples, TensorSamples) and samples.one_run_each):
        for feeds in samples.batches(size):
            yield [(feeds, False)]
        return
    runs: list[tuple[Feeds, bool]] = []
    for feeds in samples.batches(1):
        runs.append((feeds, True))
        if len(runs) == size:
            yield runs
            runs = []
    if runs:
        yield runs


class _ObservedGraph:
    """A session whose outputs are the inputs of some layers."""

    def __init__(
        self,
        model: onnx.ModelProto,
        folder: Path,
        calls: Sequence[LayerCall],
        inputs: Sequence[TensorSpec],
        where: object,
    ) -> None:
        serialized, names = observed_graph(model, calls)
        self._names = {id(call): names[number] for number, call in enumerate(calls)}
        self._session: onnxruntime.InferenceSession = open_session(serialized, where, external_data_dir=folder)
        self._where = where
        first = {spec.shape[0] if spec.shape else 1 for spec in inputs}
        self._fixed = None if first == {None} else next(iter(first)) if len(first) == 1 else 1
        self._step = self._fixed or 1
        self._is_measured = self._fixed is not None
        given = {spec.name for spec in inputs}
        self._outputs = [name for name in dict.fromkeys(names.values()) if name not in given]

    def run(self, feeds: Feeds, *, whole: bool) -> Iterator[Mapping[int, npt.NDArray[Any]]]:
        """The inputs of each node, by the `id` of its call, in slices of the samples that fit into memory."""
        if whole:
            yield self._by_call(self._infer(feeds))
            return
        count, start = len(next(iter(feeds.values()))), 0
        while start < count:
            rows = {name: array[start : start + self._step] for name, array in feeds.items()}
            size = len(next(iter(rows.values())))
            full = self._fixed or size
            try:
                values = self._infer({name: _padded(array, full) for name, array in rows.items()})
            except InputError:
                if self._fixed is not None or size == 1:
                    raise
                # Declared as dynamic, but a Reshape in the graph has the batch of one sample.
                self._fixed = self._step = 1
                continue
            if size < full:
                values = {n: v[:size] if v.shape[:1] == (full,) else v for n, v in values.items()}
            if not self._is_measured:
                # The first slice, of one sample, shows how much memory a sample takes.
                self._is_measured = True
                self._step = max(1, _SLICE_BYTES // max(sum(v.nbytes for v in values.values()), 1))
            start += size
            yield self._by_call(values)

    def _infer(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        fix = "check that the data fits the inputs"
        found = run_session(self._session, self._outputs, feeds, self._where, fix=fix)
        return {**feeds, **dict(zip(self._outputs, found, strict=False))}

    def _by_call(self, values: Mapping[str, npt.NDArray[Any]]) -> dict[int, npt.NDArray[Any]]:
        return {call: values[name] for call, name in self._names.items()}


def _padded(array: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    missing = size - len(array)
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing > 0 else array


class _Sums:
    """Sums over one layer's inputs, shifted by the first batch's mean: subtracting the mean later loses no digits."""

    def __init__(self, layer: ObservedLayer, samples: int, options: MomentOptions) -> None:
        self.layer = layer
        self._positions = positions_for(layer.columns, samples, options)
        self._samples, self._seed = samples, options.seed
        self._random = np.random.default_rng(options.seed)
        self._chosen: dict[tuple[int, int], npt.NDArray[np.int64]] = {}
        self._waiting: dict[int, list[_Rows]] = {}
        self._dtype = "float32"
        self._outputs = 0
        self._rows = 0
        self._shift: _Rows | None = None
        self._sum = np.zeros(0, np.float32)
        self._products = np.zeros((0, 0), np.float32)

    def start_batch(self, batch: int) -> None:
        """Seed the choice of positions by batch and layer, so that it does not depend on which layers share a pass."""
        self._random = np.random.default_rng([self._seed, batch, self.layer.position])
        self._chosen.clear()

    def take(self, values: Mapping[int, npt.NDArray[Any]], where: object) -> None:
        """Unfold a slice of the batch."""
        for number, call in enumerate(self.layer.calls):
            x = values[id(call)]
            if x.size == 0:
                # Another branch ran.
                continue
            samples, count = unfolded_shape(call, self.layer, x)
            if (number, count) not in self._chosen:
                self._chosen[number, count] = sampled_positions(count, self._positions, self._random)
            rows = unfold(call, self.layer, x, self._chosen[number, count])
            if rows.shape[-1] != self.layer.columns:
                raise InputError(
                    "a node's input does not fit its weight", where=where, found=f"{self.layer.name}: {x.shape}"
                )
            self._outputs += samples * count
            self._dtype = str(x.dtype)
            self._waiting.setdefault(number, []).append(rows.reshape(-1, self.layer.columns))

    def end_batch(self, where: object) -> None:
        """Add the batch's rows."""
        for parts in self._waiting.values():
            self._add(np.concatenate(parts) if len(parts) > 1 else parts[0], where)
        self._waiting.clear()

    def _add(self, rows: _Rows, where: object) -> None:
        if self._shift is None:
            self._shift = rows.mean(axis=0)
            self._sum = np.zeros(self.layer.columns, np.float32)
            self._products = np.zeros((self.layer.columns, self.layer.columns), np.float32)
        rows = rows - self._shift
        self._sum += rows.sum(axis=0)
        self._products += rows.T @ rows
        if not np.isfinite(self._sum).all():
            raise InputError(
                f"the inputs of {self.layer.name} contain NaN or infinity",
                where=where,
                fix="check the weights, and how images become inputs (--mean, --std)",
            )
        self._rows += len(rows)

    def finish(self) -> LayerMoments:
        """Return the averages and release the sums."""
        macs = int(np.prod(self.layer.shape)) * self._outputs // self._samples
        if self._shift is None:
            return LayerMoments(self.layer, None, self._dtype, macs)
        offset = self._sum / np.float32(self._rows)
        products, self._products = self._products, np.zeros((0, 0), np.float32)
        products /= np.float32(self._rows)
        products -= np.outer(offset, offset)
        moments = SecondMoments(products, self._shift + offset, self._rows, before_norm=False)
        return LayerMoments(self.layer, moments, self._dtype, macs)
