"""Ask a running server whether what it serves is what was deployed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import TensorSpec
from maskplan.pipeline.core.choices import FAIL, NOT_APPLICABLE, PASS, GateVerdict
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.reports import Check, ParityReport
from maskplan.pipeline.core.validation import at_least
from maskplan.pipeline.triton.client import KSERVE_NAMES, Address, ServedModel, TritonClient
from maskplan.pipeline.triton.deployed import Deployed, GoldenPair
from maskplan.pipeline.triton.pbtxt import quoted
from maskplan.pipeline.triton.serve_latency import LoadOptions, measure
from maskplan.pipeline.triton.serve_report import ServedLatency, ServeReport
from maskplan.pipeline.triton.served_engine import ServedEngine

_SEED = 1


@dataclass(frozen=True)
class ServeCheckOptions:
    """What to judge.

    Attributes:
        tolerance: Allowed difference from the golden output, as a share of its largest value; None is the golden pair's own.
        max_p99_ms: Largest allowed 99th percentile of the latency under any load, in milliseconds; None is not judged.
        timeout_s: Seconds to wait for each response.
        loads: Loads to measure; None measures none.
    """

    tolerance: float | None = None
    max_p99_ms: float | None = None
    timeout_s: float = 60.0
    loads: LoadOptions | None = field(default_factory=LoadOptions)

    def __post_init__(self) -> None:
        at_least(0, tolerance=self.tolerance, max_p99_ms=self.max_p99_ms)
        at_least(0.001, timeout_s=self.timeout_s)


def find_served(
    client: TritonClient, model: str, version: int | None, deployed: Deployed | None
) -> tuple[ServedModel, int]:
    """The model on the server and the version to check, which are those that were deployed.

    Raises:
        InputError: The server serves something else under this name; every difference is listed.
    """
    # First, so that another server is not mistaken for one without the model.
    client.server()
    served = client.model(model)
    expected = version if version is not None else deployed.version if deployed is not None else served.versions[-1]
    if deployed is not None:
        problems = _differences(served, deployed, newest=version is None)
        if problems:
            raise InputError(
                "the server does not serve what was deployed",
                where=f"{model} of {client.address}",
                found="\n".join(problems),
                fix="a server that polls needs a moment, others have to load the model again; its log says why it did not;"
                " check --url and --repository",
            )
    if expected not in served.versions:
        raise InputError(
            f"the server does not serve version {expected}",
            where=f"{model} of {client.address}",
            found=f"versions {', '.join(map(str, served.versions))}",
            fix="check --version",
        )
    return served, expected


def check_served(
    client: TritonClient,
    served: ServedModel,
    version: int,
    deployed: Deployed | None,
    options: ServeCheckOptions,
    parity: ParityReport | None = None,
) -> ServeReport:
    """Send the golden input, measure latency, and judge.

    Args:
        client: Connection to the server.
        served: The model on it.
        version: Its version.
        deployed: What was deployed, where known.
        options: What to judge.
        parity: The gate on images through the server, where there are any.

    Raises:
        InputError: The server does not respond, or refuses the golden input.
    """
    golden = deployed.golden if deployed is not None else None
    checks: list[Check] = [] if golden is None else [_golden(client, served, version, golden, options)]
    notes = [] if golden is not None else ["no golden pair: the outputs were not compared with those of the engine"]
    latency = _latency(client.address, served, version, golden, options, notes)
    if latency:
        checks.append(_failures(latency))
    if options.max_p99_ms is not None:
        checks.append(_p99(latency, options.max_p99_ms))
    verdict, reason = _verdict(checks, golden, parity)
    return ServeReport(
        verdict=verdict,
        reason=reason,
        url=str(client.address),
        server=client.server(),
        model=served.name,
        version=version,
        versions=served.versions,
        platform=served.platform,
        inputs=served.inputs,
        outputs=served.outputs,
        checks=tuple(checks),
        latency=latency,
        parity=parity,
        notes=tuple(notes),
    )


def difference(output: npt.NDArray[Any], golden: npt.NDArray[Any]) -> float:
    """Largest difference as a share of the golden array's largest magnitude; infinite for a different shape or NaN."""
    if output.shape != golden.shape:
        return float("inf")
    expected = golden.astype(np.float64)
    with np.errstate(invalid="ignore"):
        largest = float(np.abs(output.astype(np.float64) - expected).max(initial=0.0))
    share = largest / max(float(np.abs(expected).max(initial=0.0)), 1e-6)
    return share if np.isfinite(share) else float("inf")


def _differences(served: ServedModel, deployed: Deployed, *, newest: bool) -> list[str]:
    """How the served model differs from the deployed one: versions, platform, inputs and outputs."""
    problems = []
    shown = ", ".join(map(str, served.versions)) or "none"
    if deployed.config is None:
        last = served.versions[-1:] == (deployed.version,)
        if not (last if newest else deployed.version in served.versions):
            problems.append(f"versions {shown}, and the golden pair is of version {deployed.version}")
    elif served.versions != deployed.versions:
        problems.append(f"versions {shown} instead of {', '.join(map(str, deployed.versions))}")
    if deployed.config is not None:
        if deployed.config.platform not in ("", served.platform):
            problems.append(f"{served.platform} instead of {deployed.config.platform}")
        tensors = {
            f"{kind} {quoted(spec.name)}": _type_and_shape(spec)
            for kind, specs in (("input", served.inputs), ("output", served.outputs))
            for spec in specs
        }
        expected = deployed.config.tensors
        problems += [
            f"{name}: {tensors.get(name, 'none')} instead of {expected.get(name, 'none')}"
            for name in {**expected, **tensors}
            if tensors.get(name) != expected.get(name)
        ]
    if deployed.golden is not None:
        for kind, arrays, specs in (
            ("input", deployed.golden.feeds, served.inputs),
            ("output", deployed.golden.outputs, served.outputs),
        ):
            problems += _golden_misfits(kind, arrays, specs)
    return problems


def _golden_misfits(kind: str, arrays: Mapping[str, npt.NDArray[Any]], specs: tuple[TensorSpec, ...]) -> list[str]:
    known = {spec.name: spec for spec in specs}
    problems = []
    for name, array in arrays.items():
        spec = known.get(name)
        if spec is None:
            problems.append(f"no {kind} {quoted(name)}, which the golden pair has")
        elif (
            spec.dtype != array.dtype.name
            or len(spec.shape) != array.ndim
            or any(d not in (None, n) for d, n in zip(spec.shape, array.shape, strict=True))
        ):
            found = f"{array.dtype.name} {list(array.shape)}"
            problems.append(f"{kind} {quoted(name)}: {_type_and_shape(spec)}, and the golden pair has {found}")
    return problems


def _type_and_shape(spec: TensorSpec) -> str:
    """As in `ServedConfig.tensors`."""
    dims = ", ".join("-1" if d is None else str(d) for d in spec.shape)
    return f"TYPE_{KSERVE_NAMES.get(spec.dtype, spec.dtype)} [{dims}]"


def _golden(
    client: TritonClient, served: ServedModel, version: int, golden: GoldenPair, options: ServeCheckOptions
) -> Check:
    outputs = ServedEngine(client, served, version).infer(golden.feeds)
    share, worst = max((difference(outputs[name], array), name) for name, array in golden.outputs.items())
    limit = golden.tolerance if options.tolerance is None else options.tolerance
    message = f"{worst}: the largest difference is {share:.2g} of the largest golden value; {limit:g} is allowed"
    value = share if np.isfinite(share) else None
    return Check("golden", limit, value, value, share <= limit, message)


def _latency(
    address: Address,
    served: ServedModel,
    version: int,
    golden: GoldenPair | None,
    options: ServeCheckOptions,
    notes: list[str],
) -> tuple[ServedLatency, ...]:
    if options.loads is None:
        return ()
    feeds = golden.feeds if golden is not None else _noise(served)
    if feeds is None:
        notes.append("no latency: the inputs' sizes are dynamic, and there is no golden input")
        return ()
    batches = options.loads.batches or _batches(served)
    measured = []
    for batch in batches:
        if batch > max(served.max_batch, 1):
            raise InputError(
                f"the server does not accept batches of {batch}",
                where=f"{served.name} of {address}",
                found=f"at most {served.max_batch}" if served.max_batch else "its batch is fixed",
                fix="choose others with --batch",
            )
        arrays = (
            {name: np.repeat(array[:1], batch, axis=0) for name, array in feeds.items()} if served.max_batch else feeds
        )
        for concurrency in options.loads.concurrency:
            measured.append(
                measure(address, options.timeout_s, served, version, arrays, batch, concurrency, options.loads)
            )
    return tuple(measured)


def _batches(served: ServedModel) -> tuple[int, ...]:
    """One image, and the batch that the server forms: the largest preferred one, else the largest."""
    preferred = max(served.preferred_batches, default=served.max_batch)
    return tuple(sorted({1, max(preferred, 1)}))


def _noise(served: ServedModel) -> dict[str, npt.NDArray[Any]] | None:
    generator, arrays = np.random.default_rng(_SEED), {}
    for spec in served.inputs:
        shape = spec.shape if not served.max_batch else (1, *spec.shape[1:])
        if any(d is None for d in shape) or spec.dtype not in KSERVE_NAMES:
            return None
        arrays[spec.name] = generator.standard_normal([d or 0 for d in shape]).astype(spec.dtype)
    return arrays


def _failures(latency: tuple[ServedLatency, ...]) -> Check:
    failed = sum(load.failed for load in latency)
    first = next((load.first_failure for load in latency if load.first_failure), "")
    total = failed + sum(load.requests for load in latency)
    message = f"{failed} of {total} requests failed" + (f", the first with: {first}" if failed else "")
    return Check("failed_requests", 0.0, float(failed), float(failed), failed == 0, message)


def _p99(latency: tuple[ServedLatency, ...], limit: float) -> Check:
    loads = [load for load in latency if load.requests]
    if not loads:
        return Check("max_p99_ms", limit, None, None, None, "not judged: no latency was measured")
    worst = max(loads, key=lambda load: load.p99_ms)
    message = (
        f"99% of the responses within {worst.p99_ms:.3g} ms at batch {worst.batch} with {worst.concurrency} in flight;"
        f" the limit is {limit:g}"
    )
    return Check("max_p99_ms", limit, worst.p99_ms, worst.p99_ms, worst.p99_ms <= limit, message)


def _verdict(
    checks: list[Check], golden: GoldenPair | None, parity: ParityReport | None
) -> tuple[GateVerdict, str | None]:
    problems = [f"{c.name}: {c.message}" for c in checks if c.passed is False]
    if parity is not None and parity.verdict == FAIL:
        problems.append(parity.reason or "")
    if problems:
        return FAIL, "; ".join(problems)
    unjudged = [c.message for c in checks if c.passed is None]
    if parity is not None and parity.verdict == NOT_APPLICABLE:
        unjudged.append(parity.reason or "")
    if golden is None and parity is None:
        unjudged.append("nothing to compare outputs with: give a --repository with a golden pair, or --data")
    return (NOT_APPLICABLE, "; ".join(unjudged)) if unjudged else (PASS, None)
