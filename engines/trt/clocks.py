"""The GPU's clocks while it works, as nvidia-smi sees them: a slow clock explains a slow engine."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from maskplan.engines.trt.cuda import pci_bus_id
from maskplan.pipeline.core.errors import HostError
from maskplan.pipeline.core.reports import GpuClocks

_QUERY = "clocks.sm,clocks.mem,clocks_throttle_reasons.active,temperature.gpu,power.draw"
_EVERY_MS = 200
_WAIT_S = 5.0

# Bits of nvidia-smi's mask of reasons (NVML's nvmlClocksEventReasons); an idle GPU and settings of its owner are no fault.
_REASONS = {
    0x0004: "power cap",
    0x0008: "hardware slowdown",
    0x0010: "sync boost",
    0x0020: "software thermal slowdown",
    0x0040: "hardware thermal slowdown",
    0x0080: "hardware power brake",
}


class ClockWatch:
    """What was seen of the clocks; None until the watch has ended, and where nvidia-smi or the GPU is not there."""

    def __init__(self) -> None:
        self.clocks: GpuClocks | None = None


@contextmanager
def watch_clocks() -> Iterator[ClockWatch]:
    """Have nvidia-smi look at the GPU that engines run on, five times a second for as long as the block runs."""
    watch = ClockWatch()
    try:
        command = ["nvidia-smi", f"--id={pci_bus_id()}", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
        smi = subprocess.Popen(
            [*command, f"--loop-ms={_EVERY_MS}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except (OSError, HostError):
        yield watch
        return
    try:
        yield watch
    finally:
        smi.terminate()
        try:
            told, _ = smi.communicate(timeout=_WAIT_S)
        except subprocess.TimeoutExpired:
            smi.kill()
            told, _ = smi.communicate()
        watch.clocks = clocks_of(told)


def clocks_of(told: str) -> GpuClocks | None:
    """Sum up nvidia-smi's lines, values of the query without units; None where no line can be read.

    A value that the GPU does not tell ("[N/A]") leaves its line out, as does a line that was cut short.
    """
    samples = [sample for sample in map(_sample, told.splitlines()) if sample is not None]
    if not samples:
        return None
    sm, memory, masks, celsius, watts = zip(*samples, strict=True)
    held = [reason for bit, reason in _REASONS.items() if any(mask & bit for mask in masks)]
    return GpuClocks(len(samples), median(sm), min(sm), median(memory), tuple(held), max(celsius), max(watts))


def _sample(line: str) -> tuple[float, float, int, float, float] | None:
    try:
        sm, memory, mask, celsius, watts = line.split(",")
        return float(sm), float(memory), int(mask, 16), float(celsius), float(watts)
    except ValueError:
        return None
