"""Matching block by block: each block sees the dense network's inputs, and is to return the dense network's outputs.

The reconstruction of AdaRound (Nagel et al. 2020) and BRECQ (Li et al. 2021), with gates in place of rounding.
Errors of the blocks before do not reach a block, so that its gates hear of nothing but its own choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.learning.features import Matcher, float_tensors
from maskplan.pipeline.models.layers import outputs_of

Block = tuple[str, str]
"""Names of a block's first and last module, which are one where the block is a module."""

# Masked layers in a block of a plain chain of layers, which pooling ends too, and in a module that is not divided: no
# fewer than those of an Inception module.
_CHAIN, _SMALL = 3, 6
_POOLING = ("MaxPool", "AvgPool", "LPPool", "FractionalMaxPool")


def find_blocks(network: nn.Module, masked: Sequence[str], preprocessing: Preprocessing) -> tuple[Block, ...]:
    """The blocks of a network, which share no layer: residual blocks and the like, and stretches of plain chains.

    A block is a module with at least two masked layers that is small, or of which no two parts are blocks themselves. Direct
    children of an `nn.Sequential` that are no blocks form chains. Networks whose layers are called one by one in their own
    code have none.

    Args:
        network: In evaluation mode, on any device.
        masked: Names of the masked weights.
        preprocessing: Gives the size of an image, which shows what is called and returns float tensors.
    """
    layers = {name.rpartition(".")[0] for name in masked}
    found = list(_blocks_in("", network, layers))
    modules = dict(network.named_modules())
    outputs = outputs_of(network, {name: modules[name] for block in found for name in block}, preprocessing)
    usable = {name for name, output in outputs.items() if float_tensors(output)}
    return tuple(block for block in found if usable.issuperset(block))


class BlockMatcher(Matcher):
    """Runs the blocks of a masked network on the inputs that they have in the dense network, inside `observing()`.

    Args:
        teacher: The dense network, which has to run first.
        student: A copy of it, which runs under masks.
        blocks: Of both.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, blocks: Sequence[Block]) -> None:
        # Copied, as the inputs are: what follows a block may change them in place.
        super().__init__(teacher, student, [last for _, last in blocks], copies=True)
        self._inputs: dict[str, list[Any]] = {}
        dense, ours = dict(teacher.named_modules()), dict(student.named_modules())
        for first, _ in blocks:
            dense[first].register_forward_pre_hook(self._keep_inputs(first), with_kwargs=True)
            ours[first].register_forward_pre_hook(self._replace_inputs(first), with_kwargs=True)

    def _forget(self) -> None:
        super()._forget()
        self._inputs.clear()

    def _keep_inputs(self, name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            if self._observes:
                copied = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, (args, kwargs))
                self._inputs.setdefault(name, []).append(copied)

        return hook

    def _replace_inputs(self, name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return self._inputs[name].pop(0) if self._observes else (args, kwargs)

        return hook


def _blocks_in(name: str, module: nn.Module, layers: set[str]) -> Iterator[Block]:
    count = _count(name, layers)
    if count <= 1:
        # A layer by itself has its layer-wise mask already.
        return
    inner = {child: list(_blocks_in(_join(name, child), part, layers)) for child, part in module.named_children()}
    whole = [block for blocks in inner.values() for block in blocks]
    if isinstance(module, nn.Sequential):
        yield from whole
        yield from _chains(name, module, [child for child, blocks in inner.items() if blocks], layers)
    elif not name or isinstance(module, nn.ModuleList | nn.ModuleDict) or (len(whole) > 1 and count > _SMALL):
        yield from whole
    else:
        yield name, name


def _chains(name: str, module: nn.Sequential, blocks: Sequence[str], layers: set[str]) -> Iterator[Block]:
    """Stretches of a sequence's direct children between blocks and poolings, of at most `_CHAIN` masked layers each."""
    stretch: list[str] = []
    for child, part in [*module.named_children(), ("", None)]:
        path = _join(name, child)
        counts = [_count(p, layers) for p in stretch]
        is_cut = part is None or child in blocks or type(part).__name__.removeprefix("Adaptive").startswith(_POOLING)
        if is_cut or (sum(counts) >= _CHAIN and _count(path, layers)):
            if sum(counts):
                yield stretch[0], stretch[-1]
            stretch = []
        if not is_cut:
            stretch.append(path)


def _count(name: str, layers: set[str]) -> int:
    """Masked layers that are this module or below it."""
    return sum(layer == name or layer.startswith(f"{name}." if name else "") for layer in layers)


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child
