"""The dense network as reference of BatchNorm statistics that are estimated from the images at hand.

These images are few, or not augmented as in training: the dense network itself has other statistics on them than those it
stores. A pruned network that is shown the same images errs in the same direction, and that part of the error is taken out of
its statistics (a control variate).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm

# The share of the stored variance that is added to both estimates of it: few images show little of a channel that is rarely
# active, and the quotient of two small numbers says nothing.
_SHRINKAGE = 1e-3
# BatchNorm on CPUs sums that many values per channel in float32 to five digits, and more of them less well.
_MOST_SUMMED = 2**18


@dataclass(frozen=True)
class ChannelStatistics:
    """A BatchNorm layer's mean and variance, (C,) each."""

    mean: torch.Tensor
    variance: torch.Tensor


@dataclass(frozen=True)
class DenseStatistics:
    """Statistics of the dense network by the name of the layer.

    Attributes:
        stored: Those it normalizes by.
        batches: Those of each batch of the images at hand, when it normalizes by the stored ones, call by call; None where
            too little reaches a layer. Layers that no image reaches are missing, as the auxiliary heads that run only in
            training.
    """

    stored: dict[str, ChannelStatistics]
    batches: dict[str, list[ChannelStatistics | None]]

    def correct(self, name: str, estimate: ChannelStatistics, batch: int | None = None) -> ChannelStatistics:
        """The statistics of a pruned layer from its estimate on the same images, or on one batch of them.

        The variance is the stored one times the quotient of the two estimates; the mean is the estimate, plus what the
        dense network's estimate lacks, in units of the standard deviation. Where the dense network has no estimate, as in
        parts that only some images reach, it is the estimate.
        """
        stored, dense = self.stored[name], self._seen(name, batch)
        if dense is None:
            return estimate
        floor = _SHRINKAGE * stored.variance
        known = dense.variance + floor > 0
        quotient = (estimate.variance + floor) / (dense.variance + floor).where(known, 1)
        # In this order, a layer that sees what it saw in the dense network keeps its statistics to the last bit.
        mean = stored.mean * quotient.sqrt() + (estimate.mean - dense.mean * quotient.sqrt())
        # Channels that are constant in the dense network have nothing to compare with.
        return ChannelStatistics(
            mean.where(known, estimate.mean), (stored.variance * quotient).where(known, estimate.variance)
        )

    def _seen(self, name: str, batch: int | None) -> ChannelStatistics | None:
        seen = self.batches.get(name, [])
        if batch is None:
            return average(seen)
        return seen[batch] if batch < len(seen) else None


def named_batchnorms(module: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers that keep running statistics, by name."""
    from torch.nn.modules.batchnorm import _BatchNorm

    norms = {k: m for k, m in module.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats}
    # Without them, a layer normalizes by the batch in evaluation mode too.
    return {k: m for k, m in norms.items() if m.running_mean is not None and m.running_var is not None}


def average(batches: Sequence[ChannelStatistics | None]) -> ChannelStatistics | None:
    """The mean over batches, in which every batch has the same weight; None if there is none."""
    import torch

    known = [batch for batch in batches if batch is not None]
    if not known:
        return None
    mean, variance = (torch.stack([getattr(b, kind) for b in known]).mean(0) for kind in ("mean", "variance"))
    return ChannelStatistics(mean, variance)


def batch_statistics(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], *, biased: bool = False
) -> ChannelStatistics | None:
    """Mean and variance of each channel, (C,) float32 each, of what a BatchNorm layer is called with.

    Args:
        args: Positional arguments of the call; the input (N, C, ...) is the first argument of all.
        kwargs: Named ones.
        biased: Divide by the number of values, as BatchNorm does when it normalizes by the batch, instead of one less.

    Returns:
        None for fewer than two values per channel.
    """
    import torch
    from torch.nn import functional as F

    x: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
    count = x.numel() // x.shape[1] if x.shape[1] else 0
    if count < 2:
        return None
    if count > _MOST_SUMMED:
        variance, mean = torch.var_mean(x.float(), [axis for axis in range(x.ndim) if axis != 1])
    else:
        mean, variance = (torch.zeros(x.shape[1], dtype=torch.float32, device=x.device) for _ in range(2))
        with torch.no_grad():
            # Ten times as fast as torch.var_mean on CPUs.
            F.batch_norm(x.float(), mean, variance, training=True, momentum=1.0)
    return ChannelStatistics(mean, variance * ((count - 1) / count) if biased else variance)


def stored_statistics(network: nn.Module) -> dict[str, ChannelStatistics]:
    """What the BatchNorm layers of a network normalize by, by name."""
    return {
        name: ChannelStatistics(layer.running_mean.clone(), layer.running_var.clone())
        for name, layer in named_batchnorms(network).items()
        if layer.running_mean is not None and layer.running_var is not None
    }


def observe_dense(dense: nn.Module, images: Iterable[torch.Tensor]) -> DenseStatistics:
    """The statistics stored in the dense network, and those of what reaches its BatchNorm layers.

    Args:
        dense: In evaluation mode; it does not change.
        images: Batches (N, channels, H, W) of at least two images.
    """
    return DenseStatistics(stored_statistics(dense), _observe(dense, images, lambda *_: None))


def update_relative(module: nn.Module, images: Iterable[torch.Tensor], reference: DenseStatistics) -> None:
    """Replace the BatchNorm statistics of a pruned network by corrected ones, in place.

    While it is observed, every layer normalizes by its corrected statistics of the batch, so that the layers after it see
    what they will see in the end.

    Args:
        module: In evaluation mode.
        images: Those of the reference, in the same batches.
        reference: Of the dense network.
    """

    def normalize_by(name: str, layer: _BatchNorm, batch: int, estimate: ChannelStatistics) -> None:
        _store(layer, reference.correct(name, estimate, batch))

    layers = named_batchnorms(module)
    for name, batches in _observe(module, images, normalize_by).items():
        if (estimate := average(batches)) is not None:
            _store(layers[name], reference.correct(name, estimate))


def _observe(
    network: nn.Module,
    images: Iterable[torch.Tensor],
    before_forward: Callable[[str, _BatchNorm, int, ChannelStatistics], None],
) -> dict[str, list[ChannelStatistics | None]]:
    """Statistics of the inputs of each BatchNorm layer that is reached, for each call; variances are unbiased."""
    import torch

    seen: dict[str, list[ChannelStatistics | None]] = {}

    def observer(name: str) -> Any:
        def observe(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found, calls = batch_statistics(args, kwargs), seen.setdefault(name, [])
            if found is not None:
                before_forward(name, layer, len(calls), found)
            calls.append(found)

        return observe

    layers = named_batchnorms(network).items()
    hooks = [layer.register_forward_pre_hook(observer(name), with_kwargs=True) for name, layer in layers]
    try:
        with torch.no_grad():
            for batch in images:
                network(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _store(layer: _BatchNorm, statistics: ChannelStatistics) -> None:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.copy_(statistics.mean)
    layer.running_var.copy_(statistics.variance)
