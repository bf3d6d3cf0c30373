"""The weight-bearing layers of a module, as one forward pass uses them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from maskplan.pipeline.core.artifacts import Layer, Preprocessing, TensorSpec
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.regular_values import is_fixed_weight
from maskplan.pipeline.models.module_outputs import named_tensors, output_specs

if TYPE_CHECKING:
    import torch
    from torch import nn

    from maskplan.pipeline.models.weight_uses import WeightUse


def sample_input(preprocessing: Preprocessing, batch: int, seed: int = 0) -> torch.Tensor:
    """Seeded normal noise of shape (batch, channels, height, width), in place of normalized images."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, preprocessing.channels, preprocessing.height, preprocessing.width, generator=generator)


def trace_layers(module: nn.Module, preprocessing: Preprocessing) -> tuple[tuple[Layer, ...], tuple[TensorSpec, ...]]:
    """Run one image through a module in evaluation mode and record its layers.

    A layer is a convolution or linear module, called or used by its weight only, or a parameter that a convolution reads
    directly.

    Returns:
        All layers in the order of their names in the module, and the outputs; axes that grow with the batch are dynamic.

    Raises:
        InputError: The forward pass fails, or returns something else than tensors.
    """
    from maskplan.pipeline.models.weight_uses import run_recorded

    try:
        output, uses = run_recorded(module, sample_input(preprocessing, 1))
    except Exception as error:  # the model's own code may raise anything
        raise forward_error(module, preprocessing, error) from error
    return tuple(_layers(module, uses)), _output_specs(module, preprocessing, named_tensors(output))


def _output_specs(
    module: nn.Module, preprocessing: Preprocessing, outputs: dict[str, torch.Tensor]
) -> tuple[TensorSpec, ...]:
    """The outputs' records; which axes are dynamic is seen with two images, where one does not tell."""
    import torch

    if len(outputs) == 1 and all(tensor.ndim == 2 and len(tensor) == 1 for tensor in outputs.values()):
        return output_specs(outputs)
    try:
        with torch.no_grad():
            second = named_tensors(module.eval()(sample_input(preprocessing, 2)))
    except Exception:  # a module of one image at a time, which only the export refuses
        return output_specs(outputs)
    return output_specs(outputs, second)


def _layers(module: nn.Module, uses: Sequence[WeightUse]) -> Iterator[Layer]:
    from torch.nn.modules.conv import _ConvNd

    parameters = dict(module.named_parameters(remove_duplicate=False))
    modules = layer_modules(module)
    own: dict[str, list[WeightUse]] = {}
    for use in uses:
        inside = None if use.inside is None else f"{use.inside}.weight" if use.inside else "weight"
        # Modules that share a weight are told apart by the module that was running.
        for name in [inside] if inside in use.names else use.names:
            own.setdefault(name, []).append(use)
    functional = {
        name: use
        for name, found in own.items()
        for use in found
        if name not in modules and use.operator == "convolution" and use.is_stored
    }
    names = [n for n in parameters if n in functional] if functional else []
    ranks = {
        order: rank
        for rank, order in enumerate(
            sorted({own[n][0].order for n in (*modules, *names) if n in own and n in parameters})
        )
    }
    for name in (*modules, *names):
        if name not in parameters:
            continue
        found = own.get(name, [])
        convolution = next((u for u in found if u.operator == "convolution"), None)
        layer = modules.get(name)
        if convolution is not None:
            is_transposed, groups = convolution.arguments[6], int(convolution.arguments[8])
        else:
            is_transposed = isinstance(layer, _ConvNd) and layer.transposed
            groups = int(layer.groups) if isinstance(layer, _ConvNd) else 1
        is_convolution = convolution is not None or isinstance(layer, _ConvNd)
        yield Layer(
            name,
            ("ConvTranspose" if is_transposed else "Conv") if is_convolution else "Gemm",
            tuple(parameters[name].shape),
            groups,
            ranks[found[0].order] if found else None,
            sum(use.macs for use in found),
            computed=any(not use.is_stored for use in found),
            fixed=not is_transposed and _is_fixed(parameters[name], is_convolution=is_convolution),
        )


def _is_fixed(parameter: torch.Tensor, *, is_convolution: bool) -> bool:
    if parameter.ndim < 2 or not parameter.is_floating_point():
        return False
    return is_fixed_weight(parameter.detach().cpu().float().numpy(), is_convolution=is_convolution)


def layer_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Convolution and linear modules by the names of their weights."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    kinds = (_ConvNd, nn.Linear)
    return {f"{n}.weight" if n else "weight": m for n, m in module.named_modules() if isinstance(m, kinds)}


def outputs_of(module: nn.Module, parts: Mapping[str, nn.Module], preprocessing: Preprocessing) -> dict[str, Any]:
    """What parts of a module return in evaluation mode for one sample image, by name; those it does not call are missing.

    A part that is called several times has its last output.
    """
    import torch

    outputs: dict[str, Any] = {}

    def keep(name: str) -> Any:
        return lambda _, __, output: outputs.update({name: output})

    hooks = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
    try:
        with torch.no_grad():
            module.eval()(sample_input(preprocessing, 1).to(next(module.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def forward_error(module: nn.Module, preprocessing: Preprocessing, error: Exception) -> InputError:
    """The error for a forward pass that raised an exception, with its likely reason."""
    text = str(error)
    where = f"input (1, {preprocessing.channels}, {preprocessing.height}, {preprocessing.width})"
    found = f"{type(error).__name__}: {text.partition(chr(10))[0]}"
    needed = _required_arguments(module)
    if isinstance(error, NotImplementedError):
        what, fix = "the model has no forward pass for images", "give a module whose forward takes images: one tensor"
    elif needed is not None and needed != 1:
        what = (
            f"the model's forward takes {needed} arguments, not one"
            if needed
            else "the model's forward takes no argument"
        )
        fix = "wrap the model in a module whose forward takes images only, and name a factory of that"
    elif any(word in text for word in ("BFloat16", "Half", "Double", "same dtype", "dtype")):
        what = "the model computes in another type than float32"
        fix = "build the model in float32, and remove conversions such as .half() from its forward"
    elif any(word in text.lower() for word in ("cuda", "nvidia", "same device", "expected device")):
        what, fix = (
            "the model's forward needs another device",
            "build the model on the CPU, without .cuda() in its forward",
        )
    else:
        what, fix = "the model cannot run on its own input", _INPUT_FIX
    return InputError(what, where=where, found=found, fix=fix)


_INPUT_FIX = "set PREPROCESSING in the model's file to the input it expects"


def _required_arguments(module: nn.Module) -> int | None:
    """Number of positional arguments that the forward needs; None if it takes any number."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    empty = inspect.Parameter.empty
    needed = [p for p in parameters if p.default is empty and p.kind is not p.VAR_KEYWORD]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return max(len(needed), min(len(positional), 1))
