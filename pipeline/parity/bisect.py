"""Where two models begin to differ: the outputs of the layers that both have, compared on the same images."""

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


# How much further one channel may go than a whole output. The widest of ResNet-50, pruned as below, come to 6.
_CHANNEL = 10.0


@dataclass(frozen=True)
class BisectOptions:
    """What counts as another output, and how much memory to take.

    Attributes:
        tolerance: Norm of the difference over norm of the dense output, beyond which a layer departs. Everything behind the
            first masked layer of a pruned model differs by design, the deeper the more: random weights of ResNet-50 pruned
            2:4 by magnitude, with nothing done to mend them, come to 0.93. Beyond 1, the default, an output is further from
            the dense one than zeros would be. Two precisions of the same weights can be held to 0.1. One channel by itself
            may differ by ten times as much, on the scale of an average channel.
        most_bytes: Of intermediate tensors, both models together, that one run may return; what is more is looked at in
            several runs.
    """

    tolerance: float = 1.0
    most_bytes: int = 512 << 20

    def __post_init__(self) -> None:
        at_least(0, tolerance=self.tolerance)
        at_least(1, most_bytes=self.most_bytes)


def bisect(dense: Path, sparse: Path, images: npt.NDArray[np.float32], options: BisectOptions) -> DepthReport:
    """Run both models on the same images and find the first layer whose output departs.

    Both run on ONNX Runtime, with graph optimization off and every float tensor of the layers that both have marked as an
    output; values are compared in double precision. An INT8 or FP16 graph is compared with what its layers compute before
    their outputs are quantized again. NaN and infinity depart, unless both models have them at the same places.

    Args:
        dense: The reference: an ONNX file, an engine or a checkpoint.
        sparse: What is held against it.
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
        layers = [
            graph_layers(side.model, side.float_outputs(computed_tensors(side.model.graph))) for side in (first, second)
        ]
        found = match_layers(*layers)
        if not found.pairs:
            raise InputError(
                "the models have no layer in common",
                found=f"{len(layers[0])} layers in {dense.name}, {len(layers[1])} in {sparse.name}",
                fix="give a model and one made from it",
            )
        slices = list(_slices(found.pairs, images, (first, second), options.most_bytes))
        differences = [
            d for pairs in track(slices, "bisect", len(slices)) for d in _compare(first, second, pairs, images)
        ]
    departing = (d.node for d in differences if _departs(d, options.tolerance))
    return DepthReport(len(images), options.tolerance, tuple(differences), next(departing, None), found.unmatched)


def _departs(found: LayerDifference, tolerance: float) -> bool:
    if found.relative is None or found.channel is None:
        return True
    return found.relative > tolerance or found.channel > _CHANNEL * tolerance


def _slices(
    pairs: Sequence[_Pair], images: npt.NDArray[np.float32], sides: tuple[Intermediates, Intermediates], most_bytes: int
) -> Iterator[list[_Pair]]:
    """The pairs in order, as many at a time as memory allows; at least one."""
    step = max(side.batch for side in sides)
    taken: list[_Pair] = []
    used = 0
    for pair in pairs:
        size = sum(
            _bytes(side, spec, images) * -(-step // side.batch) for side, spec in zip(sides, pair[1:], strict=True)
        )
        if taken and used + size > most_bytes:
            yield taken
            taken, used = [], 0
        taken.append(pair)
        used += size
    yield taken


def _bytes(side: Intermediates, spec: TensorSpec, images: npt.NDArray[np.float32]) -> int:
    """Of a tensor at one batch; where the graph does not tell its shape, a run does."""
    known = [d for d in spec.shape if d is not None]
    if len(known) < len(spec.shape) or not known:
        one: int = side.open([spec.name])(images[:1])[spec.name].nbytes
        return one * side.batch
    return math.prod(known) * np.dtype(spec.dtype).itemsize


def _compare(
    dense: Intermediates, sparse: Intermediates, pairs: Sequence[_Pair], images: npt.NDArray[np.float32]
) -> list[LayerDifference]:
    run_dense, run_sparse = dense.open([a.name for _, a, _ in pairs]), sparse.open([b.name for _, _, b in pairs])
    tallies = [_LayerSums() for _ in pairs]
    step = max(dense.batch, sparse.batch)
    for start in range(0, len(images), step):
        part = images[start : start + step]
        ours, theirs = run_dense(part), run_sparse(part)
        for tally, (layer, a, b) in zip(tallies, pairs, strict=True):
            if ours[a.name].shape != theirs[b.name].shape:
                raise InputError(
                    "a layer of both models has outputs of two shapes",
                    where=layer.name,
                    found=f"{ours[a.name].shape} and {theirs[b.name].shape}",
                    fix="give a model and one made from it",
                )
            # Each array goes as soon as it is counted.
            tally.add(ours.pop(a.name), theirs.pop(b.name), len(part))
    return [
        LayerDifference(layer.name, layer.op, a.name, tally.relative, tally.cosine_min, tally.channel)
        for tally, (layer, a, _) in zip(tallies, pairs, strict=True)
    ]


@dataclass
class _LayerSums:
    """Sums over the images of one tensor: squares of the difference and of the dense values, and the smallest cosine.

    `channels` are the difference's squares for each place of an image's first axis.
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
            # What is NaN or infinite in both alike is no difference, and has no norm.
            alike = ~np.isfinite(a) & ((a == b) | (np.isnan(a) & np.isnan(b)))
            if alike.any():
                a, b = np.where(alike, 0, a), np.where(alike, 0, b)
            squares, others, product = float(a @ a), float(b @ b), float(a @ b)
            apart = np.square(a - b).reshape(channels, -1).sum(axis=1)
            self.channels = apart if self.channels is None else self.channels + apart
            self.difference += float(apart.sum())
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
        # What is no difference at all may be so of a dense output of zeros.
        worst = float(self.channels.max(initial=0.0))
        return math.sqrt(worst / self.dense * len(self.channels)) if worst else 0.0

    @property
    def cosine_min(self) -> float | None:
        return self.cosine if math.isfinite(self.cosine) else None
