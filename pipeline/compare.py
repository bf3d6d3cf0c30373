"""The compare stage: may the sparse engine replace the dense one? By outputs on fixed images, and by accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from engines.base import Classifier, polygraphy_runner, quiet_polygraphy
from pipeline.artifacts import Preprocessing, Provenance
from pipeline.bounds import at_least
from pipeline.data import Split, batches
from pipeline.errors import InputError
from pipeline.intervals import PairedCounts, drop_interval
from pipeline.progress import track
from pipeline.reports import FAIL, NOT_APPLICABLE, PASS, Fidelity, MethodRow, ParityReport

_SEED = 20240229
_BATCH = 64


@dataclass(frozen=True)
class CompareOptions:
    """What is compared, and what passes.

    Attributes:
        max_top1_drop: Points of top-1 that the sparse model may lose.
        min_agreement: Percent of images on which the models must agree; None asks for nothing.
        fixed_images: Images, one a batch, on which the outputs themselves are compared.
    """

    max_top1_drop: float = 1.0
    min_agreement: float | None = None
    fixed_images: int = 32

    def __post_init__(self) -> None:
        at_least(-100, max_top1_drop=self.max_top1_drop)
        at_least(0, min_agreement=self.min_agreement)
        at_least(1, fixed_images=self.fixed_images)


@dataclass
class Tally:
    """Running counts of one model beside the dense one, over labelled images."""

    images: int = 0
    top1: int = 0
    top5: int = 0
    agreeing: int = 0
    pairs: dict[tuple[bool, bool], int] = field(default_factory=dict)

    def add(
        self, logits: npt.NDArray[np.float32], dense: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]
    ) -> None:
        """Count one batch: logits (N, classes) of both models and labels (N,)."""
        first, dense_first = logits.argmax(axis=1), dense.argmax(axis=1)
        hit, dense_hit = first == labels, dense_first == labels
        self.images += len(labels)
        self.top1 += int(hit.sum())
        self.top5 += int(in_top(logits, labels, 5).sum())
        self.agreeing += int((first == dense_first).sum())
        for key in ((True, True), (True, False), (False, True), (False, False)):
            count = int(((dense_hit == key[0]) & (hit == key[1])).sum())
            self.pairs[key] = self.pairs.get(key, 0) + count

    @property
    def counts(self) -> PairedCounts:
        return PairedCounts(*(self.pairs[k] for k in ((True, True), (True, False), (False, True), (False, False))))

    def percent(self, count: int) -> float:
        return 100 * count / self.images


def in_top(logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], k: int) -> npt.NDArray[np.bool_]:
    """Whether fewer than `k` classes score above the label; NaN scores count as above."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    return np.asarray((~(logits <= own)).sum(axis=1) < k)


def compare(
    dense: Classifier,
    sparse: Classifier,
    how: Preprocessing,
    provenances: Sequence[Provenance | None],
    val: Split | None,
    options: CompareOptions,
    others: Mapping[str, Classifier] | None = None,
    sparse_name: str = "sparse",
) -> ParityReport:
    """Compare two classifiers, and others beside them.

    Args:
        dense: The reference.
        sparse: What shall replace it.
        how: Preprocessing of both.
        provenances: Of both, where known; untrained weights make parity not applicable.
        val: Labelled images; without them the task's metrics are off.
        options: Thresholds.
        others: Baselines by name, for the table of methods.
        sparse_name: What that table calls `sparse`.

    Raises:
        InputError: The models differ in their numbers of outputs.
    """
    images = fixed_images(how, val, options.fixed_images)
    outputs = run_side_by_side([dense, sparse], images)
    if outputs[0].shape != outputs[1].shape:
        raise InputError(
            "the models differ in their outputs",
            found=f"{dense.name} gives {outputs[0].shape[1:]}, {sparse.name} gives {outputs[1].shape[1:]}",
            fix="compare models of the same classes",
        )
    max_abs_diff, cosine_min = closeness(dense, sparse, images)
    finite = all(bool(np.isfinite(o).all()) for o in outputs)
    tallies: dict[str, Tally] = {}
    if val is not None and len(val):
        everyone = {"dense": dense, **(others or {}), sparse_name: sparse}
        tallies, all_finite = _count(everyone, how, val)
        finite = finite and all_finite
    own, reference = tallies.get(sparse_name), tallies.get("dense")
    verdict, reason = _verdict(finite, provenances, own, options)
    return ParityReport(
        verdict=verdict,
        reason=reason,
        images=own.images if own else 0,
        top1_dense=reference.percent(reference.top1) if reference else None,
        top5_dense=reference.percent(reference.top5) if reference else None,
        top1_sparse=own.percent(own.top1) if own else None,
        top5_sparse=own.percent(own.top5) if own else None,
        top1_drop=own.counts.drop if own else None,
        drop_ci95=drop_interval(own.counts) if own else None,
        agreement=own.percent(own.agreeing) if own else None,
        max_abs_diff=max_abs_diff,
        cosine_min=cosine_min,
        max_top1_drop=options.max_top1_drop,
        methods=tuple(_row(name, tally) for name, tally in tallies.items()),
    )


def fidelity(engine: Classifier, reference: Classifier, how: Preprocessing, val: Split | None, count: int) -> Fidelity:
    """How close an engine is to its own ONNX file on the fixed batches."""
    images = fixed_images(how, val, count)
    mine, own_onnx = run_side_by_side([engine, reference], images)
    max_abs_diff, cosine_min = closeness(reference, engine, images)
    agreement = 100 * float((mine.argmax(axis=1) == own_onnx.argmax(axis=1)).mean())
    return Fidelity(len(images), max_abs_diff, cosine_min, agreement)


def fixed_images(how: Preprocessing, val: Split | None, count: int) -> npt.NDArray[np.float32]:
    """The same images every time: labelled ones drawn with a fixed seed, or else normal noise."""
    if val is not None and len(val):
        return np.concatenate([x for x, _ in batches(val.first(count, _SEED), how, _BATCH)])
    shape = (count, how.channels, how.height, how.width)
    return np.random.default_rng(_SEED).standard_normal(shape, dtype=np.float32)


def run_side_by_side(models: Sequence[Classifier], images: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
    """Logits of each model, an image at a time."""
    return [np.concatenate([m.logits(images[i : i + 1]) for i in range(len(images))]) for m in models]


def closeness(
    reference: Classifier, other: Classifier, images: npt.NDArray[np.float32]
) -> tuple[float | None, float | None]:
    """Largest absolute difference and smallest cosine similarity of the outputs, by Polygraphy's comparators.

    Both are None when outputs are not finite.
    """
    from polygraphy.comparator import Comparator, CosineSimilarityCompareFunc, SimpleCompareFunc

    quiet_polygraphy()
    feeds = [{"input": images[i : i + 1]} for i in range(len(images))]
    # Overflow in a diverged model shows as None in the report; NumPy need not warn of it as well.
    with np.errstate(all="ignore"):
        results = Comparator.run(
            [polygraphy_runner(reference, "reference"), polygraphy_runner(other, "other")], data_loader=feeds
        )
        differences = _per_image(
            Comparator.compare_accuracy(results, compare_func=SimpleCompareFunc(check_error_stat="max"))
        )
        cosines = _per_image(Comparator.compare_accuracy(results, compare_func=CosineSimilarityCompareFunc()))
    largest = max(float(d.max_absdiff) for d in differences)
    smallest = min(float(c.cosine_similarity) for c in cosines)
    return largest if math.isfinite(largest) else None, smallest if math.isfinite(smallest) else None


def _per_image(accuracy: Any) -> list[Any]:
    ((_, results),) = accuracy[0].items()
    return [result["logits"] for result in results]


def _count(models: Mapping[str, Classifier], how: Preprocessing, val: Split) -> tuple[dict[str, Tally], bool]:
    tallies = {name: Tally() for name in models}
    finite = True
    for x, labels in track(batches(val, how, _BATCH), "compare", -(-len(val) // _BATCH)):
        logits = {name: m.logits(x) for name, m in models.items()}
        finite = finite and all(bool(np.isfinite(v).all()) for v in logits.values())
        for name, tally in tallies.items():
            tally.add(logits[name], logits["dense"], labels)
    return tallies, finite


def _row(name: str, tally: Tally) -> MethodRow:
    top1, top5 = tally.percent(tally.top1), tally.percent(tally.top5)
    return MethodRow(name, top1, top5, tally.counts.drop, drop_interval(tally.counts))


def _verdict(
    finite: bool, provenances: Sequence[Provenance | None], sparse: Tally | None, options: CompareOptions
) -> tuple[str, str | None]:
    if not finite:
        return FAIL, "outputs are NaN or infinite"
    if any(p is not None and not p.trained for p in provenances):
        return NOT_APPLICABLE, "the weights are random: there is no accuracy to keep"
    if sparse is None:
        return NOT_APPLICABLE, "no labelled images: give --data"
    problems = []
    if sparse.counts.drop > options.max_top1_drop:
        problems.append(f"top-1 drops by {sparse.counts.drop:.2f} points; {options.max_top1_drop:g} are allowed")
    agreement = sparse.percent(sparse.agreeing)
    if options.min_agreement is not None and agreement < options.min_agreement:
        problems.append(f"the models agree on {agreement:.2f}% of images; {options.min_agreement:g}% are asked for")
    return (FAIL, "; ".join(problems)) if problems else (PASS, None)
