"""Find the first layer where two models differ: compare the outputs of their common layers on the same images."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import TensorSpec
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.progress import track
from maskplan.pipeline.core.reports import DepthReport, LayerDifference
from maskplan.pipeline.core.validation import at_least
from maskplan.pipeline.parity.intermediates import Intermediates
from maskplan.pipeline.parity.layer_matching import GraphLayer, computed_tensors, graph_layers, match_layers
from maskplan.pipeline.parity.resolve_onnx import resolve_onnx

_Array = npt.NDArray[Any]
_Pair = tuple[GraphLayer, TensorSpec, TensorSpec]


# One channel may differ by this many times the tolerance: pruned as described below, the widest layers of ResNet-50 reach 6.
_CHANNEL_FACTOR = 10.0


@dataclass(frozen=True)
class BisectOptions:
    """When an output counts as different, and how much memory to use.

    Attributes:
        tolerance: Largest relative difference of a layer: norm of the difference over norm of the dense output. All layers
            after the first masked one of a pruned model differ by design, deeper ones more: ResNet-50 with random weights,
            pruned 2:4 by magnitude without recalibration, reaches 0.93. Above 1, the default, an output is further from the
            dense one than zeros are. For two precisions of the same weights, 0.1 is enough. A single channel may differ by
            ten times as much, relative to the average channel.
        max_bytes: Bytes of intermediate tensors, both models together, that one run may return; more tensors are compared
            in several runs.
    """

    tolerance: float = 1.0
    max_bytes: int = 512 << 20

    def __post_init__(self) -> None:
        at_least(0, tolerance=self.tolerance)
        at_least(1, max_bytes=self.max_bytes)


def bisect(dense: Path, sparse: Path, images: npt.NDArray[np.float32], options: BisectOptions) -> DepthReport:
    """Run both models on the same images and find the first layer whose output differs by more than the tolerance.

    Both run on ONNX Runtime without graph optimization, with every float tensor of the common layers marked as an output;
    values are compared in double precision. In an INT8 or FP16 graph the layers' outputs are compared before they are
    quantized again. NaN and infinity count as different, unless both models have them at the same positions.

    Args:
        dense: The reference: an ONNX file, an engine or a checkpoint.
        sparse: The model that is compared with it, of the same kinds.
        images: (N, channels, H, W), N > 0.
        options: Tolerance and memory.

    Raises:
        InputError: A file cannot be used, or the models have no layer in common.
    """
    _, channels, height, width = images.shape
    with contextlib.ExitStack() as stack:
        first, second = (
            Intermediates(stack.enter_context(resolve_onnx(path)), (channels, height, width))
            for path in (dense, sparse)
        )
        layers = [graph_layers(m.model, m.float_outputs(computed_tensors(m.model.graph))) for m in (first, second)]
        matches = match_layers(*layers)
        if not matches.pairs:
            raise InputError(
                "the models have no layer in common",
                found=f"{len(layers[0])} layers in {dense.name}, {len(layers[1])} in {sparse.name}",
                fix="compare a model with one that was derived from it",
            )
        slices = list(_slices(matches.pairs, images, (first, second), options.max_bytes))
        differences = [
            d for pairs in track(slices, "bisect", len(slices)) for d in _compare(first, second, pairs, images)
        ]
    beyond = (d.node for d in differences if _exceeds(d, options.tolerance))
    return DepthReport(len(images), options.tolerance, tuple(differences), next(beyond, None), matches.unmatched)


def _exceeds(layer: LayerDifference, tolerance: float) -> bool:
    if layer.relative is None or layer.channel is None:
        return True
    return layer.relative > tolerance or layer.channel > _CHANNEL_FACTOR * tolerance


def _slices(
    pairs: Sequence[_Pair], images: npt.NDArray[np.float32], models: tuple[Intermediates, Intermediates], max_bytes: int
) -> Iterator[list[_Pair]]:
    """The pairs in order, as many at a time as memory allows, at least one."""
    step = max(model.batch for model in models)
    chosen: list[_Pair] = []
    used = 0
    for pair in pairs:
        size = sum(
            _bytes(model, spec, images) * -(-step // model.batch) for model, spec in zip(models, pair[1:], strict=True)
        )
        if chosen and used + size > max_bytes:
            yield chosen
            chosen, used = [], 0
        chosen.append(pair)
        used += size
    yield chosen


def _bytes(model: Intermediates, spec: TensorSpec, images: npt.NDArray[np.float32]) -> int:
    """Size of a tensor for one batch; if the graph does not declare the shape, it is measured by a run."""
    known = [d for d in spec.shape if d is not None]
    if len(known) < len(spec.shape) or not known:
        one: int = model.open([spec.name])(images[:1])[spec.name].nbytes
        return one * model.batch
    return math.prod(known) * np.dtype(spec.dtype).itemsize


def _compare(
    dense: Intermediates, sparse: Intermediates, pairs: Sequence[_Pair], images: npt.NDArray[np.float32]
) -> list[LayerDifference]:
    run_dense, run_sparse = dense.open([a.name for _, a, _ in pairs]), sparse.open([b.name for _, _, b in pairs])
    sums = [_LayerSums() for _ in pairs]
    step = max(dense.batch, sparse.batch)
    for start in range(0, len(images), step):
        part = images[start : start + step]
        ours, theirs = run_dense(part), run_sparse(part)
        for layer_sums, (layer, a, b) in zip(sums, pairs, strict=True):
            if ours[a.name].shape != theirs[b.name].shape:
                raise InputError(
                    "the outputs of a common layer differ in shape",
                    where=layer.name,
                    found=f"{ours[a.name].shape} and {theirs[b.name].shape}",
                    fix="compare a model with one that was derived from it",
                )
            # Free each array as soon as it is summed.
            layer_sums.add(ours.pop(a.name), theirs.pop(b.name), len(part))
    return [
        LayerDifference(layer.name, layer.op, a.name, layer_sums.relative, layer_sums.cosine_min, layer_sums.channel)
        for layer_sums, (layer, a, _) in zip(sums, pairs, strict=True)
    ]


@dataclass
class _LayerSums:
    """Sums over the images of one tensor: squared difference, squared dense values, and the smallest cosine.

    `channels` has the squared difference of each index of an image's first axis.
    """

    difference: float = 0.0
    dense: float = 0.0
    cosine: float = 1.0
    channels: npt.NDArray[np.float64] | None = None

    def add(self, dense: _Array, sparse: _Array, images: int) -> None:
        whole = dense.ndim > 0 and dense.shape[0] == images
        for a, b in zip(dense, sparse, strict=True) if whole else [(dense, sparse)]:
            count = a.shape[0] if whole and a.ndim else 1
            self._add_one(a.astype(np.float64).ravel(), b.astype(np.float64).ravel(), count)

    def _add_one(self, a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], channels: int) -> None:
        with np.errstate(all="ignore"):
            # The same NaN or infinity in both is no difference, and is left out of the norms.
            same = ~np.isfinite(a) & ((a == b) | (np.isnan(a) & np.isnan(b)))
            if same.any():
                a, b = np.where(same, 0, a), np.where(same, 0, b)
            squares, others, product = float(a @ a), float(b @ b), float(a @ b)
            squared = np.square(a - b).reshape(channels, -1).sum(axis=1)
            self.channels = squared if self.channels is None else self.channels + squared
            self.difference += float(squared.sum())
            self.dense += squares
        if squares == 0 or others == 0:
            cosine = float(squares == others)
        else:
            cosine = product / math.sqrt(squares) / math.sqrt(others)
        # A comparison with NaN is false, so `min` would lose it.
        self.cosine = cosine if math.isnan(cosine) or math.isnan(self.cosine) else min(self.cosine, cosine)

    @property
    def relative(self) -> float | None:
        if not math.isfinite(self.difference) or not math.isfinite(self.dense):
            return None
        if self.dense == 0:
            return 0.0 if self.difference == 0 else None
        return math.sqrt(self.difference / self.dense)

    @property
    def channel(self) -> float | None:
        if self.relative is None or self.channels is None:
            return None
        # The dense output may be all zeros if nothing differs: avoid 0 / 0.
        worst = float(self.channels.max(initial=0.0))
        return math.sqrt(worst / self.dense * len(self.channels)) if worst else 0.0

    @property
    def cosine_min(self) -> float | None:
        return self.cosine if math.isfinite(self.cosine) else None
