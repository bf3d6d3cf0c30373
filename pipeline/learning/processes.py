"""The processes that learn together: this one alone, or several started by torchrun."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import distributed


@dataclass(frozen=True)
class Process:
    """This process among the processes that learn the same masks."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that evaluates, writes files and logs."""
        return self.rank == 0

    def broadcast(self, *values: float) -> list[float]:
        """The main process's values, in every process."""
        if self.count == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.broadcast(shared, 0)
        return [float(v) for v in shared]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.count == 1:
            return flag
        shared = torch.tensor(float(flag), device=self.device)
        distributed.all_reduce(shared, distributed.ReduceOp.MAX)
        return bool(shared)


@contextlib.contextmanager
def join_processes(device_name: str = "auto") -> Iterator[Process]:
    """Join the process group of torchrun, if torchrun started this process; leave it at the end.

    Args:
        device_name: `auto`, `cpu` or `cuda`.
    """
    from maskplan.pipeline.models.device import choose_device

    device = choose_device(device_name)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Process(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Process(distributed.get_rank(), count, device)
    finally:
        distributed.destroy_process_group()
