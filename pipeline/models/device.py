"""Where PyTorch computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from maskplan.pipeline.core.errors import HostError, InputError

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda")


def choose_device(asked: str) -> torch.device:
    """A device by its name; `auto` is a GPU where PyTorch sees one.

    Raises:
        InputError: No such device.
        HostError: A GPU is asked for, and there is none.
    """
    import torch

    if asked not in DEVICES:
        raise InputError(f"unknown device {asked!r}", fix=f"choose one of {', '.join(DEVICES)}")
    found = torch.cuda.is_available() if asked != "cpu" else False
    if asked == "cuda" and not found:
        raise HostError("PyTorch sees no GPU", fix="choose --device cpu")
    return torch.device("cuda" if found else "cpu")
