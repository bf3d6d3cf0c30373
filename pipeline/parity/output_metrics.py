"""How far apart two models' outputs on the fixed images are, by Polygraphy's comparators."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from maskplan.engines.base import quiet_polygraphy
from maskplan.pipeline.core.reports import OutputCloseness

_QUANTILE = 0.99


def output_metrics(
    reference: npt.NDArray[np.float32], other: npt.NDArray[np.float32], name: str = "logits"
) -> OutputCloseness:
    """Compare outputs that were computed before; no model runs.

    Differences are told over all elements at once, relative ones as shares of the reference's element; cosine similarity
    and PSNR are those of single images.

    Args:
        reference: (F, classes), the dense model's.
        other: (F, classes).
        name: Of the output.
    """
    from polygraphy.comparator import CosineSimilarityCompareFunc, IterationResult, PsnrCompareFunc, SimpleCompareFunc

    quiet_polygraphy()

    def compared(how: Any, mine: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> Any:
        # Polygraphy takes relative errors against the second result, and the peak of the PSNR from the first.
        return how(IterationResult({name: mine}), IterationResult({name: theirs}))[name]

    simple = SimpleCompareFunc(check_error_stat="quantile", error_quantile=_QUANTILE)
    cosine, psnr = CosineSimilarityCompareFunc(), PsnrCompareFunc()
    images = range(len(reference))
    # Overflow in a diverged model shows as None in the report; NumPy need not warn of it as well.
    with np.errstate(all="ignore"):
        whole = compared(simple, other, reference)
        cosines = [compared(cosine, reference[i : i + 1], other[i : i + 1]).cosine_similarity for i in images]
        psnrs = [compared(psnr, reference[i : i + 1], other[i : i + 1]).psnr for i in images]
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
        cosine_min=_least(cosines),
        cosine_mean=_finite(float(np.mean(cosines))),
        psnr_min_db=_least(psnrs),
    )


def _least(values: list[float]) -> float | None:
    """The smallest; None where it is not finite, or any is NaN."""
    return _finite(float(np.min(values)))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
