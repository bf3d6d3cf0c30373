"""Makes the module of a factory usable: without wrappers for several GPUs, initialized, on the CPU, in float32."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.models.layers import forward_error, sample_input

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)


def prepare_module(module: nn.Module, preprocessing: Preprocessing, name: str) -> nn.Module:
    """The network itself, in evaluation mode; values of its tensors change only by conversion to float32.

    Args:
        module: What a factory returned; changed in place.
        preprocessing: Gives the size of an image, with which lazy layers are initialized.
        name: Of the model, for messages.

    Raises:
        InputError: TorchScript, tensors without values, or a lazy layer that a forward pass does not initialize.
    """
    import torch

    module = _without_wrappers(module).eval()
    scripted = [n for n, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise InputError(
            "the model is TorchScript, or parts of it are: such layers cannot be masked",
            where=name,
            found=f"{len(scripted)}: {listed([n or 'the whole model' for n in scripted])}",
            fix="use the modules that were scripted or traced, not the results of torch.jit",
        )
    if any("quantized" in type(m).__module__.split(".") for m in module.modules()):
        raise _quantized(module, name)
    _initialize(module, preprocessing, name)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    without_values = [n for n, t in tensors.items() if t.is_meta]
    if without_values:
        raise InputError(
            "the model's tensors have no values: they are on the device 'meta'",
            where=name,
            found=f"{len(without_values)}: {listed(without_values)}",
            fix="build the model on the CPU",
        )
    if any(t.device.type != "cpu" for t in tensors.values()):
        module = module.to("cpu")
    floats = {p.dtype for p in module.parameters() if p.is_floating_point()}
    if floats and torch.float32 not in floats:
        log.info("%s: its parameters are %s; maskplan computes in float32", name, listed(sorted(map(str, floats))))
        module = module.float()
    for parameter in module.parameters():
        if parameter.layout == torch.strided and not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
    return module


def _without_wrappers(module: nn.Module) -> nn.Module:
    """The module inside DataParallel, `torch.compile` and averaging, at any depth."""
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    from torch.optim.swa_utils import AveragedModel

    for _ in range(8):
        compiled = getattr(module, "_orig_mod", None)
        if isinstance(compiled, nn.Module):
            module = compiled
        elif isinstance(module, nn.DataParallel | DistributedDataParallel | AveragedModel):
            module = module.module
        else:
            break
    for parent in list(module.modules()):
        if parent._compiled_call_impl is not None:
            # Of `Module.compile`, whose traces leave out hooks that are registered later.
            parent._compiled_call_impl = None
        for name, child in list(parent._modules.items()):
            if isinstance(child, nn.DataParallel | DistributedDataParallel):
                setattr(parent, name, child.module)
            elif isinstance(compiled := getattr(child, "_orig_mod", None), nn.Module):
                setattr(parent, name, compiled)
    return module


def _initialize(module: nn.Module, preprocessing: Preprocessing, name: str) -> None:
    """Initialize lazy layers by a forward pass."""
    import torch
    from torch.nn.parameter import is_lazy

    def lazy() -> list[str]:
        return [n for n, t in (*module.named_parameters(), *module.named_buffers()) if is_lazy(t)]

    if not lazy():
        return
    try:
        with torch.no_grad():
            module(sample_input(preprocessing, 1))
    except Exception as error:  # the model's own code may raise anything
        raise forward_error(module, preprocessing, error) from error
    if lazy():
        raise InputError(
            "lazy layers are not initialized by a forward pass",
            where=name,
            found=listed(lazy()),
            fix="remove layers that inference does not use, or give their number of input channels",
        )


def _quantized(module: nn.Module, name: str) -> InputError:
    kinds = sorted({type(m).__name__ for m in module.modules() if "quantized" in type(m).__module__.split(".")})
    return InputError(
        "the model is quantized already",
        where=name,
        found=listed(kinds),
        fix="return the float model; `maskplan engine --precision int8` quantizes the result",
    )
