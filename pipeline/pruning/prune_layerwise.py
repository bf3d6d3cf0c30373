"""Layer-wise pruning of an ONNX file on a few hundred samples, without PyTorch.

Each weight gets the mask that changes its operator's outputs least on the samples (`masking/layerwise.py`); with `update`
the kept weights are refitted by least squares (`least_squares.py`). Every layer gets the inputs it has in the dense network.
The mean change of a layer's outputs goes into its bias, which takes the place of recalibrating a BatchNorm: in exported
files BatchNorm is folded into the convolution before it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from maskplan.exporters.layer_bias import bias_slot, shift_bias
from maskplan.exporters.layer_inputs import observed_layers
from maskplan.exporters.metadata import describe_onnx, load_onnx
from maskplan.exporters.prune import Pruned, select_weights, write_pruned
from maskplan.exporters.tensors import TensorError, native_values
from maskplan.pipeline.core.artifacts import OutputKind, Pattern, TensorSpec
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.output_kinds import guess_kinds
from maskplan.pipeline.core.progress import bar
from maskplan.pipeline.core.validation import at_least
from maskplan.pipeline.data.samples import Samples
from maskplan.pipeline.masking.layerwise import layerwise_mask, output_error, unfold_weight
from maskplan.pipeline.masking.patterns import parse_pattern
from maskplan.pipeline.pruning.least_squares import fit_under_mask
from maskplan.pipeline.pruning.onnx_moments import LayerMoments, onnx_moments
from maskplan.pipeline.pruning.onnx_sensitivity import BiasShift, LayerChange, LayerCost, layer_costs, within_budget
from maskplan.pipeline.pruning.second_moments import MomentOptions, SecondMoments

log = logging.getLogger(__name__)

# On which the cost of each mask is measured.
_SENSITIVITY_SAMPLES = 64

NOT_REACHED = "no sample reached it"


@dataclass(frozen=True)
class LayerwiseOptions:
    """Options of layer-wise pruning.

    Attributes:
        pattern: N:M.
        images: Number of samples, drawn with the seed.
        update: Refit the kept weights, and give a layer without a bias one if that takes over the mean change.
        damping: Regularization of refitted weights towards the old ones, as a fraction of the inputs' mean square.
        allow_dense: Patterns (globs) of names of weights or nodes to leave unchanged.
        seed: Seed of the choice of samples and output positions.
        sensitivity: Measure what each mask costs alone.
        keep_dense_budget: Percent of the multiplications of the maskable layers that may stay dense, in the layers whose
            masks cost most (`onnx_sensitivity.py`).
    """

    pattern: str = "2:4"
    images: int = 256
    update: bool = False
    damping: float = 0.01
    allow_dense: tuple[str, ...] = ()
    seed: int = 0
    sensitivity: bool = False
    keep_dense_budget: float = 0.0

    def __post_init__(self) -> None:
        parse_pattern(self.pattern)
        at_least(1, images=self.images)
        at_least(0, damping=self.damping, seed=self.seed, keep_dense_budget=self.keep_dense_budget)


@dataclass(frozen=True)
class PrunedLayer:
    """What pruning changed in one layer.

    Attributes:
        name: Name of the weight.
        shape: (K, C, ...), as the operator multiplies it.
        error: Mean squared change of the outputs from dropping weights, in percent of the outputs' mean square.
        updated_error: The same after refitting; None without an update.
        shifted: The mean change of the outputs was taken over by a bias; errors are without it.
    """

    name: str
    shape: tuple[int, ...]
    error: float
    updated_error: float | None
    shifted: bool


@dataclass(frozen=True)
class LayerwisePruned:
    """The result of `prune_layerwise`.

    Attributes:
        pruned: As of `prune_onnx`.
        samples: Number of samples used.
        layers: The weights pruned layer-wise, in the order of the graph.
        by_magnitude: Weights that were pruned by magnitude instead, with the reason.
        costs: What each mask costs alone, if that was asked for, in the order of the graph.
        kept_dense: Weights that the budget left dense, costliest first.
    """

    pruned: Pruned
    samples: int
    layers: tuple[PrunedLayer, ...]
    by_magnitude: tuple[tuple[str, str], ...]
    costs: tuple[LayerCost, ...] = ()
    kept_dense: tuple[str, ...] = ()


def prune_layerwise(
    path: Path,
    out: Path,
    inputs: Sequence[TensorSpec],
    samples: Samples,
    options: LayerwiseOptions,
    kinds: Sequence[OutputKind] = (),
) -> LayerwisePruned:
    """Make every eligible weight of an ONNX file N:M with the smallest change of each layer's outputs on samples.

    Weights whose inputs cannot be read out (inside Loop or Scan, quantized, or reached by no sample) are pruned by
    magnitude. Local functions that hold weights are inlined. Nothing is written until all masks are chosen.

    Args:
        path: The file to read.
        out: The file to write; may be `path` itself.
        inputs: The network's inputs.
        samples: Samples of them.
        options: Options of pruning.
        kinds: What the outputs hold, for the costs of masks; empty guesses it from their shapes.

    Raises:
        InputError: As `prune_onnx`; or the network does not run on the samples.
        HostError: numba is not installed, or `out` cannot be written.
    """
    pattern = parse_pattern(options.pattern)
    model = load_onnx(path)
    selected = select_weights(model, path, pattern, options.allow_dense, inline=True)
    layers, reasons = observed_layers(model, selected.uses.keys(), pattern.m)
    drawn = samples.sample(options.images, options.seed)
    done: list[PrunedLayer] = []
    changes: list[LayerChange] = []
    with bar("layer-wise masks") as draw:
        ran, all_runs = 0, 0

        def step(batches: int, total: int) -> None:
            nonlocal ran, all_runs
            ran, all_runs = batches, total
            draw(ran + len(done), all_runs + len(layers))

        moment_options = MomentOptions(images=len(drawn), seed=options.seed)
        moments = onnx_moments(model, path.parent, layers, inputs, drawn, moment_options, where=path, step=step)
        for found in moments if layers else ():
            if found.moments is None:
                reasons[id(found.layer.tensor)] = NOT_REACHED
                continue
            change, record = _change(model, path.parent, found, pattern, options)
            changes.append(change)
            done.append(record)
            draw(ran + len(done), all_runs + len(layers))
    costs: tuple[LayerCost, ...] = ()
    if (options.sensitivity or options.keep_dense_budget) and changes:
        few = drawn.sample(_SENSITIVITY_SAMPLES, options.seed)
        judged = kinds or guess_kinds(inputs, describe_onnx(path).outputs)
        costs = layer_costs(model, path.parent, changes, few, judged, path)
    dense = within_budget(costs, options.keep_dense_budget)
    changes = [change for change in changes if change.name not in dense]
    # Only now, because the moments of later layers are those of the dense network.
    for change in changes:
        if change.bias is not None:
            shift_bias(model, change.bias.slot, change.name, change.bias.shift, change.bias.dtype)
    by_magnitude = tuple((selected.uses[key].name, reason) for key, reason in reasons.items())
    uses = {key: use for key, use in selected.uses.items() if use.name not in dense}
    chosen = {id(change.tensor): change.values for change in changes}
    pruned = write_pruned(model, replace(selected, uses=uses), path, out, pattern, chosen)
    kept = tuple(record for record in done if record.name not in dense)
    return LayerwisePruned(pruned, len(drawn), kept, by_magnitude, costs, dense)


def _change(
    model: onnx.ModelProto, folder: Path, found: LayerMoments, pattern: Pattern, options: LayerwiseOptions
) -> tuple[LayerChange, PrunedLayer]:
    """What pruning does to one layer, and how far its outputs are from the dense ones."""
    assert found.moments is not None
    layer = found.layer
    try:
        stored = native_values(layer.tensor, folder)
        slot = bias_slot(model, layer, folder)
    except TensorError as error:
        raise InputError("a weight cannot be read", where=layer.name, found=error) from error
    takes_shift = slot is not None and (slot.stored is not None or slot.before_norm or options.update)
    weight = layer.weight(stored).astype(np.float32)
    fitted, record = _prune(weight, found, pattern, options, shifted=takes_shift)
    new = fitted.astype(stored.dtype)
    bias = None
    if takes_shift and slot is not None:
        removed = unfold_weight(weight - new.astype(np.float32)).astype(np.float64)
        bias = BiasShift(slot, removed @ found.moments.mean, found.dtype)
    return LayerChange(layer.name, layer.tensor, layer.stored(new), bias, found.macs), record


def _prune(
    weight: npt.NDArray[np.float32], found: LayerMoments, pattern: Pattern, options: LayerwiseOptions, *, shifted: bool
) -> tuple[npt.NDArray[np.floating], PrunedLayer]:
    """The new weight (K, C, ...), and what changed."""
    assert found.moments is not None
    layer = found.layer
    # A shift of the bias removes the mean of the error.
    second = _second(found.moments, shifted=shifted)
    mask = layerwise_mask(weight, second, pattern, name=layer.name)
    dropped = np.where(mask, weight, np.float32(0))
    updated = fit_under_mask(weight, mask, second, options.damping) if options.update else None
    whole = float(output_error(weight, second).sum())

    def error(new: npt.NDArray[np.floating]) -> float:
        return 100 * float(output_error(weight - new, second).sum()) / whole if whole > 0 else 0.0

    record = PrunedLayer(
        layer.name,
        layer.shape,
        error=error(dropped),
        updated_error=None if updated is None else error(updated),
        shifted=shifted,
    )
    return dropped if updated is None else updated, record


def _second(moments: SecondMoments, *, shifted: bool) -> npt.NDArray[np.float32]:
    return moments.about_mean if shifted else moments.about_zero
