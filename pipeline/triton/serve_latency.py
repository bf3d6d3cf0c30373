"""Latency of a served model by perf_analyzer's conventions: a fixed number of requests in flight, until it is stable."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.errors import PipelineError
from maskplan.pipeline.core.validation import at_least
from maskplan.pipeline.triton.client import Address, ServedModel, TritonClient
from maskplan.pipeline.triton.serve_report import ServedLatency

# perf_analyzer's: the last three windows count, and are stable if each is within a tenth of their mean.
_WINDOWS = 3
_STABLE = 0.1
_LONGEST = 20

Send = Callable[[], None]
"""Sends one request and returns when its response is there; raises `PipelineError` if there is none."""


@dataclass(frozen=True)
class LoadOptions:
    """Loads to measure, and for how long.

    Attributes:
        batches: Images of a request; none means 1 and the batch that the server prefers.
        concurrency: Requests in flight.
        window_s: Duration of a window, in seconds.
        max_windows: Number of windows after which a load is measured, stable or not.
    """

    batches: tuple[int, ...] = ()
    concurrency: tuple[int, ...] = (1, 4)
    window_s: float = 1.0
    max_windows: int = 10

    def __post_init__(self) -> None:
        for value in self.batches:
            at_least(1, batches=value)
        for value in self.concurrency:
            at_least(1, concurrency=value)
        at_least(0.01, window_s=self.window_s)
        at_least(_WINDOWS, max_windows=self.max_windows)


@dataclass(frozen=True)
class Window:
    """Latencies of the requests that ended within one window, in seconds."""

    latencies_s: tuple[float, ...]
    seconds: float

    @property
    def mean_s(self) -> float:
        return float(np.mean(self.latencies_s)) if self.latencies_s else float("inf")

    @property
    def requests_per_s(self) -> float:
        return len(self.latencies_s) / self.seconds


def is_stable(windows: Sequence[Window]) -> bool:
    """Whether latency and throughput of the last three windows are each within a tenth of their mean."""
    last = windows[-_WINDOWS:]
    if len(last) < _WINDOWS or not all(w.latencies_s for w in last):
        return False
    for values in ([w.mean_s for w in last], [w.requests_per_s for w in last]):
        mean = float(np.mean(values))
        if any(abs(value - mean) > _STABLE * mean for value in values):
            return False
    return True


def measure(
    address: Address,
    timeout_s: float,
    model: ServedModel,
    version: int,
    feeds: Mapping[str, npt.NDArray[Any]],
    batch: int,
    concurrency: int,
    options: LoadOptions,
) -> ServedLatency:
    """Measure one load.

    Args:
        address: The server's.
        timeout_s: Seconds to wait for each response.
        model: The model.
        version: Its version.
        feeds: Inputs of one request, by name.
        batch: Images in it, for the report.
        concurrency: Number of clients.
        options: Windows.
    """
    outputs = [o.name for o in model.outputs]
    clients = [TritonClient(address, timeout_s) for _ in range(concurrency)]

    def sender(client: TritonClient) -> Send:
        def send() -> None:
            client.infer(model.name, feeds, outputs, version)

        return send

    try:
        return run_load([sender(client) for client in clients], batch, options)
    finally:
        for client in clients:
            client.close()


def run_load(senders: Sequence[Send], batch: int, options: LoadOptions) -> ServedLatency:
    """Let every sender send one request after the other until the last windows are stable, or there are too many."""
    load = _Load()
    threads = [threading.Thread(target=load.run, args=(send,), daemon=True) for send in senders]
    windows: list[Window] = []
    for thread in threads:
        thread.start()
    try:
        # The first window warms up.
        for _ in range(options.max_windows + 1):
            started = time.perf_counter()
            time.sleep(options.window_s)
            # A slow model gets longer windows.
            while load.ended < len(senders) and time.perf_counter() - started < _LONGEST * options.window_s:
                time.sleep(options.window_s)
            windows.append(Window(load.taken(), time.perf_counter() - started))
            if is_stable(windows[1:]):
                break
    finally:
        load.stop()
        for thread in threads:
            thread.join()
    measured = windows[1:]
    last = measured[-_WINDOWS:]
    latencies = [s for w in last for s in w.latencies_s] or list(load.taken())
    p50, p90, p95, p99 = np.percentile(latencies, [50, 90, 95, 99]) * 1000 if latencies else np.zeros(4)
    return ServedLatency(
        batch=batch,
        concurrency=len(senders),
        requests=len(latencies),
        failed=load.failed,
        p50_ms=round(float(p50), 4),
        p90_ms=round(float(p90), 4),
        p95_ms=round(float(p95), 4),
        p99_ms=round(float(p99), 4),
        images_per_s=round(batch * sum(len(w.latencies_s) for w in last) / sum(w.seconds for w in last), 2),
        windows=len(measured),
        stable=is_stable(measured),
        first_failure=load.first_failure,
    )


class _Load:
    """What the clients of one load share."""

    def __init__(self) -> None:
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._latencies_s: list[float] = []
        self.failed = 0
        self.first_failure: str | None = None

    def run(self, send: Send) -> None:
        while not self._stopped.is_set():
            started = time.perf_counter()
            try:
                send()
            except PipelineError as error:
                with self._lock:
                    self.failed += 1
                    self.first_failure = self.first_failure or f"{error.what}: {error.found}"
                # A server that refuses everything is not to be flooded.
                self._stopped.wait(0.05)
                continue
            with self._lock:
                self._latencies_s.append(time.perf_counter() - started)

    @property
    def ended(self) -> int:
        """Number of latencies since `taken` was called."""
        return len(self._latencies_s)

    def taken(self) -> tuple[float, ...]:
        """The latencies since the last call."""
        with self._lock:
            taken, self._latencies_s = tuple(self._latencies_s), []
        return taken

    def stop(self) -> None:
        self._stopped.set()
