"""How close the outputs of two networks are: records with numbers for each output, and for the user's metric."""

from __future__ import annotations

from dataclasses import dataclass

from maskplan.pipeline.core.choices import OutputType


@dataclass(frozen=True)
class OutputCloseness:
    """One output of two models on the fixed images; a number that is not finite is None.

    Attributes:
        name: The output, as the dense model calls it.
        images: How many fixed images.
        max_abs: Absolute differences, over all elements: largest, mean, median, 99th percentile.
        max_rel: Differences as shares of the dense model's element, in the same four.
        cosine_min: Smallest cosine similarity of one image's output.
        cosine_mean: Mean over the images.
        psnr_min_db: Smallest peak signal-to-noise ratio of one image's output; None also where all are equal.
    """

    name: str
    images: int
    max_abs: float | None
    mean_abs: float | None
    median_abs: float | None
    p99_abs: float | None
    max_rel: float | None
    mean_rel: float | None
    median_rel: float | None
    p99_rel: float | None
    cosine_min: float | None
    cosine_mean: float | None
    psnr_min_db: float | None


@dataclass(frozen=True)
class OutputParity:
    """One output of a network of any kind, over all samples of the comparison; a number that is not finite is None.

    Attributes:
        name: The output, as the dense model calls it.
        kind: `logits` or `values`.
        samples: How many were compared.
        relative_error: Root of the sum of squared differences over the sum of squares of the dense output.
        relative_error_ci95: Its bootstrap interval over samples; None, as the other intervals, for fewer than two.
        sqnr_db: The same as a signal to noise ratio, -20 log10 of it; None also if all are equal.
        sqnr_ci95_db: Its interval.
        cosine_min: Smallest cosine similarity of one sample's output.
        max_abs_diff: Largest difference of an element.
        agreement: Percent of places, such as images or pixels, whose largest logit is of the same class; None for values.
        agreement_ci95: Its interval: exact where there is one place a sample (Clopper and Pearson 1934), else bootstrap.
        unmatched: Samples whose output has another size in the sparse model; they are in no other number.
    """

    name: str
    kind: OutputType
    samples: int
    relative_error: float | None
    relative_error_ci95: tuple[float, float] | None
    sqnr_db: float | None
    sqnr_ci95_db: tuple[float, float] | None
    cosine_min: float | None
    max_abs_diff: float | None
    agreement: float | None = None
    agreement_ci95: tuple[float, float] | None = None
    unmatched: int = 0


@dataclass(frozen=True)
class MethodOutputs:
    """The outputs of a network that was pruned in another way, against the same dense network on the same samples."""

    name: str
    outputs: tuple[OutputParity, ...]


@dataclass(frozen=True)
class MetricParity:
    """A metric of the user's, computed on the outputs of both models for the same samples; higher is better.

    Attributes:
        name: Of its function.
        drop: Dense minus sparse, in the metric's unit.
        drop_ci95: Paired bootstrap interval over samples.
    """

    name: str
    samples: int
    dense: float
    sparse: float
    drop: float
    drop_ci95: tuple[float, float] | None
