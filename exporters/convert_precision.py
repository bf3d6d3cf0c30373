"""FP16 copies of ONNX files of any tool, compared with the FP32 file before they are written."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from maskplan.exporters.external_data import load_external_data
from maskplan.exporters.fp16_simulation import simulate_fp16
from maskplan.exporters.half_range import outside_fp16
from maskplan.exporters.metadata import describe_onnx, load_onnx, precision_of, read_provenance
from maskplan.exporters.precision import convert_to_fp16, prepare_for_fp16
from maskplan.exporters.run_shapes import baked_batch, set_shapes
from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.choices import BF16, FP16
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.files import write_atomically
from maskplan.pipeline.core.ort_session import open_session
from maskplan.pipeline.core.validation import above, at_least

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

# Samples per run where the batch is dynamic: activations of all nodes are kept in memory at once.
_BATCH = 4
# The file itself runs on the constant samples and the first others; on a CPU it hides rounding between nodes.
_RUNS_OF_FILE = 8


@dataclass(frozen=True)
class ConvertOptions:
    """How an ONNX file is converted and compared.

    Attributes:
        keep_fp32: Patterns (globs) of names of nodes or tensors that stay FP32.
        tolerance: Largest allowed difference of a float output, relative to its largest magnitude in FP32.
        min_agreement: Smallest allowed share of equal elements, or rows, of an integer output.
        images: Samples to compare on.
        seed: Of random inputs, and of the choice of images.
        shapes: Shapes of inputs by name, for those with dynamic dimensions other than the first.
    """

    keep_fp32: tuple[str, ...] = ()
    tolerance: float = 5e-2
    min_agreement: float = 0.9
    images: int = 64
    seed: int = 0
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        above(0, tolerance=self.tolerance)
        at_least(0, min_agreement=self.min_agreement)
        at_least(1, images=self.images)


@dataclass
class OutputDifference:
    """How one output of the FP16 file differs from that of the FP32 file.

    Attributes:
        name: Of the output.
        difference: Largest difference, relative to the output's largest magnitude in FP32; of floats.
        agreement: Mean share of equal elements, or of common rows where the shapes differ; 1 for floats of equal shape.
        worst_input: Where the largest difference was found.
        problem: What is wrong, or None.
    """

    name: str
    difference: float = 0.0
    agreement: float = 1.0
    worst_input: str = ""
    problem: str | None = None


@dataclass(frozen=True)
class ConversionReport:
    """The result of a conversion.

    Attributes:
        passed: Whether all outputs are within the bounds; otherwise no file was written.
        samples: Number of samples compared, constant ones included.
        inputs: What they are: `random` or `images`.
        outputs: The differences by output.
        in_fp32: Nodes that stay FP32, with their reasons.
        changed: Constants that were clamped and nodes that were folded.
    """

    passed: bool
    samples: int
    inputs: str
    outputs: tuple[OutputDifference, ...]
    in_fp32: Mapping[str, str]
    changed: tuple[str, ...]

    @property
    def problems(self) -> list[str]:
        """What is wrong with each output that is not within the bounds."""
        return [f"{output.name}: {output.problem}" for output in self.outputs if output.problem is not None]


def convert_precision(
    path: Path, out: Path, options: ConvertOptions, images: Iterable[npt.NDArray[np.float32]] | None = None
) -> ConversionReport:
    """Write an FP16 copy of an FP32 file, unless its outputs differ too much from those of the FP32 file.

    Both files run in ONNX Runtime on the same samples: `images`, or random numbers by a seed; and always a black and a white
    image and one with a single pixel, or zeros, ones and a single one. For the FP16 file every value is rounded to FP16, as
    on a GPU. Activations that overflow FP16 on the samples stay FP32.

    Args:
        path: An FP32 file, with or without Q/DQ, with or without external data.
        out: The file to write, without external data.
        options: What stays FP32, and the bounds.
        images: Preprocessed batches (N, channels, H, W) for the only input.

    Raises:
        InputError: The file cannot be read, converted or run, or is not FP32; a pattern matches nothing; an input's shape is
            unknown; the weights exceed 2 GB.
    """
    model = _load(path)
    if (found := baked_batch(describe_onnx(path, model), model)) is not None:
        set_shapes(model, found.inputs, found.outputs)
    samples = list(_samples(model, path, options, images))
    prepared, changed = prepare_for_fp16(model)
    del model  # of up to 2 GB, as are the models below
    ranges = _measure_ranges(prepared, path, samples)
    half = convert_to_fp16(prepared, outside_fp16(prepared, ranges), options.keep_fp32)
    del prepared
    outputs = _compare(half.model, path, samples, options)
    passed = all(output.problem is None for output in outputs)
    if passed:
        write_atomically(out, half.model.SerializeToString(deterministic=True))
    count = sum(_samples_in(feeds) for _, feeds in samples)
    return ConversionReport(
        passed, count, "random" if images is None else "images", outputs, half.in_fp32, (*changed, *half.changed)
    )


def _load(path: Path) -> onnx.ModelProto:
    model = load_onnx(path)
    if (precision := precision_of(model)) in (FP16, BF16):
        raise InputError("the file is not FP32", where=path, found=precision, fix="give the FP32 file")
    try:
        load_external_data(model, path.parent, where=path)
    except InputError as error:
        if "2 GB" not in str(error.found):
            raise
        fix = "export it in FP16 where it is made, or split it into files below 2 GB"
        raise InputError(error.what, where=path, found=error.found, fix=fix) from error
    return model


def _samples(
    model: onnx.ModelProto, path: Path, options: ConvertOptions, images: Iterable[npt.NDArray[np.float32]] | None
) -> Iterator[tuple[str, Feeds]]:
    """Inputs of the model, with descriptions."""
    provenance = read_provenance(model, path)
    preprocessing = provenance.preprocessing if provenance is not None else None
    stored = {tensor.name for tensor in model.graph.initializer}
    values = [value for value in model.graph.input if value.name not in stored]
    if unknown := options.shapes.keys() - {value.name for value in values}:
        known = listed(value.name for value in values)
        raise InputError(
            "a shape is given for an unknown input", found=listed(sorted(unknown)), fix=f"inputs are {known}"
        )
    for kind in ("black", "white", "one pixel"):
        yield kind, {value.name: _constant_sample(value, kind, options, preprocessing) for value in values}
    if images is not None:
        yield from _image_samples(values, path, options, images)
        return
    generator = np.random.default_rng(options.seed)
    done = 0
    while done < options.images:
        batch = min(_BATCH, options.images - done)
        feeds = {value.name: _random_sample(value, _shape(value, batch, options), generator) for value in values}
        yield f"random sample {done}", feeds
        done += _samples_in(feeds)


def _samples_in(feeds: Feeds) -> int:
    """The batch size, if the first input has a batch."""
    first = next(iter(feeds.values()), None)
    return max(1, len(first)) if first is not None and first.ndim > 1 else 1


def _image_samples(
    values: list[onnx.ValueInfoProto],
    path: Path,
    options: ConvertOptions,
    images: Iterable[npt.NDArray[np.float32]],
) -> Iterator[tuple[str, Feeds]]:
    if len(values) != 1:
        found = f"{len(values)} inputs"
        raise InputError("images are for models with one input", where=path, found=found, fix="omit --data")
    (value,) = values
    done = 0
    for batch in images:
        size = _shape(value, min(_BATCH, len(batch)), options)[0]
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            # A model of a fixed batch gets its last image several times.
            part = np.concatenate([part, np.repeat(part[-1:], max(0, size - len(part)), axis=0)])
            fixed = value.type.tensor_type.shape.dim[0].dim_value > 0
            yield f"image {done}", {value.name: part if fixed else batch[start : start + size]}
            done += size


def _shape(value: onnx.ValueInfoProto, batch: int, options: ConvertOptions) -> tuple[int, ...]:
    if value.name in options.shapes:
        return options.shapes[value.name]
    dims = [
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in value.type.tensor_type.shape.dim
    ]
    if dims and dims[0] is None:
        dims[0] = batch
    if not value.type.tensor_type.HasField("shape") or None in dims:
        text = "x".join("?" if d is None else str(d) for d in dims)
        raise InputError(
            "an input's shape is unknown",
            where=value.name,
            found=text or "no shape",
            fix=f"give --shape {value.name}:1x3x224x224, with the input's own numbers",
        )
    return tuple(d for d in dims if d is not None)


def _constant_sample(
    value: onnx.ValueInfoProto, kind: str, options: ConvertOptions, preprocessing: Preprocessing | None
) -> Array:
    shape = _shape(value, 1, options)
    dtype = _dtype(value)
    is_image = len(shape) == 4 and preprocessing is not None and shape[1] == preprocessing.channels
    mean = np.reshape(preprocessing.mean, (-1, 1, 1)) if is_image and preprocessing is not None else 0.0
    std = np.reshape(preprocessing.std, (-1, 1, 1)) if is_image and preprocessing is not None else 1.0
    pixels = np.ones(shape) if kind == "white" else np.zeros(shape)
    if kind == "one pixel" and pixels.size:
        # The middle of the axes after batch and channels; the first element of a vector.
        pixels.reshape(*shape[:2], -1)[..., _middle(shape[2:])] = 1
    # Arithmetic makes numbers of arrays without axes.
    return np.asarray((pixels - mean) / std if np.issubdtype(dtype, np.floating) else pixels, dtype)


def _middle(shape: tuple[int, ...]) -> int:
    """The position of the middle element in a flat array of a shape."""
    return int(np.ravel_multi_index([size // 2 for size in shape], shape)) if shape else 0


def _random_sample(value: onnx.ValueInfoProto, shape: tuple[int, ...], generator: np.random.Generator) -> Array:
    dtype = _dtype(value)
    if np.issubdtype(dtype, np.floating):
        return np.asarray(generator.normal(size=shape), dtype)
    # Indices, masks and truth values: these are valid in any network.
    return np.asarray(generator.integers(0, 2, shape), dtype)


def _dtype(value: onnx.ValueInfoProto) -> np.dtype[Any]:
    kind = value.type.tensor_type.elem_type
    if kind in (TensorProto.UNDEFINED, TensorProto.STRING):
        raise InputError(
            "an input cannot be sampled", where=value.name, found="not a tensor of numbers", fix="convert another file"
        )
    dtype: np.dtype[Any] = np.dtype(helper.tensor_dtype_to_np_dtype(kind))
    return dtype


def _measure_ranges(model: onnx.ModelProto, path: Path, samples: list[tuple[str, Feeds]]) -> dict[str, float]:
    """The largest finite magnitude of each float value; ONNX Runtime's FP16 kernels on the CPU would hide an overflow."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    known = {output.name for output in probe.graph.output}
    probe.graph.output.extend(
        onnx.ValueInfoProto(name=name)
        for node in probe.graph.node
        if node.op_type != "Constant"
        for name in node.output
        if name and name not in known
    )
    session = open_session(probe.SerializeToString(), path, optimized=False, quiet=True)
    names = [output.name for output in session.get_outputs() if output.type == "tensor(float)"]
    ranges = dict.fromkeys(names, 0.0)
    for _, feeds in samples:
        for name, value in zip(names, session.run(names, dict(feeds)), strict=True):
            ranges[name] = max(ranges[name], float(np.abs(value).max(initial=0, where=np.isfinite(value))))
    return ranges


class _Comparison:
    """The differences of each output from its FP32 values, over all samples."""

    def __init__(self, names: list[str]) -> None:
        self._results = {name: OutputDifference(name) for name in names}
        self._largest = dict.fromkeys(names, 0.0)
        self._agreements: dict[str, list[float]] = {name: [] for name in names}

    def add(self, text: str, name: str, right: Array, value: Array, samples: int) -> None:
        """Compare one output on one sample."""
        result = self._results[name]
        if right.shape != value.shape or not np.issubdtype(right.dtype, np.floating):
            self._agreements[name] += [_agreement(right, value)] * samples
            return
        self._agreements[name] += [1.0] * samples
        finite = np.isfinite(right)
        self._largest[name] = max(self._largest[name], float(np.abs(right).max(initial=0, where=finite)))
        if result.problem is None and not np.array_equal(finite, np.isfinite(value)):
            result.problem = f"{'NaN' if np.isnan(value).any() else 'infinity'} on {text}, where FP32 has numbers"
        with np.errstate(invalid="ignore"):
            difference = float(np.abs(value - right).max(initial=0, where=finite & np.isfinite(value)))
        if difference > result.difference:
            result.difference, result.worst_input = difference, text

    def results(self, options: ConvertOptions) -> tuple[OutputDifference, ...]:
        """The differences relative to the outputs, and what exceeds the bounds."""
        for name, result in self._results.items():
            result.difference /= max(self._largest[name], 1e-6)
            agreements = self._agreements[name]
            result.agreement = float(np.mean(agreements)) if agreements else 1.0
            if result.problem is None and result.difference > options.tolerance:
                result.problem = (
                    f"differs by {result.difference:.2g} of its largest value on {result.worst_input};"
                    f" {options.tolerance:g} is allowed"
                )
            if result.problem is None and result.agreement < options.min_agreement:
                result.problem = f"{result.agreement:.1%} is equal; {options.min_agreement:.1%} is required"
        return tuple(self._results.values())


def _compare(
    half: onnx.ModelProto, path: Path, samples: list[tuple[str, Feeds]], options: ConvertOptions
) -> tuple[OutputDifference, ...]:
    """Compare the FP32 file with the FP16 file, and with its arithmetic as a GPU rounds it."""
    expected_session = open_session(path)
    # Not optimized: on some FP16 transformers ONNX Runtime 1.31's optimizer ends the process.
    half_session = open_session(
        half.SerializeToString(),
        path,
        optimized=False,
        what="ONNX Runtime does not accept the FP16 file",
        fix="keep the nodes that it names in FP32 with --keep-fp32",
    )
    simulated = open_session(simulate_fp16(half).SerializeToString(), path, optimized=False, quiet=True)
    names = [output.name for output in expected_session.get_outputs()]
    as_gpu, as_file = _Comparison(names), _Comparison(names)
    for number, (text, feeds) in enumerate(samples):
        expected = expected_session.run(names, dict(feeds))
        runs = [(simulated, as_gpu), (half_session, as_file)]
        for session, comparison in runs if number < _RUNS_OF_FILE else runs[:1]:
            for name, right, value in zip(names, expected, session.run(names, dict(feeds)), strict=True):
                # Sequences stay FP32 with the nodes that make them.
                if isinstance(right, np.ndarray):
                    comparison.add(text, name, right, value, _samples_in(feeds))
    pairs = zip(as_gpu.results(options), as_file.results(options), strict=True)
    return tuple(file if file.problem is not None and gpu.problem is None else gpu for gpu, file in pairs)


def _agreement(right: Array, value: Array) -> float:
    """The share of equal elements of two integer outputs; of common rows if that is larger, as of the boxes of NMS."""
    if np.issubdtype(right.dtype, np.floating):
        # Floats of different shapes follow from integers that differ.
        return 0.0
    equal = (
        float(np.mean(right == value)) if right.shape == value.shape and right.size else float(right.size == value.size)
    )
    if right.ndim != 2 or value.ndim != 2:
        return equal
    rows, others = set(map(tuple, right.tolist())), set(map(tuple, value.tolist()))
    return max(equal, len(rows & others) / max(1, len(rows | others)))
