"""GPU clocks under load, sampled with nvidia-smi: a throttled clock explains a slow engine."""

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

# Bits of nvidia-smi's throttle mask (NVML's nvmlClocksEventReasons), without idleness and user settings.
_THROTTLE_REASONS = {
    0x0004: "power cap",
    0x0008: "hardware slowdown",
    0x0010: "sync boost",
    0x0020: "software thermal slowdown",
    0x0040: "hardware thermal slowdown",
    0x0080: "hardware power brake",
}


class ClockWatch:
    """The sampled clocks; None until the block has ended, and without nvidia-smi or a GPU."""

    def __init__(self) -> None:
        self.clocks: GpuClocks | None = None


@contextmanager
def watch_clocks() -> Iterator[ClockWatch]:
    """Sample the GPU that runs the engines with nvidia-smi, five times a second while the block runs."""
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
            output, _ = smi.communicate(timeout=_WAIT_S)
        except subprocess.TimeoutExpired:
            smi.kill()
            output, _ = smi.communicate()
        watch.clocks = parse_clocks(output)


def parse_clocks(output: str) -> GpuClocks | None:
    """Summarize nvidia-smi's lines (the queried values without units); None if no line can be parsed.

    Lines with unsupported values ("[N/A]") and truncated lines are skipped.
    """
    samples = [sample for sample in map(_sample, output.splitlines()) if sample is not None]
    if not samples:
        return None
    sm, memory, masks, celsius, watts = zip(*samples, strict=True)
    throttle_reasons = [reason for bit, reason in _THROTTLE_REASONS.items() if any(mask & bit for mask in masks)]
    return GpuClocks(
        len(samples), median(sm), min(sm), median(memory), tuple(throttle_reasons), max(celsius), max(watts)
    )


def _sample(line: str) -> tuple[float, float, int, float, float] | None:
    try:
        sm, memory, mask, celsius, watts = line.split(",")
        return float(sm), float(memory), int(mask, 16), float(celsius), float(watts)
    except ValueError:
        return None
