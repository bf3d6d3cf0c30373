"""Which device PyTorch uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from maskplan.pipeline.core.errors import HostError, InputError

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda")


def choose_device(requested: str) -> torch.device:
    """A device by its name; `auto` is a GPU if PyTorch finds one.

    Raises:
        InputError: Unknown device.
        HostError: A GPU is requested, and PyTorch finds none.
    """
    import torch

    if requested not in DEVICES:
        raise InputError(f"unknown device {requested!r}", fix=f"choose one of {', '.join(DEVICES)}")
    has_gpu = requested != "cpu" and torch.cuda.is_available()
    if requested == "cuda" and not has_gpu:
        raise HostError("PyTorch finds no GPU", fix="choose --device cpu")
    return torch.device("cuda" if has_gpu else "cpu")
