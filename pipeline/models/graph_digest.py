"""A digest of what a model computes, apart from its weights: equal digests mean that a finished stage need not run again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from maskplan.pipeline.core.serialization import encode
from maskplan.pipeline.models.aten import export_aten

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.export import ExportedProgram

    from maskplan.pipeline.models.registry import Architecture

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GraphDigest:
    """Digest of a model's graph.

    Attributes:
        sha256: Of the layers as PyTorch prints them, the operators with their arguments, the names and shapes of the
            weights, the values of all other tensors, the preprocessing and the labels.
        torch_version: PyTorch's, whose versions record other operators for the same module.
        exported: False if `torch.export` cannot read the module; `sha256` then holds no operators, and code between the
            layers can change without being noticed.
    """

    sha256: str
    torch_version: str
    exported: bool


def graph_digest(architecture: Architecture) -> GraphDigest:
    """Compute the digest of a model with its weights loaded, whose values do not count."""
    import torch

    module, preprocessing = architecture.module, architecture.preprocessing
    digest = hashlib.sha256(json.dumps(encode((preprocessing, architecture.labels))).encode())
    _add_layers(digest.update, module)
    try:
        program = export_aten(module, preprocessing, whole_layers=True)
    except Exception as error:  # the model's own code may raise anything
        log.debug("%s: torch.export cannot read the graph: %s", architecture.name, error)
    else:
        _add_operators(digest.update, program)
        return GraphDigest(digest.hexdigest(), torch.__version__, True)
    return GraphDigest(digest.hexdigest(), torch.__version__, False)


def _add_layers(add: Callable[[bytes], object], module: nn.Module) -> None:
    stored = module.state_dict()
    add(f"{module}\n".encode())
    for name, tensor in stored.items():
        add(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    for name, buffer in module.named_buffers():
        if name not in stored:
            _add_constant(add, name, buffer)


def _add_operators(add: Callable[[bytes], object], program: ExportedProgram) -> None:
    from torch.fx import GraphModule

    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            add(f"{node.op} {node.name} {node.target} {node.args} {node.kwargs}\n".encode())
    add(f"{program.graph_signature}\n".encode())
    for name, constant in program.constants.items():
        _add_constant(add, name, constant)


def _add_constant(add: Callable[[bytes], object], name: str, value: object) -> None:
    import torch

    add(f"{name} {type(value).__name__}\n".encode())
    if isinstance(value, torch.Tensor):
        add(f"{value.dtype} {tuple(value.shape)}\n".encode())
        add(_values(value))


def _values(tensor: torch.Tensor) -> bytes:
    import torch

    plain = tensor.detach().cpu().to_dense().contiguous()
    return bytes(plain.flatten().view(torch.uint8).numpy())
