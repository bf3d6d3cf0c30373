"""The weight-bearing layers of a module, as one forward pass uses them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from maskplan.pipeline.core.artifacts import Layer, Preprocessing
from maskplan.pipeline.core.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn


def sample_input(preprocessing: Preprocessing, batch: int, seed: int = 0) -> torch.Tensor:
    """Seeded normal noise of shape (batch, channels, height, width), in place of normalized images."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, preprocessing.channels, preprocessing.height, preprocessing.width, generator=generator)


def trace_layers(module: nn.Module, preprocessing: Preprocessing) -> tuple[tuple[Layer, ...], int]:
    """Run one image through a module in evaluation mode and record its layers.

    Returns:
        All layers in the order of their names in the module, and the number of outputs.

    Raises:
        InputError: The forward pass fails, or its output is not (1, classes).
    """
    import torch
    from torch import nn
    from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

    used: dict[nn.Module, tuple[int, int]] = {}

    def record(layer: nn.Module, inputs: Any, output: Any) -> None:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        # Each output element costs the weights of one filter; in a transposed convolution, each input element does.
        elements = inputs[0] if isinstance(layer, _ConvTransposeNd) else output
        macs = elements.numel() * weight[0].numel()
        position, before = used.get(layer, (len(used), 0))
        used[layer] = (position, before + macs)

    kinds = (_ConvNd, nn.Linear)
    layers = [(name, m) for name, m in module.named_modules() if isinstance(m, kinds)]
    hooks = [m.register_forward_hook(record) for _, m in layers]
    try:
        with torch.no_grad():
            output = module.eval()(sample_input(preprocessing, 1))
    except Exception as error:  # the model's own code may raise anything
        raise InputError(
            "the model cannot run on its own input",
            where=f"input (1, {preprocessing.channels}, {preprocessing.height}, {preprocessing.width})",
            found=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
            fix="set PREPROCESSING in the model's file to the input it expects",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise InputError(
            "not a classifier", found=f"output {shape}", fix="give a model that returns logits (N, classes)"
        )
    records = []
    for name, layer in layers:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        op = (
            "ConvTranspose" if isinstance(layer, _ConvTransposeNd) else "Conv" if isinstance(layer, _ConvNd) else "Gemm"
        )
        groups = int(layer.groups) if isinstance(layer, _ConvNd) else 1
        position, macs = used.get(layer, (None, 0))
        records.append(Layer(f"{name}.weight" if name else "weight", op, tuple(weight.shape), groups, position, macs))
    return tuple(records), output.shape[1]
