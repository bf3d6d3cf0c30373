"""The compare stage for networks that are not classifiers of images: any inputs, any outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from maskplan.engines.batch_runner import BatchRunner
from maskplan.pipeline.core.artifacts import ImageSet, OutputKind
from maskplan.pipeline.core.choices import LOGITS
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.output_kinds import guess_kinds, parse_kinds
from maskplan.pipeline.core.reports import ParityReport
from maskplan.pipeline.data.image_sets import require_disjoint
from maskplan.pipeline.data.samples import ImageOptions, Samples, noise_samples, open_samples
from maskplan.pipeline.parity.by_output import compare_by_output, require_same_interface
from maskplan.pipeline.parity.model_files import OpenedNetwork
from maskplan.pipeline.parity.network_verdict import TOP1, network_report
from maskplan.pipeline.parity.options import CompareOptions
from maskplan.pipeline.parity.user_metric import Metric, load_metric, measure

_NOISE_SAMPLES = 32


@dataclass(frozen=True)
class NetworkOptions:
    """What `compare` is told about a network.

    Attributes:
        data: Images or arrays; None compares on noise.
        outputs: `NAME:logits[:AXIS]` or `NAME:values`, where the guess is wrong.
        metric: `FILE.py:FUNCTION`, or None.
        images: How image files become an input.
    """

    data: Path | None = None
    outputs: tuple[str, ...] = ()
    metric: str | None = None
    images: ImageOptions = field(default_factory=ImageOptions)


def compares_outputs(
    networks: Sequence[OpenedNetwork], network_options: NetworkOptions, options: CompareOptions
) -> bool:
    """Whether outputs are compared instead of classes: of networks that are no classifiers, on arrays, by their limits."""
    data = network_options.data
    of_arrays = data is not None and (data.suffix in (".npz", ".npy") or any(data.glob("*.np[yz]")))
    is_told = bool(network_options.metric or network_options.outputs) or options.limits_outputs
    return of_arrays or is_told or not all(n.classifies_images for n in networks)


def compare_networks(
    dense: OpenedNetwork,
    sparse: OpenedNetwork,
    network_options: NetworkOptions,
    options: CompareOptions,
    used: Sequence[ImageSet] = (),
) -> ParityReport:
    """Compare two networks on samples, output by output, and by a metric if there is one; `used` made the sparse network.

    Raises:
        InputError: The data, the outputs or the metric do not fit the networks, or the data was used to make one of them.
    """
    require_same_interface(dense.engine, sparse.engine, (dense.name, sparse.name))
    samples, is_noise = _samples(dense, network_options)
    image_set = None if is_noise else samples.identify()
    if image_set is not None:
        provenances = [dense.provenance, sparse.provenance]
        require_disjoint(image_set, [*used, *(s for p in provenances if p is not None for s in p.image_sets)])
    kinds = output_kinds(dense, network_options.outputs)
    report = judge_networks(dense, sparse, samples, kinds, network_options.metric, options, is_noise=is_noise)
    return replace(report, images_sha256=image_set.sha256 if image_set is not None else None)


def judge_networks(
    dense: OpenedNetwork,
    sparse: OpenedNetwork,
    samples: Samples,
    kinds: tuple[OutputKind, ...],
    metric_spec: str | None,
    options: CompareOptions,
    *,
    is_noise: bool,
) -> ParityReport:
    """Run two networks on the same samples and judge them, output by output, and by a metric if there is one.

    Raises:
        InputError: The outputs or the metric do not fit the networks.
    """
    ranks = {spec.name: len(spec.shape) for spec in dense.engine.outputs}
    metric, name = _metric(metric_spec, kinds, ranks, samples)
    first, second = (BatchRunner(net.engine, net.name, net.profiles) for net in (dense, sparse))
    compared = compare_by_output(first, second, samples, kinds, keep=metric is not None)
    measured = None
    if metric is not None and compared.dense is not None and compared.sparse is not None:
        measured = measure(metric, name, compared.dense, compared.sparse, samples.targets, len(samples))
    provenances = [dense.provenance, sparse.provenance]
    return network_report(compared, measured, len(samples), provenances, options, is_noise=is_noise)


def output_kinds(network: OpenedNetwork, given: Sequence[str]) -> tuple[OutputKind, ...]:
    """The kinds of a network's outputs: given, else recorded, else guessed."""
    engine, provenance = network.engine, network.provenance
    recorded = {kind.name: kind for kind in provenance.outputs} if provenance is not None else {}
    guessed = tuple(recorded.get(kind.name, kind) for kind in guess_kinds(engine.inputs, engine.outputs))
    return parse_kinds(given, guessed, network.name)


def _samples(network: OpenedNetwork, network_options: NetworkOptions) -> tuple[Samples, bool]:
    """The samples, and whether they are noise."""
    inputs, provenance = network.engine.inputs, network.provenance
    images = network_options.images
    if provenance is not None:
        images = replace(images, preprocessing=provenance.preprocessing)
    if network_options.data is None:
        shape = images.shape
        if shape is None and images.preprocessing is not None and len(inputs) == 1 and len(inputs[0].shape) == 4:
            shape = (images.preprocessing.channels, images.preprocessing.height, images.preprocessing.width)
        return noise_samples(inputs, _NOISE_SAMPLES, shape, network.name), True
    return open_samples(network_options.data, "val", inputs, images, network.name), False


def _metric(
    spec: str | None, kinds: Sequence[OutputKind], axes: Mapping[str, int], samples: Samples
) -> tuple[Metric | None, str]:
    """The user's metric, or top-1 where the samples are labeled and the only output holds logits of images."""
    if spec is not None:
        if not len(samples):
            raise InputError("no samples for the metric", fix="give --data")
        return load_metric(spec), spec.rpartition(":")[2]
    # Logits of pixels have no label each, even where the images are in class folders; 0 axes are unknown ones.
    is_classifier = len(kinds) == 1 and kinds[0].kind == LOGITS and axes[kinds[0].name] in (0, 2)
    if "labels" in samples.targets and is_classifier:
        name = kinds[0].name
        return lambda outputs, targets: _top1(outputs[name], targets["labels"]), TOP1
    return None, ""


def _top1(logits: Any, labels: Any) -> Any:
    rows = np.asarray(logits)
    if rows.ndim != 2 or np.asarray(labels).shape != (len(rows),):
        raise InputError(
            "the labels do not fit the logits",
            found=f"logits {rows.shape}, labels {np.asarray(labels).shape}",
            fix="give one class number for each sample, or --metric FILE.py:FUNCTION",
        )
    return 100.0 * (rows.argmax(axis=1) == labels)
