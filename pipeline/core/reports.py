"""Verdicts and measurements: frozen records with numbers. `passed` says whether a check or gate passed."""

from __future__ import annotations

from dataclasses import dataclass, field

from maskplan.pipeline.core.choices import PASS, CheckVerdict, GateVerdict, WeightState
from maskplan.pipeline.core.output_reports import MethodOutputs, MetricParity, OutputCloseness, OutputParity


@dataclass(frozen=True)
class Violation:
    """The first group that breaks N:M: the index of its first element, and its values."""

    index: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class WeightVerdict:
    """One use of one weight.

    Attributes:
        name: The initializer's name.
        node: The node that uses it.
        op: `Conv`, `ConvTranspose`, `Gemm` or `MatMul`.
        shape: As stored.
        axis: The stored axis along which the groups run; None if ineligible.
        dtype: As stored.
        verdict: `conforming`, `violating`, `dense_by_choice`, `ineligible`, or `unknown` if it cannot be read.
        reason: Why it is ineligible, unknown, or dense without being asked for; None otherwise.
        groups: Groups of M.
        violating_groups: Those with more than N non-zeros.
        negative_zeros: Elements that are -0.0; they count as zero.
        first_violation: In order of storage.
        likely_speedup: A hint, not evidence: C and K are at least 256 and the op is ungrouped.
        hint: The likely cause of a violation or of ineligibility, if one is known.
    """

    name: str
    node: str
    op: str
    shape: tuple[int, ...]
    axis: int | None
    dtype: str
    verdict: WeightState
    reason: str | None
    groups: int
    violating_groups: int
    negative_zeros: int
    first_violation: Violation | None
    likely_speedup: bool
    hint: str | None = None


@dataclass(frozen=True)
class ConformanceReport:
    """Whether all weights that must be N:M are; a model without such a weight fails, one with unreadable ones is unknown."""

    verdict: CheckVerdict
    reason: str | None
    pattern: str
    eligible: int
    conforming: int
    violating: int
    dense_by_choice: int
    ineligible: int
    weights: tuple[WeightVerdict, ...]
    unknown: int = 0

    @property
    def passed(self) -> bool:
        return self.verdict == PASS


@dataclass(frozen=True)
class Fidelity:
    """An engine against its own ONNX file, run unoptimized by ONNX Runtime; `agreement` is None where nothing is logits."""

    images: int
    max_abs_diff: float | None
    cosine_min: float | None
    agreement: float | None


@dataclass(frozen=True)
class MethodRow:
    """Accuracy of one way to choose masks, in percent over the same images; drops in points against the dense model."""

    name: str
    top1: float
    top5: float
    drop: float
    drop_ci95: tuple[float, float]


@dataclass(frozen=True)
class Flips:
    """Images whose first choice changed between two models.

    Attributes:
        changed: All of them, with or without a label.
        right_to_wrong: The dense model was right.
        wrong_to_right: The sparse model is.
        wrong_to_wrong: Neither is, and they differ.
    """

    changed: int
    right_to_wrong: int
    wrong_to_right: int
    wrong_to_wrong: int


@dataclass(frozen=True)
class ClassDrop:
    """One class: accuracies in percent over its own images, drop in points."""

    name: str
    images: int
    top1_dense: float
    top1_sparse: float
    drop: float


@dataclass(frozen=True)
class Check:
    """One threshold of the gate and its result.

    Attributes:
        name: The option: `max_top1_drop`, `min_agreement` and so on.
        limit: Its value.
        value: The measured value, in the limit's unit; None if it could not be measured.
        judged: The number compared with the limit: `value`, or with `--use-ci` the worse end of its 95% interval.
        passed: None if the threshold could not be evaluated.
        message: Why it failed, or what was found.
        images_needed: How many images equal models would need to pass, if there were too few; None otherwise.
    """

    name: str
    limit: float
    value: float | None
    judged: float | None
    passed: bool | None
    message: str
    images_needed: int | None = None


@dataclass(frozen=True)
class DriftRow:
    """One number now and in an earlier report; `change` is now minus then, None where either is missing."""

    name: str
    before: float | None
    now: float | None
    change: float | None


@dataclass(frozen=True)
class LayerDifference:
    """How much one layer's output differs from the dense model's, on the fixed images.

    Attributes:
        node: The layer's name in both graphs.
        op: Its ONNX op.
        tensor: The output's name in the dense graph.
        relative: Norm of the difference over norm of the dense output, all images together; None where not finite.
        cosine_min: Smallest cosine similarity of one image's output; None where not finite.
        channel: As `relative`, of the worst channel over an average one: shows one bad filter of a wide layer.
    """

    node: str
    op: str
    tensor: str
    relative: float | None
    cosine_min: float | None
    channel: float | None = None


@dataclass(frozen=True)
class DepthReport:
    """Where the outputs of two models start to differ.

    Attributes:
        images: How many of the fixed images both ran on.
        tolerance: The relative difference above which outputs count as different.
        layers: From input to output, those that both graphs have.
        first: Node of the first layer beyond the tolerance; None where there is none.
        unmatched: Layers that only one of the graphs has.
    """

    images: int
    tolerance: float
    layers: tuple[LayerDifference, ...]
    first: str | None
    unmatched: tuple[str, ...]


@dataclass(frozen=True)
class ParityReport:
    """Whether the sparse model may replace the dense one.

    Attributes:
        verdict: `pass`, `fail` or `not_applicable`, the last two with a reason.
        images: Labeled images compared.
        top1_dense: Percent; the four accuracies are None without labeled images.
        top1_drop: Points; positive if the sparse model is worse.
        drop_ci95: Paired interval of the drop (Newcombe 1998, method 10), points.
        agreement: Percent of images where both models' first choice is the same; None without images.
        max_abs_diff: Of the outputs, over the fixed images; None, as `cosine_min`, when they are not finite.
        cosine_min: Smallest cosine similarity of an image's outputs, over the fixed images.
        methods: Accuracy by method, where baselines were made.
        unlabeled_images: Images without a label: they count for agreement and flips only.
        top5_drop: Points, with `top5_drop_ci95` as `top1_drop`.
        flips: Changed first choices by direction; None without images.
        flip_rate: Percent of images whose first choice changed.
        flip_rate_ci95: Its interval (Clopper and Pearson 1934), percent.
        mcnemar_p: Two-sided p of McNemar's exact test: how likely flips this lopsided are between equal accuracies.
        classes: By class, those that occur.
        outputs: Differences of the outputs on the fixed images.
        checks: One for each threshold.
        use_ci: Whether thresholds were compared with the worse ends of intervals.
        notes: What a reader should know: unlabeled images, outputs matched by order, few images.
        images_sha256: Digest of the image set; None if it was not computed.
        drift: Against an earlier report, where one was given.
        depth: Where the models start to differ, if requested.
        by_output: Of networks that are not classifiers, or where a metric is given: every output over all samples.
        metric: The user's own, if one was given.
        method_outputs: As `methods`, of networks that are compared by output.
    """

    verdict: GateVerdict
    reason: str | None
    images: int
    top1_dense: float | None
    top5_dense: float | None
    top1_sparse: float | None
    top5_sparse: float | None
    top1_drop: float | None
    drop_ci95: tuple[float, float] | None
    agreement: float | None
    max_abs_diff: float | None
    cosine_min: float | None
    max_top1_drop: float
    methods: tuple[MethodRow, ...] = ()
    unlabeled_images: int = 0
    top5_drop: float | None = None
    top5_drop_ci95: tuple[float, float] | None = None
    flips: Flips | None = None
    flip_rate: float | None = None
    flip_rate_ci95: tuple[float, float] | None = None
    mcnemar_p: float | None = None
    classes: tuple[ClassDrop, ...] = ()
    outputs: tuple[OutputCloseness, ...] = ()
    checks: tuple[Check, ...] = ()
    use_ci: bool = False
    notes: tuple[str, ...] = ()
    images_sha256: str | None = None
    drift: tuple[DriftRow, ...] = ()
    depth: DepthReport | None = None
    by_output: tuple[OutputParity, ...] = field(default=(), metadata={"omit_empty": True})
    metric: MetricParity | None = field(default=None, metadata={"omit_empty": True})
    method_outputs: tuple[MethodOutputs, ...] = field(default=(), metadata={"omit_empty": True})

    @property
    def passed(self) -> bool:
        return self.verdict == PASS


@dataclass(frozen=True)
class CalibrationReport:
    """How a model was quantized to INT8.

    Attributes:
        method: How ranges were computed from the measured activations.
        images: Training images that ranges were measured on; 0 if ranges were imported.
        ranges_from: `images`, `cache` or `imported`.
        quantized_layers: How many.
        in_float: Layers in higher precision, and why.
        select_drop: Points of top-1 lost by quantization on the `select` part; None without a budget.
        select_images: Images of that part.
    """

    method: str
    images: int
    ranges_from: str
    quantized_layers: int
    in_float: tuple[tuple[str, str], ...]
    select_drop: float | None
    select_images: int


@dataclass(frozen=True)
class GpuClocks:
    """The GPU's clocks during a measurement.

    Attributes:
        sm_mhz: Median clock of the multiprocessors.
        sm_lowest_mhz: The lowest seen.
        memory_mhz: Median clock of the memory.
        throttle_reasons: Why the clocks were reduced, such as power or temperature; empty if they were not.
        celsius: Highest temperature.
        watts: Highest power draw.
    """

    samples: int
    sm_mhz: float
    sm_lowest_mhz: float
    memory_mhz: float
    throttle_reasons: tuple[str, ...]
    celsius: float
    watts: float


@dataclass(frozen=True)
class Latency:
    """One engine at one batch size. Percentiles are of the host's wall clock, including copies, as a caller sees it.

    Attributes:
        images_per_s: At the median.
        gpu_ms: Median time on the GPU by events, without copies; None where there is no GPU clock.
        copies_ms: Median time of the copies to the GPU and back, by events.
        host_ms: Mean of the wall clock.
        polygraphy_host_ms: The same, as measured by Polygraphy's runner.
    """

    p50_ms: float
    p90_ms: float
    p99_ms: float
    images_per_s: float
    gpu_ms: float | None
    copies_ms: float | None
    host_ms: float
    polygraphy_host_ms: float


@dataclass(frozen=True)
class BatchTiming:
    """Three engines timed in turn at one batch size.

    Attributes:
        pruned: Pruned weights without the sparse flag.
        sparse: Pruned weights with it; the same file as `pruned` on a runtime without this flag.
        by: The clock of `speedup`: `gpu` if every engine has GPU times, else `host`.
        speedup: Dense median over sparse median.
        ratio_ci95: Bootstrap interval of `speedup`.
        build_spread: |pruned median / sparse median - 1| if both are the same file: the spread of two loads of one engine.
        clocks: Of the GPU during the measurement; None without a GPU.
    """

    batch: int
    repeats: int
    dense: Latency
    pruned: Latency | None
    sparse: Latency
    by: str
    speedup: float
    ratio_ci95: tuple[float, float]
    build_spread: float | None
    clocks: GpuClocks | None = None


@dataclass(frozen=True)
class TimingReport:
    """Interleaved latencies.

    Attributes:
        threads: CPUs that the process may use, which limits the threads of ONNX Runtime.
        note: What the times can and cannot show.
        batches: By batch size.
        affinity: Those CPUs by number, as `0-3,8`.
    """

    device: str
    threads: int
    note: str
    batches: tuple[BatchTiming, ...]
    affinity: str = ""
