"""The compare stage: may the sparse engine replace the dense one? By accuracy, and by outputs on the fixed images."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from maskplan.engines.base import Classifier
from maskplan.pipeline.core.artifacts import Preprocessing, Provenance
from maskplan.pipeline.core.choices import NOT_APPLICABLE
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.reports import Fidelity, MethodRow, ParityReport
from maskplan.pipeline.core.statistics import PairedCounts, clopper_pearson, drop_interval, mcnemar_p
from maskplan.pipeline.data.dataset import Split
from maskplan.pipeline.parity.class_order import class_names, looks_reordered, require_same_class_order
from maskplan.pipeline.parity.counts import OutcomeCounts, count_outcomes
from maskplan.pipeline.parity.model_outputs import (
    UNLABELED,
    ModelOutputs,
    compute_logits,
    load_fixed_images,
    run_models,
)
from maskplan.pipeline.parity.options import CompareOptions
from maskplan.pipeline.parity.output_metrics import compare_outputs
from maskplan.pipeline.parity.verdict import apply_thresholds

_LOG = logging.getLogger(__name__)
_DENSE = "dense"


def compare(
    dense: Classifier,
    sparse: Classifier,
    preprocessing: Preprocessing,
    provenances: Sequence[Provenance | None],
    val: Split | None,
    options: CompareOptions,
    others: Mapping[str, Classifier] | None = None,
    sparse_name: str = "sparse",
    *,
    dense_outputs: ModelOutputs | None = None,
) -> ParityReport:
    """Compare two classifiers, and baselines with the same reference; each runs once on every image.

    Args:
        dense: The reference.
        sparse: The model that is to replace it.
        preprocessing: Preprocessing of both.
        provenances: Provenance of both, where known; untrained weights make parity not applicable.
        val: Validation images; without them only outputs on noise are compared. Without labels only agreement is measured.
        options: Thresholds.
        others: Baselines by name, for the table of methods.
        sparse_name: Name of `sparse` in that table.
        dense_outputs: Saved outputs of the reference, which then does not run.

    Raises:
        InputError: The models' inputs or outputs differ in shape, or their classes in order.
    """
    require_comparable(dense, sparse)
    require_same_class_order(val, provenances)
    models = {_DENSE: dense, **(others or {}), sparse_name: sparse}
    if dense_outputs is not None:
        del models[_DENSE]
    outputs = run_models(models, preprocessing, val, options.fixed_images)
    if dense_outputs is not None:
        outputs = {_DENSE: dense_outputs, **outputs}
    return parity_report(outputs, sparse_name, provenances, val, options, dense.output.name, sparse.output.name)


def require_comparable(dense: Classifier, sparse: Classifier) -> None:
    """Refuse models whose declared inputs or outputs differ in shape. Names may differ.

    Raises:
        InputError: They differ; both shapes are listed.
    """
    for part in ("input", "output"):
        shape, other = getattr(dense, part).shape, getattr(sparse, part).shape
        # The batch size is the caller's choice; a size that a graph does not declare is checked when it runs.
        if any(a is not None and b is not None and a != b for a, b in zip(shape[1:], other[1:], strict=False)):
            raise _differ(part, dense.name, shape, sparse.name, other)


def parity_report(
    outputs: Mapping[str, ModelOutputs],
    sparse_name: str,
    provenances: Sequence[Provenance | None],
    val: Split | None,
    options: CompareOptions,
    output: str = "logits",
    sparse_output: str = "logits",
) -> ParityReport:
    """The report on outputs that were computed before; no model runs.

    Args:
        outputs: By model name, `dense` first; all but `dense` and `sparse_name` are baselines for the table of methods.
        sparse_name: Name of the model whose outputs are judged.
        provenances: Provenance of the dense and the sparse model, where known.
        val: The images that the outputs belong to.
        options: Thresholds.
        output: Name of the dense model's output.
        sparse_output: Name of the sparse model's output.

    Raises:
        InputError: The models differ in their number of outputs, or the dense model's classes are in a different order.
    """
    dense, sparse = outputs[_DENSE], outputs[sparse_name]
    for name, other in outputs.items():
        if other.fixed_logits.shape != dense.fixed_logits.shape:
            raise _differ("output", _DENSE, dense.fixed_logits.shape, name, other.fixed_logits.shape)
    labels = val.labels if val is not None else np.empty(0, np.int64)
    trained = all(p is None or p.trained for p in provenances)
    tallies = (
        {n: count_outcomes(dense, a, labels, class_names(val, provenances)) for n, a in outputs.items()}
        if len(labels)
        else {}
    )
    notes = _check_class_order(outputs, sparse_name, labels) if trained else ()
    if output != sparse_output:
        notes = (*notes, f"the outputs are named {output!r} and {sparse_output!r}: matched by position")
    metrics = compare_outputs(dense.fixed_logits, sparse.fixed_logits, output)
    measured = ParityReport(
        verdict=NOT_APPLICABLE,
        reason=None,
        images=0,
        top1_dense=None,
        top5_dense=None,
        top1_sparse=None,
        top5_sparse=None,
        top1_drop=None,
        drop_ci95=None,
        agreement=None,
        max_abs_diff=metrics.max_abs,
        cosine_min=metrics.cosine_min,
        max_top1_drop=options.max_top1_drop,
        outputs=(metrics,),
        notes=notes,
    )
    if tallies:
        measured = _with_counts(measured, tallies, sparse_name)
    report = apply_thresholds(measured, options, finite=dense.finite and sparse.finite, provenances=provenances)
    for note in report.notes:
        _LOG.warning(note)
    return report


def fidelity(
    engine: Classifier, reference: Classifier, preprocessing: Preprocessing, val: Split | None, count: int
) -> Fidelity:
    """How close an engine is to its own ONNX file on the fixed images."""
    images = load_fixed_images(preprocessing, val, count)
    logits, reference_logits = (compute_logits(model, images) for model in (engine, reference))
    metrics = compare_outputs(reference_logits, logits)
    agreement = 100 * float((logits.argmax(axis=1) == reference_logits.argmax(axis=1)).mean())
    return Fidelity(len(images), metrics.max_abs, metrics.cosine_min, agreement)


def _with_counts(measured: ParityReport, tallies: Mapping[str, OutcomeCounts], sparse_name: str) -> ParityReport:
    """Add the numbers that were counted over the images."""
    own = tallies[sparse_name]
    changed = own.flips.changed
    low, high = clopper_pearson(changed, own.images, 0.95)
    counted = replace(
        measured,
        unlabeled_images=own.images - own.labeled,
        agreement=100 * (own.images - changed) / own.images,
        flips=own.flips,
        flip_rate=100 * changed / own.images,
        flip_rate_ci95=(100 * low, 100 * high),
    )
    if not own.labeled:
        return counted
    return replace(
        counted,
        images=own.labeled,
        top1_dense=_first_accuracy(own.top1),
        top5_dense=_first_accuracy(own.top5),
        top1_sparse=_second_accuracy(own.top1),
        top5_sparse=_second_accuracy(own.top5),
        top1_drop=own.top1.drop,
        drop_ci95=drop_interval(own.top1),
        top5_drop=own.top5.drop,
        top5_drop_ci95=drop_interval(own.top5),
        mcnemar_p=mcnemar_p(own.top1.only_first, own.top1.only_second),
        classes=own.classes,
        methods=tuple(
            MethodRow(name, _second_accuracy(t.top1), _second_accuracy(t.top5), t.top1.drop, drop_interval(t.top1))
            for name, t in tallies.items()
        ),
    )


def _first_accuracy(counts: PairedCounts) -> float:
    return 100 * (counts.both + counts.only_first) / counts.images


def _second_accuracy(counts: PairedCounts) -> float:
    return 100 * (counts.both + counts.only_second) / counts.images


def _check_class_order(
    outputs: Mapping[str, ModelOutputs], sparse_name: str, labels: npt.NDArray[np.int64]
) -> tuple[str, ...]:
    """Refuse a dense model whose classes are in a different order; note it of a sparse one, which fails the gate anyway."""
    known = labels != UNLABELED
    notes = []
    for name in (_DENSE, sparse_name):
        found = looks_reordered(outputs[name].top1[known], labels[known]) if known.any() else None
        if found is None:
            continue
        accuracies = f"top-1 is {found[0]:.1f}% as is, {found[1]:.1f}% with its classes in a different order"
        if name == _DENSE:
            raise InputError(
                "the dense model's classes are in a different order than the data's",
                found=accuracies,
                fix="write classes.txt into the data folder: the class folders in the order of the model's outputs",
            )
        notes.append(f"the sparse model's classes seem to be in a different order: {accuracies}")
    return tuple(notes)


def _differ(part: str, name: str, shape: object, other: str, other_shape: object) -> InputError:
    return InputError(
        f"the models differ in their {part}s",
        found=f"{name} has {shape}, {other} has {other_shape}",
        fix="compare models of the same classes and image size",
    )
