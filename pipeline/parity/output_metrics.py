"""Differences between two models' outputs on the fixed images, by Polygraphy's comparators."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from maskplan.engines.base import quiet_polygraphy
from maskplan.pipeline.core.output_reports import OutputCloseness

_QUANTILE = 0.99


def compare_outputs(
    reference: npt.NDArray[np.float32], other: npt.NDArray[np.float32], name: str = "logits"
) -> OutputCloseness:
    """Compare outputs that were computed before; no model runs.

    Absolute and relative differences are over all elements, relative to the reference's element. Cosine similarity and
    PSNR are per image.

    Args:
        reference: Outputs of the dense model, (F, classes).
        other: Outputs of the other model, (F, classes).
        name: Name of the output.
    """
    from polygraphy.comparator import CosineSimilarityCompareFunc, IterationResult, PsnrCompareFunc, SimpleCompareFunc

    quiet_polygraphy()

    def run(compare: Any, first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> Any:
        # Polygraphy takes relative errors against the second result, and the peak of the PSNR from the first.
        return compare(IterationResult({name: first}), IterationResult({name: second}))[name]

    simple = SimpleCompareFunc(check_error_stat="quantile", error_quantile=_QUANTILE)
    cosine, psnr = CosineSimilarityCompareFunc(), PsnrCompareFunc()
    images = range(len(reference))
    # Overflow of a diverged model is None in the report; a warning of NumPy adds nothing.
    with np.errstate(all="ignore"):
        whole = run(simple, other, reference)
        cosines = [run(cosine, reference[i : i + 1], other[i : i + 1]).cosine_similarity for i in images]
        psnrs = [run(psnr, reference[i : i + 1], other[i : i + 1]).psnr for i in images]
    return OutputCloseness(
        name=name,
        images=len(reference),
        max_abs=_finite(whole.max_absdiff),
        mean_abs=_finite(whole.mean_absdiff),
        median_abs=_finite(whole.median_absdiff),
        p99_abs=_finite(whole.quantile_absdiff),
        max_rel=_finite(whole.max_reldiff),
        mean_rel=_finite(whole.mean_reldiff),
        median_rel=_finite(whole.median_reldiff),
        p99_rel=_finite(whole.quantile_reldiff),
        cosine_min=_min_finite(cosines),
        cosine_mean=_finite(float(np.mean(cosines))),
        psnr_min_db=_min_finite(psnrs),
    )


def _min_finite(values: list[float]) -> float | None:
    """The smallest value; None if it is not finite or any value is NaN."""
    return _finite(float(np.min(values)))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
