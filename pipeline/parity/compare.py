"""The compare stage: may the sparse engine replace the dense one? By outputs on fixed images, and by accuracy."""

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
from maskplan.pipeline.parity.class_order import class_names, looks_reordered, require_one_order
from maskplan.pipeline.parity.counts import OutcomeCounts, count_outcomes
from maskplan.pipeline.parity.model_outputs import (
    UNLABELED,
    ModelOutputs,
    compute_logits,
    load_fixed_images,
    run_models,
)
from maskplan.pipeline.parity.options import CompareOptions
from maskplan.pipeline.parity.output_metrics import output_metrics
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
    """Compare two classifiers, and others beside them; each runs once on every image.

    Args:
        dense: The reference.
        sparse: What shall replace it.
        preprocessing: Preprocessing of both.
        provenances: Of both, where known; untrained weights make parity not applicable.
        val: Labeled images; without them the task's metrics are off. Images may be `UNLABELED`, which leaves agreement.
        options: Thresholds.
        others: Baselines by name, for the table of methods.
        sparse_name: What that table calls `sparse`.
        dense_outputs: What the reference said before; it is not run then.

    Raises:
        InputError: The models' inputs or outputs differ in shape, or the classes are not in one order.
    """
    require_comparable(dense, sparse)
    require_one_order(val, provenances)
    models = {_DENSE: dense, **(others or {}), sparse_name: sparse}
    if dense_outputs is not None:
        del models[_DENSE]
    said = run_models(models, preprocessing, val, options.fixed_images)
    if dense_outputs is not None:
        said = {_DENSE: dense_outputs, **said}
    return parity_report(said, sparse_name, provenances, val, options, *_names(dense, sparse))


def require_comparable(dense: Classifier, sparse: Classifier) -> None:
    """Refuse models whose inputs or outputs differ in shape, as far as their graphs tell. Names may differ.

    Raises:
        InputError: They do; both are listed.
    """
    for part in ("input", "output"):
        mine, theirs = getattr(dense, part).shape, getattr(sparse, part).shape
        # The batch is the caller's choice, and what a graph does not tell shows when it runs.
        if any(a is not None and b is not None and a != b for a, b in zip(mine[1:], theirs[1:], strict=False)):
            raise _differ(part, dense.name, mine, sparse.name, theirs)


def parity_report(
    said: Mapping[str, ModelOutputs],
    sparse_name: str,
    provenances: Sequence[Provenance | None],
    val: Split | None,
    options: CompareOptions,
    output: str = "logits",
    sparse_output: str = "logits",
) -> ParityReport:
    """Judge answers that were given before; no model runs.

    Args:
        said: By model, `dense` first; all but `dense` and `sparse_name` are baselines for the table of methods.
        sparse_name: Whose answers are judged.
        provenances: Of the dense and the sparse model, where known.
        val: What was answered.
        options: Thresholds.
        output: What the dense model calls its output.
        sparse_output: What the sparse one does.

    Raises:
        InputError: The models differ in their number of outputs, or the dense one knows the classes in another order.
    """
    dense, own = said[_DENSE], said[sparse_name]
    for name, answers in said.items():
        if answers.fixed.shape != dense.fixed.shape:
            raise _differ("output", _DENSE, dense.fixed.shape, name, answers.fixed.shape)
    labels = val.labels if val is not None else np.empty(0, np.int64)
    trained = all(p is None or p.trained for p in provenances)
    tallies = (
        {n: count_outcomes(dense, a, labels, class_names(val, provenances)) for n, a in said.items()}
        if len(labels)
        else {}
    )
    notes = _same_classes(said, sparse_name, labels) if trained else ()
    if output != sparse_output:
        notes = (*notes, f"the outputs are called {output!r} and {sparse_output!r}: matched by their order")
    near = output_metrics(dense.fixed, own.fixed, output)
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
        max_abs_diff=near.max_abs,
        cosine_min=near.cosine_min,
        max_top1_drop=options.max_top1_drop,
        outputs=(near,),
        notes=notes,
    )
    if tallies:
        measured = _counted(measured, tallies, sparse_name)
    judged = apply_thresholds(measured, options, finite=dense.finite and own.finite, provenances=provenances)
    for note in judged.notes:
        _LOG.warning(note)
    return judged


def fidelity(
    engine: Classifier, reference: Classifier, preprocessing: Preprocessing, val: Split | None, count: int
) -> Fidelity:
    """How close an engine is to its own ONNX file on the fixed images."""
    images = load_fixed_images(preprocessing, val, count)
    mine, own_onnx = (compute_logits(model, images) for model in (engine, reference))
    near = output_metrics(own_onnx, mine)
    agreement = 100 * float((mine.argmax(axis=1) == own_onnx.argmax(axis=1)).mean())
    return Fidelity(len(images), near.max_abs, near.cosine_min, agreement)


def _counted(measured: ParityReport, tallies: Mapping[str, OutcomeCounts], sparse_name: str) -> ParityReport:
    """The report with what was counted over the images."""
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
        top1_dense=_first(own.top1),
        top5_dense=_first(own.top5),
        top1_sparse=_second(own.top1),
        top5_sparse=_second(own.top5),
        top1_drop=own.top1.drop,
        drop_ci95=drop_interval(own.top1),
        top5_drop=own.top5.drop,
        top5_drop_ci95=drop_interval(own.top5),
        mcnemar_p=mcnemar_p(own.top1.only_first, own.top1.only_second),
        classes=own.classes,
        methods=tuple(
            MethodRow(name, _second(t.top1), _second(t.top5), t.top1.drop, drop_interval(t.top1))
            for name, t in tallies.items()
        ),
    )


def _first(counts: PairedCounts) -> float:
    return 100 * (counts.both + counts.only_first) / counts.images


def _second(counts: PairedCounts) -> float:
    return 100 * (counts.both + counts.only_second) / counts.images


def _same_classes(said: Mapping[str, ModelOutputs], sparse_name: str, labels: npt.NDArray[np.int64]) -> tuple[str, ...]:
    """Refuse a dense model that knows the classes in another order; say so of a sparse one, which fails by itself."""
    known = labels != UNLABELED
    notes = []
    for name in (_DENSE, sparse_name):
        found = looks_reordered(said[name].first[known], labels[known]) if known.any() else None
        if found is None:
            continue
        told = f"{found[0]:.1f}% right as it is, {found[1]:.1f}% with its classes in another order"
        if name == _DENSE:
            raise InputError(
                "the dense model's classes are not in the order of the data's",
                found=told,
                fix="write classes.txt into the data folder: the class folders in the order of the model's outputs",
            )
        notes.append(f"the sparse model's classes seem to be in another order: {told}")
    return tuple(notes)


def _names(dense: Classifier, sparse: Classifier) -> tuple[str, str]:
    return dense.output.name, sparse.output.name


def _differ(part: str, name: str, shape: object, other: str, other_shape: object) -> InputError:
    return InputError(
        f"the models differ in their {part}s",
        found=f"{name} has {shape}, {other} has {other_shape}",
        fix="compare models of the same classes and image size",
    )
