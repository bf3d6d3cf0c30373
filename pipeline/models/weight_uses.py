"""Which operators read which weights, from the data flow of one forward pass: as stored, or computed from them first.

PyTorch's operators are recorded while the module runs, as in an exported graph, but also for modules that cannot be
exported. A tensor is a weight if it depends on parameters, buffers and constants only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from torch import nn

_FACTORS: Mapping[str, tuple[int, int]] = {
    "mm": (0, 1),
    "bmm": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
    "linear": (0, 1),
    "mv": (0, 1),
    "addmv": (1, 2),
}
"""The positions of the two factors of a matrix product."""
_COPIES = frozenset(("clone", "contiguous", "detach", "alias", "lift_fresh", "lift_fresh_copy", "_to_copy", "copy"))


@dataclass(frozen=True)
class WeightUse:
    """An operator that multiplies activations by a weight.

    Attributes:
        order: Number of the operator in the forward pass.
        names: The parameters that the weight is, or is computed from.
        is_stored: The operator reads the parameter as it is stored, at most transposed or in whole filters.
        macs: Multiply-accumulates.
        operator: The name of ATen's operator, such as `convolution`.
        inside: Path of the innermost leaf module that was running; None outside of leaf modules.
        arguments: The operator's arguments; tensors are None unless the recorder keeps them.
    """

    order: int
    names: frozenset[str]
    is_stored: bool
    macs: int
    operator: str
    inside: str | None
    arguments: Sequence[Any]


@dataclass(frozen=True)
class _Origin:
    """What a memory address holds: a parameter or a copy of one (then `whole` is that tensor), or what is computed."""

    names: frozenset[str]
    whole: torch.Tensor | None


class WeightUses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record the uses of a module's weights while it runs in this context.

    Args:
        module: The module that runs.
        keep_tensors: Keep the operators' arguments, and with them all activations, in memory.

    Attributes:
        uses: In the order of the forward pass.
        running: Paths of the leaf modules that are running, the innermost last.
    """

    def __init__(self, module: nn.Module, *, keep_tensors: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.uses: list[WeightUse] = []
        self.running: list[str] = []
        self._keep_tensors = keep_tensors
        self._operators = 0
        self._origins: dict[int, _Origin] = {}
        # Weights that are computed stay in memory, so that no other tensor gets their address.
        self._kept: list[torch.Tensor] = []
        parameters = dict(module.named_parameters(remove_duplicate=False))
        by_address: dict[int, set[str]] = {}
        for name, parameter in parameters.items():
            by_address.setdefault(_address(parameter), set()).add(name)
        for address, names in by_address.items():
            self._origins[address] = _Origin(frozenset(names), parameters[next(iter(names))])
        constants = [b for b in module.buffers() if isinstance(b, torch.Tensor)]
        constants += [v for m in module.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]
        for constant in constants:
            self._origins.setdefault(_address(constant), _Origin(frozenset(), None))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and record it."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        self._operators += 1
        name = func._schema.name.removeprefix("aten::")
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        origins = [self._origins.get(_address(t)) for t in inputs]
        if all(origin is not None for origin in origins):
            self._add_weight(name, inputs, [o for o in origins if o is not None], output)
        else:
            self._add_use(name, args, inputs, output)
        return output

    def _add_weight(self, name: str, inputs: list[torch.Tensor], origins: list[_Origin], output: Any) -> None:
        """All inputs are weights or constants, so the outputs are weights."""
        names = frozenset[str]().union(*(o.names for o in origins))
        is_copy = name in _COPIES and len(inputs) == 1 and _is_whole(inputs[0], origins[0].whole)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and _address(tensor) not in self._origins:
                self._origins[_address(tensor)] = _Origin(names, tensor if is_copy else None)
                self._kept.append(tensor)

    def _add_use(self, name: str, args: Any, inputs: list[torch.Tensor], output: Any) -> None:
        """Some inputs are activations."""
        first = next((t for t in tree_leaves(output) if isinstance(t, torch.Tensor)), None)
        if first is None:
            return
        if name == "convolution":
            # Each output element costs the weights of one filter; in a transposed convolution, each input element does.
            elements = args[0] if args[6] else first
            self._record(name, args[1], 1, elements.numel() * args[1][0].numel(), args)
        elif name in _FACTORS and len(args) > _FACTORS[name][1]:
            left, right = (args[i] for i in _FACTORS[name])
            macs = first.numel() * left.shape[-1]
            self._record(name, left, left.ndim - 1, macs, args)
            self._record(name, right, right.ndim - (1 if name == "linear" or right.ndim == 1 else 2), macs, args)
        else:
            for tensor in inputs:
                origin = self._origins.get(_address(tensor))
                if origin is not None and origin.names and tensor.ndim > 1:
                    self._append(name, origin.names, 0, args, is_stored=False)

    def _record(self, name: str, weight: torch.Tensor, axis: int, macs: int, args: Any) -> None:
        origin = self._origins.get(_address(weight))
        if origin is not None and origin.names:
            is_stored = origin.whole is not None and _keeps_groups(weight, axis, origin.whole)
            self._append(name, origin.names, macs, args, is_stored=is_stored)

    def _append(self, name: str, names: frozenset[str], macs: int, args: Any, *, is_stored: bool) -> None:
        arguments = args if self._keep_tensors else [None if isinstance(a, torch.Tensor) else a for a in args]
        inside = self.running[-1] if self.running else None
        self.uses.append(WeightUse(self._operators, names, is_stored, macs, name, inside, arguments))


def _is_whole(tensor: torch.Tensor, whole: torch.Tensor | None) -> bool:
    return whole is not None and tensor.shape == whole.shape and tensor.stride() == whole.stride()


def _keeps_groups(weight: torch.Tensor, axis: int, whole: torch.Tensor) -> bool:
    """Whether an operator that sums over this axis sums over the second axis of the whole weight, and all of it.

    Then the operator's groups are the mask's groups. `weight` is a view: the whole, some filters, or a matrix of it.
    """
    if whole.ndim < 2 or weight.shape[axis] != whole.shape[1] or weight.stride(axis) != whole.stride(1):
        return False
    if weight.ndim == whole.ndim and axis == 1:
        return weight.shape[2:] == whole.shape[2:] and weight.stride()[2:] == whole.stride()[2:]
    # A product reads the matrix of a linear layer, or of a 1x1 convolution.
    return weight.ndim in (2, 3) and all(size == 1 for size in whole.shape[2:])


def run_recorded(
    module: nn.Module, images: torch.Tensor, *, keep_tensors: bool = False
) -> tuple[Any, tuple[WeightUse, ...]]:
    """Run a module in evaluation mode; return its output and the uses of its weights.

    Raises:
        Exception: Any that the module's code raises.
    """
    recorder = WeightUses(module, keep_tensors=keep_tensors)

    def enter(path: str) -> Any:
        return lambda *_: recorder.running.append(path)

    def leave(*_: Any) -> None:
        recorder.running.pop()

    leaves = [(path, m) for path, m in module.named_modules() if not any(True for _ in m.children())]
    hooks = [m.register_forward_pre_hook(enter(path)) for path, m in leaves]
    hooks += [m.register_forward_hook(leave) for _, m in leaves]
    try:
        with torch.no_grad(), _without_fused_attention(), torch.compiler.set_stance("force_eager"), recorder:
            output = module.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
    return output, tuple(recorder.uses)


@contextmanager
def _without_fused_attention() -> Iterator[None]:
    """One operator for a whole attention layer would hide which of its weights are multiplied."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (RuntimeError, NotImplementedError):
        return id(tensor)
