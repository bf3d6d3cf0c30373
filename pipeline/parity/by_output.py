"""Compare two networks of any kind output by output, over all samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from maskplan.engines.batch_runner import Array, BatchRunner
from maskplan.pipeline.core.artifacts import OutputKind, TensorSpec
from maskplan.pipeline.core.bootstrap import ratio_interval
from maskplan.pipeline.core.choices import LOGITS
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.output_reports import OutputParity
from maskplan.pipeline.core.progress import track
from maskplan.pipeline.core.statistics import clopper_pearson
from maskplan.pipeline.data.samples import Samples, TensorSamples

_BATCH = 16


@dataclass(frozen=True)
class OutputRows:
    """Outputs of one model, a row for each sample; rows of one output may differ in size."""

    rows: Mapping[str, list[Array]]

    def stacked(self, positions: Sequence[int] | npt.NDArray[np.int64]) -> dict[str, Array | list[Array]]:
        """Some rows by output: one array if all rows of the output have one size, else a list of arrays."""
        return {name: _stack([rows[i] for i in positions]) for name, rows in self.rows.items()}


@dataclass(frozen=True)
class NetworkComparison:
    """Differences by output, whether all are finite, and the outputs themselves if they were to be kept."""

    outputs: tuple[OutputParity, ...]
    finite: bool
    dense: OutputRows | None = None
    sparse: OutputRows | None = None


def compare_by_output(
    dense: BatchRunner, sparse: BatchRunner, samples: Samples, kinds: Sequence[OutputKind], *, keep: bool = False
) -> NetworkComparison:
    """Run both networks once on every sample and measure the differences of their outputs.

    Outputs are matched by name, or by position where the names differ. An output whose first axis is not the batch, such as
    the boxes that are left after a selection, is compared sample by sample.

    Args:
        dense: The reference.
        sparse: The network that is to replace it.
        samples: Inputs of both, by the names of `dense`.
        kinds: Of the outputs of `dense`, in their order.
        keep: Keep the outputs, for metrics.

    Raises:
        InputError: The networks differ in their inputs or outputs.
    """
    require_same_interface(dense, sparse, (dense.name, sparse.name))
    inputs, outputs = _pairs(dense.inputs, sparse.inputs), _pairs(dense.outputs, sparse.outputs)
    sums = {kind.name: _Sums(kind) for kind in kinds}
    kept: tuple[dict[str, list[Array]], dict[str, list[Array]]] = ({}, {})
    for feeds, whole in _feeds(dense, samples):
        count = 1 if whole else len(next(iter(feeds.values())))
        first = dense.run(feeds, whole=whole)
        second = sparse.run({inputs[name]: array for name, array in feeds.items()}, whole=whole)
        for name in sums:
            # What is no row for each sample keeps its first axis, which may be a batch of one run.
            skipped = int(first[name].ndim > 0 and len(first[name]) == count)
            pairs = zip(_rows(first[name], count), _rows(second[outputs[name]], count), strict=True)
            for reference, other in pairs:
                sums[name].add(reference, other, skipped)
                if keep:
                    kept[0].setdefault(name, []).append(reference)
                    kept[1].setdefault(name, []).append(other)
    return NetworkComparison(
        tuple(each.report() for each in sums.values()),
        all(each.finite for each in sums.values()),
        OutputRows(kept[0]) if keep else None,
        OutputRows(kept[1]) if keep else None,
    )


class Interface(Protocol):
    """What an engine declares."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def require_same_interface(dense: Interface, sparse: Interface, names: tuple[str, str]) -> None:
    """Refuse networks whose declared inputs or outputs cannot be those of one network.

    Names, batch sizes and widths of floats may differ.

    Args:
        dense: The reference.
        sparse: The network that is to replace it.
        names: Of both, in messages.

    Raises:
        InputError: They differ; every difference is listed.
    """
    problems = []
    for part in ("inputs", "outputs"):
        first, second = getattr(dense, part), getattr(sparse, part)
        if len(first) != len(second):
            found = [
                f"{name}: {', '.join(s.name for s in specs)}"
                for name, specs in zip(names, (first, second), strict=True)
            ]
            raise InputError(
                f"the networks have different numbers of {part}",
                found="; ".join(found),
                fix="compare two versions of one network",
            )
        others = {spec.name: spec for spec in second}
        for spec, name in zip(first, _pairs(first, second).values(), strict=True):
            if not _is_like(spec, others[name]):
                problems.append(f"{_shown(spec)} of {names[0]}, {_shown(others[name])} of {names[1]}")
    if problems:
        fix = "compare two versions of one network"
        raise InputError("the networks have different inputs or outputs", found=listed(problems), fix=fix)


def _is_like(first: TensorSpec, second: TensorSpec) -> bool:
    """Whether two declarations can be of one tensor; a shape () may also be one that is not declared."""
    a, b = np.dtype(first.dtype), np.dtype(second.dtype)
    if a != b and not a.kind == b.kind == "f":
        return False
    if not first.shape or not second.shape:
        return True
    # The batch, the first axis, is the caller's choice.
    return len(first.shape) == len(second.shape) and all(
        None in (x, y) or x == y for x, y in zip(first.shape[1:], second.shape[1:], strict=True)
    )


def _shown(spec: TensorSpec) -> str:
    shape = ", ".join("dynamic" if d is None else str(d) for d in spec.shape)
    return f"{spec.name} {spec.dtype} ({shape})"


def _pairs(first: Sequence[object], second: Sequence[object]) -> dict[str, str]:
    """Names of the first network's tensors with those of the second: the same ones, else by position."""
    names, others = ([getattr(spec, "name", "") for spec in specs] for specs in (first, second))
    return dict(zip(names, names if set(names) == set(others) else others, strict=True))


def _feeds(dense: BatchRunner, samples: Samples) -> Iterator[tuple[Mapping[str, Array], bool]]:
    """Feeds, and whether each is one whole run; a sample at a time if outputs have no row for each sample."""
    whole = isinstance(samples, TensorSamples) and samples.one_run_each
    size = 1 if whole or not _has_rows(dense, samples) else _BATCH
    for feeds in track(samples.batches(size), "compare", -(-len(samples) // size)):
        yield feeds, whole


def _has_rows(dense: BatchRunner, samples: Samples) -> bool:
    """Whether every output has one row for each sample, of one and of two; False where the network rejects two."""
    if dense.fixed_batch is not None or len(samples) < 2:
        return False
    try:
        outputs = [dense.run(next(iter(samples.batches(count)))) for count in (1, 2)]
    except InputError:
        return False
    return all(
        output.ndim > 0 and len(output) == count
        for count, run in zip((1, 2), outputs, strict=True)
        for output in run.values()
    )


def _rows(output: Array, count: int) -> list[Array]:
    """The rows of an output; all of it for one sample, without the batch axis if it has one."""
    if output.ndim and len(output) == count:
        return list(output)
    return [output] * count


class _Sums:
    """Numbers of one output, a row for each sample."""

    def __init__(self, kind: OutputKind) -> None:
        self.kind = kind
        self.finite = True
        self.unmatched = 0
        self._squares: list[tuple[float, float, float, float]] = []
        self._agree: list[tuple[int, int]] = []

    def add(self, reference: Array, other: Array, skipped: int = 1) -> None:
        """Add one sample's outputs; `skipped` is how many of the output's first axes they lack."""
        if reference.shape != other.shape:
            self.unmatched += 1
            return
        axis = self.kind.axis - skipped
        if self.kind.kind == LOGITS and 0 <= axis < reference.ndim and reference.size:
            same = reference.argmax(axis=axis) == other.argmax(axis=axis)
            self._agree.append((int(np.count_nonzero(same)), int(np.size(same))))
        a, b = (values.astype(np.float64).ravel() for values in (reference, other))
        # Values such as -inf that mask a class are equal in both networks.
        odd = ~(np.isfinite(a) & np.isfinite(b))
        if odd.any():
            if not np.array_equal(a[odd], b[odd], equal_nan=True):
                self.finite = False
                return
            a, b = a[~odd], b[~odd]
        difference = a - b
        norms = math.sqrt(float(a @ a) * float(b @ b))
        cosine = float(a @ b) / norms if norms else float(not difference.any())
        self._squares.append(
            (float(difference @ difference), float(a @ a), cosine, float(np.abs(difference).max(initial=0)))
        )

    def report(self) -> OutputParity:
        squares = np.array(self._squares, np.float64).reshape(-1, 4)
        noise, signal = squares[:, 0], squares[:, 1]
        power = float(noise.sum()) / float(signal.sum()) if signal.sum() else None if noise.any() else 0.0
        if not (self.finite and len(squares)):
            power = None
        interval = ratio_interval(noise, signal) if power is not None else None
        agreement, agreement_ci95 = self._agreement()
        return OutputParity(
            name=self.kind.name,
            kind=self.kind.kind,
            samples=len(squares),
            relative_error=None if power is None else math.sqrt(power),
            relative_error_ci95=None if interval is None else (math.sqrt(interval[0]), math.sqrt(interval[1])),
            sqnr_db=_decibels(power),
            sqnr_ci95_db=_decibel_interval(interval),
            cosine_min=float(squares[:, 2].min()) if self.finite and len(squares) else None,
            max_abs_diff=float(squares[:, 3].max()) if self.finite and len(squares) else None,
            agreement=agreement,
            agreement_ci95=agreement_ci95,
            unmatched=self.unmatched,
        )

    def _agreement(self) -> tuple[float | None, tuple[float, float] | None]:
        if not self._agree:
            return None, None
        same, places = np.array(self._agree, np.float64).T
        share = float(same.sum() / places.sum())
        if (places == 1).all():
            low, high = clopper_pearson(int(same.sum()), len(same))
        else:
            interval = ratio_interval(same, places)
            if interval is None:
                return 100 * share, None
            low, high = interval
        return 100 * share, (100 * low, 100 * high)


def _decibels(power: float | None) -> float | None:
    return None if not power else -10 * math.log10(power)


def _decibel_interval(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    if interval is None or not interval[0] or not interval[1]:
        return None
    return -10 * math.log10(interval[1]), -10 * math.log10(interval[0])


def _stack(rows: list[Array]) -> Array | list[Array]:
    return np.stack(rows) if len({row.shape for row in rows}) == 1 else rows
