"""Second moments of what goes into layers, over training images: what tells how much an error of weights changes outputs.

A layer's inputs are unfolded, a row for each output position, and the products of a row's entries averaged. Images are
streamed, once for each few layers: as many as have their moments fit into `_MOST_BYTES`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Layer, Preprocessing
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.validation import at_least
from maskplan.pipeline.data.dataset import Split, batches
from maskplan.pipeline.models.layers import sample_input

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)

# Of moments held at once: all of ResNet-50's in two parts.
_MOST_BYTES = 400 * 2**20
# Between a layer's outputs and those of its unfolded inputs, of their largest: rounding, also of TF32.
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class MomentOptions:
    """What to average over.

    Attributes:
        images: Training images, drawn with the seed.
        batch: Images a batch.
        positions: Output positions of an image that are looked at, drawn anew for every batch; neighbors say much the same.
            A layer with more columns than the images so have rows takes as many as it needs, if there are so many.
        seed: Which images and positions.
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
    """Of one layer's unfolded inputs, D = R*S*C columns: kernel positions outermost, channels innermost.

    Attributes:
        about_mean: (D, D) float32, the mean of (u - mean)(u - mean)^T.
        mean: (D,) float32.
        rows: How many inputs were averaged.
        before_norm: A BatchNorm takes the layer's outputs, which forgets what is added to all of them alike.
    """

    about_mean: npt.NDArray[np.float32]
    mean: npt.NDArray[np.float32]
    rows: int
    before_norm: bool

    @property
    def effective(self) -> npt.NDArray[np.float32]:
        """The moments that count: about the mean before a BatchNorm that will be recalibrated, else about zero."""
        return self.about_mean if self.before_norm else self.about_zero

    @property
    def about_zero(self) -> npt.NDArray[np.float32]:
        """(D, D) float32, the mean of u u^T."""
        return self.about_mean + np.outer(self.mean, self.mean)


def second_moments(
    module: nn.Module, layers: Sequence[Layer], preprocessing: Preprocessing, train: Split, options: MomentOptions
) -> Iterator[tuple[Layer, SecondMoments]]:
    """Yield the moments of one layer after the other; the module is as it was.

    Args:
        module: In evaluation mode, on any device.
        layers: Ungrouped convolutions and linear layers, in any order; moments come in this order.
        preprocessing: Preprocessing of the images.
        train: Images to average over.
        options: How many, and which.

    Raises:
        InputError: There are no images, activations are not numbers, or a layer computes something else than its weight
            times its unfolded inputs (then its name is told).
    """
    import torch

    images = train.first(options.images, options.seed)
    if len(images) == 0:
        raise InputError("no images to average over", where=train.role, fix="give --data DIR with train/ and val/")
    module.eval()
    followed = layers_before_norm(module, preprocessing)
    by_name = _modules(module)
    for part in _parts(layers):
        gathered = [_Gathering(layer, by_name[layer.name], len(images), options) for layer in part]
        hooks = [g.module.register_forward_hook(g.look) for g in gathered]
        device = next(module.parameters()).device
        try:
            with torch.no_grad():
                for i, (x, _) in enumerate(batches(images, preprocessing, options.batch)):
                    for g in gathered:
                        g.draw(i)
                    module(torch.from_numpy(x).to(device))
        finally:
            for hook in hooks:
                hook.remove()
        _require_plain(gathered)
        while gathered:
            # Each is dropped before the next is finished, so that no two lie about twice.
            done = gathered.pop(0)
            yield done.layer, done.finished(before_norm=done.layer.name in followed)


def layers_before_norm(module: nn.Module, preprocessing: Preprocessing) -> frozenset[str]:
    """Weights of the layers whose very output a BatchNorm module with running statistics takes, in a forward pass.

    A BatchNorm behind an addition, a concatenation or an activation does not count, nor one that is called as a function.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    outputs: list[tuple[str, Any]] = []
    found: set[str] = set()

    def made(name: str) -> Any:
        return lambda layer, inputs, output: outputs.append((name, output))

    def taken(norm: nn.Module, inputs: Any) -> None:
        found.update(name for name, output in outputs if output is inputs[0])

    hooks = [m.register_forward_hook(made(name)) for name, m in _modules(module).items()]
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    hooks += [m.register_forward_pre_hook(taken) for m in norms]
    device = next(module.parameters()).device
    try:
        with torch.no_grad():
            module.eval()(sample_input(preprocessing, 1).to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return frozenset(found)


def _modules(module: nn.Module) -> dict[str, nn.Module]:
    """Layers by the names of their weights, as `trace_layers` has them."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    kinds = (_ConvNd, nn.Linear)
    return {f"{n}.weight" if n else "weight": m for n, m in module.named_modules() if isinstance(m, kinds)}


def _parts(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """Layers in a row whose moments fit into `_MOST_BYTES` together, at least one."""
    part: list[Layer] = []
    held = 0
    for layer in layers:
        size = 4 * int(np.prod(layer.shape[1:])) ** 2
        if part and held + size > _MOST_BYTES:
            yield part
            part, held = [], 0
        part.append(layer)
        held += size
    if part:
        yield part


class _Gathering:
    """Sums over one layer's inputs. Moments are taken about the first batch's mean, which costs no digits later."""

    def __init__(self, layer: Layer, module: nn.Module, images: int, options: MomentOptions) -> None:
        self.layer, self.module = layer, module
        self._columns = int(np.prod(layer.shape[1:]))
        self._positions = max(options.positions, -(-self._columns // images))
        self._seed = options.seed
        self._random = np.random.default_rng(options.seed)
        self._rows = 0
        self._shift: torch.Tensor | None = None
        self._sum: torch.Tensor | None = None
        self._products: torch.Tensor | None = None
        self.problem: str | None = None

    def draw(self, batch: int) -> None:
        """Make the positions of a batch depend on nothing else, whichever layers are done together."""
        assert self.layer.position is not None
        self._random = np.random.default_rng([self._seed, batch, self.layer.position])

    def look(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        """Forward hook: add one batch's rows."""
        if self.problem is not None:
            return
        rows, made = self._unfolded(inputs[0], output)
        if rows is None or made is None:
            self.problem = f"{self.layer.name}: outputs {tuple(output.shape)} are not those of its stride and padding"
            return
        if self._shift is None or self._sum is None or self._products is None:
            if not bool(rows.isfinite().all()):
                self.problem = f"{self.layer.name}: its inputs hold NaN or infinity"
                return
            if not self._is_product(rows, made):
                self.problem = f"{self.layer.name}: its outputs are not its weight times its inputs"
                return
            self._shift = rows.mean(dim=0)
            self._sum = rows.new_zeros(self._columns)
            self._products = rows.new_zeros(self._columns, self._columns)
        rows -= self._shift
        self._sum += rows.sum(dim=0)
        self._products.addmm_(rows.T, rows)
        self._rows += len(rows)

    def finished(self, *, before_norm: bool) -> SecondMoments:
        """The averages; what was held for them is let go."""
        assert self._shift is not None
        assert self._sum is not None
        assert self._products is not None
        rest = self._sum / self._rows
        products = self._products.div_(self._rows).addr_(rest, rest, alpha=-1)
        mean = (self._shift + rest).cpu().numpy()
        self._products = None
        if not bool(products.isfinite().all()):
            raise InputError(
                f"the inputs of {self.layer.name} hold NaN or infinity",
                fix="check the weights and the images' normalization",
            )
        return SecondMoments(products.cpu().numpy(), mean, self._rows, before_norm)

    def _unfolded(self, x: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Rows (N * positions, D) and the outputs they belong to, (N * positions, K)."""
        import torch
        from torch.nn import functional as F
        from torch.nn.modules.conv import _ConvNd

        conv = self.module
        x, output = x.float(), output.float()
        if not isinstance(conv, _ConvNd):
            x, output = x.reshape(len(x), -1, x.shape[-1]), output.reshape(len(x), -1, output.shape[-1])
            chosen = self._chosen(x.shape[1])
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
        chosen = self._chosen(int(np.prod(sizes)))
        corners = np.unravel_index(chosen, sizes)
        taps = np.array(list(itertools.product(*(range(k) for k in conv.kernel_size))))
        # (positions, taps) of each axis.
        index = [
            torch.from_numpy(corner[:, None] * stride + taps[:, axis] * dilation).to(x.device)
            for axis, (corner, stride, dilation) in enumerate(zip(corners, conv.stride, conv.dilation, strict=True))
        ]
        at = [torch.from_numpy(corner).to(x.device) for corner in corners]
        every: list[Any] = [slice(None)]
        rows = x.movedim(1, -1).contiguous()[tuple(every + index)]
        made = output.movedim(1, -1)[tuple(every + at)]
        return rows.reshape(-1, self._columns), made.reshape(-1, made.shape[-1])

    def _chosen(self, count: int) -> npt.NDArray[np.int64]:
        if count <= self._positions:
            return np.arange(count)
        return np.sort(self._random.choice(count, self._positions, replace=False))

    def _is_product(self, rows: torch.Tensor, made: torch.Tensor) -> bool:
        """Whether a few rows times the weight are what came out of the layer."""
        import torch

        weight, bias = self.module.weight, self.module.bias
        assert isinstance(weight, torch.Tensor)
        expected = rows[:256] @ weight.float().movedim(1, -1).reshape(len(weight), -1).T
        if isinstance(bias, torch.Tensor):
            expected = expected + bias.float()
        difference = float((expected - made[:256]).abs().max())
        return difference <= _TOLERANCE * float(made[:256].abs().max()) + 1e-6


def _require_plain(gathered: Sequence[_Gathering]) -> None:
    problems = [g.problem for g in gathered if g.problem is not None]
    if problems:
        raise InputError(
            f"the inputs of {len(problems)} layers cannot be averaged",
            found=listed(problems, 3),
            fix="choose magnitude masks, or leave these layers out with --layers; for NaN, check weights and images",
        )
