"""What `serve-check` finds: frozen records."""

from __future__ import annotations

from dataclasses import dataclass

from maskplan.pipeline.core.artifacts import TensorSpec
from maskplan.pipeline.core.choices import PASS, GateVerdict
from maskplan.pipeline.core.reports import Check, ParityReport


@dataclass(frozen=True)
class ServedLatency:
    """Latency of a served model under one load, from the client's side.

    Attributes:
        batch: Images of a request; 1 where the batch is part of the input's shape, and a request counts as an image.
        concurrency: Requests in flight: each client sends the next one when it has the response to the last.
        requests: That were measured: those of the last windows.
        failed: Requests of all windows without a response of the model.
        p50_ms: Percentiles of the time from sending a request to its response, in milliseconds.
        images_per_s: Throughput of all clients together.
        windows: Measured windows.
        stable: Whether latency and throughput of the last windows differ by no more than allowed.
        first_failure: What the first failed request got.
    """

    batch: int
    concurrency: int
    requests: int
    failed: int
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    images_per_s: float
    windows: int
    stable: bool
    first_failure: str | None = None


@dataclass(frozen=True)
class ServeReport:
    """Whether a server serves what was deployed.

    Attributes:
        verdict: `pass`, `fail` or `not_applicable`, the last two with a reason.
        url: The server's address.
        server: Its name and version.
        model: Name of the model.
        version: Version that was checked.
        versions: Versions that the server serves.
        platform: `tensorrt_plan`, `onnxruntime_onnx` or another.
        inputs: As the server describes them, with the batch.
        outputs: As the inputs.
        checks: One for each thing that was judged; those of the gate on images are in `parity`.
        latency: One for each load.
        parity: The gate between a model file and the served model, where there are images.
        notes: What a reader should know.
    """

    verdict: GateVerdict
    reason: str | None
    url: str
    server: str
    model: str
    version: int
    versions: tuple[int, ...]
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    checks: tuple[Check, ...]
    latency: tuple[ServedLatency, ...]
    parity: ParityReport | None
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.verdict == PASS
