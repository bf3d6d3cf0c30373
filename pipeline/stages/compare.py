"""The compare stages: classifiers by class, other networks output by output; the gate compares with the untouched model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from maskplan.engines.base import Classifier
from maskplan.engines.batch_runner import BatchRunner
from maskplan.engines.ort import PLANS_DID_NOT_RUN, OrtEngine
from maskplan.pipeline.core.artifacts import OnnxModel, OutputKind, Provenance
from maskplan.pipeline.core.choices import LOGITS, FloatPrecision
from maskplan.pipeline.core.files import sha256_of
from maskplan.pipeline.core.output_reports import MethodOutputs
from maskplan.pipeline.core.reports import Fidelity, ParityReport
from maskplan.pipeline.data.dataset import Split
from maskplan.pipeline.data.samples import ImageSamples, Samples, noise_samples
from maskplan.pipeline.models.sources import imported_sources
from maskplan.pipeline.parity.by_output import compare_by_output
from maskplan.pipeline.parity.compare import compare as compare_models
from maskplan.pipeline.parity.compare import fidelity
from maskplan.pipeline.parity.compare_networks import judge_networks, output_kinds
from maskplan.pipeline.parity.held_out import held_out_note
from maskplan.pipeline.parity.model_files import OpenedNetwork, open_network
from maskplan.pipeline.parity.options import CompareOptions
from maskplan.pipeline.parity.user_metric import load_metric_module
from maskplan.pipeline.stages.engines import Engines, engine_identity, open_classifier, stand_in_key
from maskplan.pipeline.stages.job import Images, Job, Network
from maskplan.pipeline.stages.onnx_files import row_name

log = logging.getLogger(__name__)

# Images for comparing an engine with its own ONNX file, and noise images for comparing random weights.
_FIDELITY_IMAGES, _NOISE_IMAGES = 32, 32


@dataclass(frozen=True)
class Compared:
    """Both verdicts of the compare stage; the second is None where the engine's plan did not run."""

    parity: ParityReport
    fidelity: Fidelity | None


def compares_by_output(provenance: Provenance, metric: str | None, options: CompareOptions) -> bool:
    """Whether outputs are compared instead of classes: of networks that are no classifiers, and by their limits."""
    return not provenance.classes or metric is not None or options.limits_outputs


def compare(
    job: Job,
    engines: Engines,
    float_precision: FloatPrecision,
    dense: Network,
    sparse: Network,
    rows: Mapping[str, OnnxModel],
    images: Images | None,
    metric: str | None = None,
) -> Compared:
    """Compare the sparse engine with the dense model, with other methods, and with its own ONNX file.

    The gate compares with the untouched dense model: its engine, or its FP32 file where the dense engine is INT8 as well.

    Args:
        job: The run.
        engines: The engines of `dense` and `sparse`.
        float_precision: What the engines run in where they are not INT8.
        dense: The untouched network.
        sparse: The pruned network.
        rows: More networks for the tables of methods, by name.
        images: The data; without it the engines are compared on noise.
        metric: `FILE.py:FUNCTION` of the user's metric, or None.
    """
    provenance, own_onnx = sparse.checkpoint.provenance, sparse.deployed.of(float_precision)
    options = job.recipe.compare
    # Images say nothing about random weights.
    val = images.data.val if images is not None and provenance.trained else None
    if val is None:
        options = replace(options, fixed_images=min(options.fixed_images, _NOISE_IMAGES))
    by_output = compares_by_output(provenance, metric, options)

    def work() -> Compared:
        if by_output:
            return _by_output(engines, own_onnx, dense, sparse, rows, val, options, metric)
        return _by_class(engines, own_onnx, dense, sparse, rows, images if val is not None else None, options)

    inputs = {
        **_key(engines, dense),
        "others": {name: m.sha256 for name, m in rows.items()},
        "val": images.sets.val.key if images and val else None,
        # Whether `select` is held out is read off samples of these parts.
        "shaping": [s.key for s in images.sets.shaping] if images and val and not by_output else None,
        "options": options,
        **({} if metric is None else {"metric": metric_key(metric)}),
    }
    return job.ws.stage("compare", Compared, inputs, work)


def compare_on_select(
    job: Job, engines: Engines, dense: Network, sparse: Network, images: Images | None
) -> ParityReport:
    """Compare the sparse engine with the dense model on `select`, to choose between two engines without reading `val`."""
    provenance = sparse.checkpoint.provenance
    select = images.data.select if images is not None and provenance.trained else None
    options = replace(job.recipe.compare, fixed_images=min(job.recipe.compare.fixed_images, _NOISE_IMAGES))

    def work() -> ParityReport:
        if compares_by_output(provenance, None, options):
            with open_network(_reference(engines, dense)) as first, open_network(engines.sparse.path) as second:
                samples, kinds = _samples(first, select, provenance), output_kinds(first, ())
                return judge_networks(first, second, samples, kinds, None, options, is_noise=select is None)
        with _dense_classifier(engines, dense) as dense_model, open_classifier(engines.sparse) as sparse_model:
            provenances = [engines.dense.provenance, provenance]
            return compare_models(dense_model, sparse_model, provenance.preprocessing, provenances, select, options)

    inputs = {
        **_key(engines, dense),
        "dense": dense.floats.fp32.sha256,
        "select": images.sets.select.key if images and select else None,
        "options": options,
    }
    return job.ws.stage("compare-select", ParityReport, inputs, work)


def metric_key(metric: str) -> list[str]:
    """What identifies a user's metric: the function's name, and the digests of its file and of what that imported."""
    file, _, function = metric.rpartition(":")
    imported = imported_sources(load_metric_module(metric))
    return [function, sha256_of(Path(file)), *(f"{source.name} {source.digest}" for source in imported)]


def _key(engines: Engines, dense: Network) -> dict[str, object]:
    untouched = {} if dense.int8 is None else {"untouched": dense.floats.fp32.sha256}
    pair = [engine_identity(e) for e in (engines.dense, engines.sparse)]
    return {"engines": pair, **untouched, **stand_in_key(engines)}


def _by_class(
    engines: Engines,
    own_onnx: OnnxModel,
    dense: Network,
    sparse: Network,
    rows: Mapping[str, OnnxModel],
    images: Images | None,
    options: CompareOptions,
) -> Compared:
    provenance = sparse.checkpoint.provenance
    preprocessing, val = provenance.preprocessing, images.data.val if images is not None else None
    with contextlib.ExitStack() as stack:
        sparse_model = stack.enter_context(open_classifier(engines.sparse))
        dense_model = stack.enter_context(_dense_classifier(engines, dense))
        parity = compare_models(
            dense_model,
            sparse_model,
            preprocessing,
            [engines.dense.provenance, provenance],
            val,
            options,
            {name: stack.enter_context(_onnx_classifier(model, name)) for name, model in rows.items()},
            sparse_name=row_name(provenance, own_onnx.precision),
        )
        if images is not None and parity.top1_dense is not None:
            note = held_out_note(dense_model, preprocessing, images.data, parity.top1_dense)
            if note is not None:
                log.warning("%s", note)
                parity = replace(parity, notes=(*parity.notes, note))
        if engines.stands_in_for is not None:
            return Compared(replace(parity, notes=(*parity.notes, PLANS_DID_NOT_RUN)), None)
        # Graph optimizations round differently; the reference runs the nodes as they are in the file.
        exact = stack.enter_context(_onnx_classifier(own_onnx, "its ONNX file", optimized=False))
        count = min(options.fixed_images, _FIDELITY_IMAGES)
        return Compared(parity, fidelity(sparse_model, exact, preprocessing, val, count))


def _by_output(
    engines: Engines,
    own_onnx: OnnxModel,
    dense: Network,
    sparse: Network,
    rows: Mapping[str, OnnxModel],
    val: Split | None,
    options: CompareOptions,
    metric: str | None,
) -> Compared:
    provenance = sparse.checkpoint.provenance
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(open_network(_reference(engines, dense)))
        second = stack.enter_context(open_network(engines.sparse.path))
        samples, kinds = _samples(first, val, provenance), output_kinds(first, ())
        parity = judge_networks(first, second, samples, kinds, metric, options, is_noise=val is None)
        methods = tuple(
            MethodOutputs(name, compare_by_output(_runner(first), other, samples, kinds).outputs)
            for name, other in ((name, stack.enter_context(_onnx_runner(m.path, name))) for name, m in rows.items())
        )
        if methods:
            methods += (MethodOutputs(row_name(provenance, own_onnx.precision), parity.by_output),)
        parity = replace(parity, method_outputs=methods)
        if engines.stands_in_for is not None:
            return Compared(replace(parity, notes=(*parity.notes, PLANS_DID_NOT_RUN)), None)
        # Graph optimizations round differently; the reference runs the nodes as they are in the file.
        exact = stack.enter_context(_onnx_runner(own_onnx.path, "its ONNX file", optimized=False))
        few = samples.sample(min(options.fixed_images, _FIDELITY_IMAGES), 0)
        return Compared(parity, _fidelity(exact, _runner(second), few, kinds))


def _fidelity(exact: BatchRunner, engine: BatchRunner, samples: Samples, kinds: Sequence[OutputKind]) -> Fidelity:
    outputs = compare_by_output(exact, engine, samples, kinds).outputs
    finite = all(o.max_abs_diff is not None and o.cosine_min is not None for o in outputs)
    agreements = [o.agreement for o in outputs if o.kind == LOGITS and o.agreement is not None]
    return Fidelity(
        images=len(samples),
        max_abs_diff=max(o.max_abs_diff or 0.0 for o in outputs) if finite else None,
        cosine_min=min(o.cosine_min or 0.0 for o in outputs) if finite else None,
        agreement=min(agreements, default=None),
    )


def _samples(network: OpenedNetwork, split: Split | None, provenance: Provenance) -> Samples:
    """Images of the data, or noise, for a network of maskplan's own, which has one image input."""
    preprocessing, (spec,) = provenance.preprocessing, network.engine.inputs
    if split is not None:
        return ImageSamples(split, preprocessing, spec)
    size = (preprocessing.channels, preprocessing.height, preprocessing.width)
    return noise_samples([spec], _NOISE_IMAGES, size, network.name)


def _runner(network: OpenedNetwork) -> BatchRunner:
    return BatchRunner(network.engine, network.name, network.profiles)


def _onnx_runner(path: Path, name: str, *, optimized: bool = True) -> BatchRunner:
    return BatchRunner(OrtEngine(path, optimized=optimized), name)


def _reference(engines: Engines, dense: Network) -> Path:
    """The untouched dense model: its engine, or its FP32 file where the dense engine is INT8 as well."""
    return engines.dense.path if dense.int8 is None else dense.floats.fp32.path


def _dense_classifier(engines: Engines, dense: Network) -> contextlib.AbstractContextManager[Classifier]:
    if dense.int8 is None:
        return open_classifier(engines.dense)
    return _onnx_classifier(dense.floats.fp32, "dense")


def _onnx_classifier(model: OnnxModel, name: str, *, optimized: bool = True) -> Classifier:
    return Classifier(OrtEngine(model.path, optimized=optimized), name)
