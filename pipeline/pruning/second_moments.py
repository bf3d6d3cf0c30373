"""Second moments of layers' inputs over training images: they tell how much an error of the weights changes the outputs.

A layer's input is unfolded to one row per output position, and the outer products of the rows are averaged. The images are
streamed once for each set of consecutive layers whose moments fit into `_MAX_BYTES`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Layer, Preprocessing
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.validation import at_least
from maskplan.pipeline.data.dataset import Split, batches
from maskplan.pipeline.models.layers import layer_modules, sample_input

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)

Item = TypeVar("Item")

# Memory limit of the moments gathered in one pass over the images; ResNet-50 needs two passes.
_MAX_BYTES = 400 * 2**20
# Allowed difference between a layer's outputs and weight times unfolded inputs, relative to the largest output; covers TF32.
_TOLERANCE = 1e-2


class UnusableInputsError(InputError):
    """Layers whose inputs say nothing about their outputs.

    Attributes:
        names: Of their weights.
    """

    def __init__(self, names: tuple[str, ...], what: str, *, found: str, fix: str) -> None:
        super().__init__(what, found=found, fix=fix)
        self.names = names


@dataclass(frozen=True)
class MomentOptions:
    """What to average over.

    Attributes:
        images: Number of training images, drawn with the seed.
        batch: Images per batch.
        positions: Output positions sampled per image, drawn for every batch; neighboring positions are nearly redundant. A
            layer with more columns than `images * positions` rows uses more positions, as far as there are any.
        seed: Seed of the images and positions.
    """

    images: int = 512
    batch: int = 32
    positions: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(1, images=self.images, batch=self.batch, positions=self.positions)
        at_least(0, seed=self.seed)


@dataclass(frozen=True)
class SecondMoments:
    """Second moments of one layer's unfolded inputs u, of length D = R*S*C: kernel positions outermost, channels innermost.

    Attributes:
        about_mean: (D, D) float32, the mean of (u - mean)(u - mean)^T.
        mean: (D,) float32, the mean of u.
        rows: Number of inputs averaged.
        before_norm: A BatchNorm follows the layer directly, so a constant added to the outputs has no effect.
    """

    about_mean: npt.NDArray[np.float32]
    mean: npt.NDArray[np.float32]
    rows: int
    before_norm: bool

    @property
    def effective(self) -> npt.NDArray[np.float32]:
        """The moments that matter: about the mean before a BatchNorm that will be recalibrated, otherwise about zero."""
        return self.about_mean if self.before_norm else self.about_zero

    @property
    def about_zero(self) -> npt.NDArray[np.float32]:
        """(D, D) float32, the mean of u u^T."""
        return self.about_mean + np.outer(self.mean, self.mean)


def second_moments(
    module: nn.Module, layers: Sequence[Layer], preprocessing: Preprocessing, train: Split, options: MomentOptions
) -> Iterator[tuple[Layer, SecondMoments]]:
    """Yield the moments layer by layer; the module is not changed.

    Args:
        module: The network, on any device; it runs in evaluation mode.
        layers: Ungrouped convolutions and linear layers, in any order; moments are yielded in this order.
        preprocessing: Preprocessing of the images.
        train: Images to average over.
        options: Number and choice of images and positions.

    Raises:
        InputError: There are no images, or activations are not finite.
        UnusableInputsError: Layers are not called, or compute something other than their weight times their unfolded inputs.
    """
    import torch

    images = train.sample(options.images, options.seed)
    if len(images) == 0:
        raise InputError("no images to average over", where=train.role, fix="give --data DIR with train/ and val/")
    module.eval()
    followed = layers_before_norm(module, preprocessing)
    by_name = layer_modules(module)
    unseen = [layer.name for layer in layers if layer.name not in by_name]
    if unseen:
        raise _not_called(unseen)
    for part in parts_that_fit(layers, lambda layer: int(np.prod(layer.shape[1:]))):
        accumulators = [_MomentAccumulator(layer, by_name[layer.name], len(images), options) for layer in part]
        hooks = [a.module.register_forward_hook(a.add) for a in accumulators]
        device = next(module.parameters()).device
        try:
            with torch.no_grad():
                for i, (x, _) in enumerate(batches(images, preprocessing, options.batch)):
                    for accumulator in accumulators:
                        accumulator.start_batch(i)
                    module(torch.from_numpy(x).to(device))
        finally:
            for hook in hooks:
                hook.remove()
        _require_no_problems(accumulators)
        unseen = [a.layer.name for a in accumulators if a.rows == 0]
        if unseen:
            raise _not_called(unseen)
        while accumulators:
            # Removed before its moments are finished, so that at most one layer's moments are in memory twice.
            done = accumulators.pop(0)
            yield done.layer, done.finish(before_norm=done.layer.name in followed)


def layers_before_norm(module: nn.Module, preprocessing: Preprocessing) -> frozenset[str]:
    """Names of the weights whose layer's output is the direct input of a BatchNorm module with running statistics.

    A BatchNorm after an addition, a concatenation or an activation does not count, nor does a functional BatchNorm.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    outputs: list[tuple[str, Any]] = []
    names: set[str] = set()

    def record_output(name: str) -> Any:
        return lambda layer, inputs, output: outputs.append((name, output))

    def match_input(norm: nn.Module, inputs: Any) -> None:
        names.update(name for name, output in outputs if output is inputs[0])

    hooks = [m.register_forward_hook(record_output(name)) for name, m in layer_modules(module).items()]
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    hooks += [m.register_forward_pre_hook(match_input) for m in norms]
    device = next(module.parameters()).device
    try:
        with torch.no_grad():
            module.eval()(sample_input(preprocessing, 1).to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return frozenset(names)


def parts_that_fit(layers: Sequence[Item], columns: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Runs of consecutive layers whose moments together fit into `_MAX_BYTES`; at least one layer each.

    Args:
        layers: In order.
        columns: Length of a layer's unfolded inputs.
    """
    part: list[Item] = []
    total = 0
    for layer in layers:
        size = 4 * columns(layer) ** 2
        if part and total + size > _MAX_BYTES:
            yield part
            part, total = [], 0
        part.append(layer)
        total += size
    if part:
        yield part


def positions_for(columns: int, images: int, options: MomentOptions) -> int:
    """Output positions of each image to use, so that a layer has no fewer rows than columns."""
    return max(options.positions, -(-columns // images))


def sampled_positions(count: int, wanted: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """At most `wanted` of `count` output positions, in order."""
    if count <= wanted:
        return np.arange(count)
    return np.sort(random.choice(count, wanted, replace=False))


class _MomentAccumulator:
    """Sums over one layer's inputs, shifted by the first batch's mean: subtracting the mean later loses no digits."""

    def __init__(self, layer: Layer, module: nn.Module, images: int, options: MomentOptions) -> None:
        self.layer, self.module = layer, module
        self._columns = int(np.prod(layer.shape[1:]))
        self._positions = positions_for(self._columns, images, options)
        self._seed = options.seed
        self._random = np.random.default_rng(options.seed)
        self.rows = 0
        self._shift: torch.Tensor | None = None
        self._sum: torch.Tensor | None = None
        self._products: torch.Tensor | None = None
        self.problem: str | None = None

    def start_batch(self, batch: int) -> None:
        """Seed the choice of positions by batch and layer, so that it does not depend on which layers share a pass."""
        assert self.layer.position is not None
        self._random = np.random.default_rng([self._seed, batch, self.layer.position])

    def add(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        """Forward hook: add the rows of one batch."""
        if self.problem is not None:
            return
        rows, outputs = self._unfold(inputs[0], output)
        if rows is None or outputs is None:
            self.problem = f"{self.layer.name}: outputs {tuple(output.shape)} do not match its stride and padding"
            return
        if self._shift is None or self._sum is None or self._products is None:
            if not bool(rows.isfinite().all()):
                self.problem = f"{self.layer.name}: its inputs contain NaN or infinity"
                return
            if not self._is_product(rows, outputs):
                self.problem = f"{self.layer.name}: its outputs are not its weight times its inputs"
                return
            self._shift = rows.mean(dim=0)
            self._sum = rows.new_zeros(self._columns)
            self._products = rows.new_zeros(self._columns, self._columns)
        rows -= self._shift
        self._sum += rows.sum(dim=0)
        self._products.addmm_(rows.T, rows)
        self.rows += len(rows)

    def finish(self, *, before_norm: bool) -> SecondMoments:
        """Return the averages and release the sums."""
        assert self._shift is not None
        assert self._sum is not None
        assert self._products is not None
        offset = self._sum / self.rows
        products = self._products.div_(self.rows).addr_(offset, offset, alpha=-1)
        mean = (self._shift + offset).cpu().numpy()
        self._products = None
        if not bool(products.isfinite().all()):
            raise InputError(
                f"the inputs of {self.layer.name} contain NaN or infinity",
                fix="check the weights and the images' normalization",
            )
        return SecondMoments(products.cpu().numpy(), mean, self.rows, before_norm)

    def _unfold(self, x: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Unfolded inputs (N * positions, D) and their outputs (N * positions, K); None if the shapes do not match."""
        import torch
        from torch.nn import functional as F
        from torch.nn.modules.conv import _ConvNd

        conv = self.module
        x, output = x.float(), output.float()
        if not isinstance(conv, _ConvNd):
            x, output = x.reshape(len(x), -1, x.shape[-1]), output.reshape(len(x), -1, output.shape[-1])
            chosen = self._sample_positions(x.shape[1])
            return x[:, chosen].reshape(-1, x.shape[-1]), output[:, chosen].reshape(-1, output.shape[-1])
        axes = len(conv.kernel_size)
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
        sizes = [
            (length - dilation * (kernel - 1) - 1) // stride + 1
            for length, kernel, stride, dilation in zip(
                x.shape[-axes:], conv.kernel_size, conv.stride, conv.dilation, strict=True
            )
        ]
        if x.ndim != axes + 2 or tuple(sizes) != tuple(output.shape[-axes:]):
            return None, None
        chosen = self._sample_positions(int(np.prod(sizes)))
        corners = np.unravel_index(chosen, sizes)
        taps = np.array(list(itertools.product(*(range(k) for k in conv.kernel_size))))
        # For each axis, input indices of shape (positions, taps).
        index = [
            torch.from_numpy(corner[:, None] * stride + taps[:, axis] * dilation).to(x.device)
            for axis, (corner, stride, dilation) in enumerate(zip(corners, conv.stride, conv.dilation, strict=True))
        ]
        at = [torch.from_numpy(corner).to(x.device) for corner in corners]
        batch: list[Any] = [slice(None)]
        rows = x.movedim(1, -1).contiguous()[tuple(batch + index)]
        outputs = output.movedim(1, -1)[tuple(batch + at)]
        return rows.reshape(-1, self._columns), outputs.reshape(-1, outputs.shape[-1])

    def _sample_positions(self, count: int) -> npt.NDArray[np.int64]:
        return sampled_positions(count, self._positions, self._random)

    def _is_product(self, rows: torch.Tensor, outputs: torch.Tensor) -> bool:
        """Whether the layer's outputs equal its weight times the unfolded inputs, checked on a few rows."""
        import torch

        weight, bias = self.module.weight, self.module.bias
        assert isinstance(weight, torch.Tensor)
        expected = rows[:256] @ weight.float().movedim(1, -1).reshape(len(weight), -1).T
        if isinstance(bias, torch.Tensor):
            expected = expected + bias.float()
        difference = float((expected - outputs[:256]).abs().max())
        return difference <= _TOLERANCE * float(outputs[:256].abs().max()) + 1e-6


def _require_no_problems(accumulators: Sequence[_MomentAccumulator]) -> None:
    problems = {a.layer.name: a.problem for a in accumulators if a.problem is not None}
    if problems:
        raise UnusableInputsError(
            tuple(problems),
            f"the inputs of {len(problems)} layers cannot be used",
            found=listed(problems.values(), 3),
            fix="choose magnitude masks, or leave these layers out with --layers; for NaN, check weights and images",
        )


def _not_called(names: Sequence[str]) -> UnusableInputsError:
    return UnusableInputsError(
        tuple(names),
        f"the inputs of {len(names)} layers cannot be observed: the model uses their weights without calling the layers",
        found=listed(names, 3),
        fix="choose learned or magnitude masks, or leave these layers out with --layers",
    )
