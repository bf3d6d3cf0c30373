"""Requests lost while a served model changes, and the latency that a server adds to an engine.

    make .venv/.tritonserver && python benchmarks/performance/serving.py

writes serving.json next to this script. `--quick` deploys little and writes nothing.

Lost requests: eight clients send requests to a real Triton server during 50 deployments and 20 rollbacks, for each of
several ways to change the model. Four leave the version to the server, four read the newest version from the model's
metadata and name it (serving_race.py shows that the requests these lose are the server's own). Every output is compared
with both models.

Latency: the bundled digits network and ResNet-20 (random weights) on ONNX Runtime with one thread, at batch 1, called
directly and through the server (HTTP, binary tensors, the backend for ONNX Runtime in tests/support).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from serving_race import GAP_S, MODEL, Counted, Kind, add_version, clients, graph, wait_for, write_model

from maskplan.engines.build import BuildOptions, build_engine, open_engine
from maskplan.engines.sidecar import read_engine
from maskplan.exporters.metadata import describe_onnx
from maskplan.exporters.onnx_export import ExportOptions, export_onnx
from maskplan.pipeline.core.artifacts import Profile
from maskplan.pipeline.core.files import write_json
from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
from maskplan.pipeline.report.write import versions
from maskplan.pipeline.timing.compare_latency import cpu_name
from maskplan.pipeline.triton.client import TritonClient, parse_address
from maskplan.pipeline.triton.config import Serving
from maskplan.pipeline.triton.deploy import DeployOptions, deploy
from maskplan.pipeline.triton.rollback import rollback
from maskplan.pipeline.triton.serve_latency import LoadOptions, measure, run_load

sys.path.append(str(Path(__file__).parents[2] / "tests" / "support"))

from triton_server import TritonServer, missing, triton_server

RESNET20 = f"{Path(__file__).parents[1] / 'accuracy' / 'models.py'}:resnet20"
DEPLOYMENTS, ROLLBACKS = 50, 20
CLIENTS: list[Kind] = ["unnamed", "named"] * 4
NUMBERS = (1, 2)


@dataclass(frozen=True)
class Way:
    """A way to change a served model.

    Attributes:
        name: For the table.
        control: The server's model control: `poll` or `explicit`.
        add: Makes the model with this number the served one; called with the repository and the model's next version.
        undo: Undoes the last change.
    """

    name: str
    control: str
    add: Callable[[Path, int, int], None]
    undo: Callable[[Path, int], None]


def by_maskplan(engines: dict[int, Path], keep_versions: int | None) -> tuple[Any, Any]:
    """`maskplan deploy` and its rollback."""

    def add(repository: Path, _: int, number: int) -> None:
        deploy(engines[number], DeployOptions(repository, MODEL, keep_versions=keep_versions))

    return add, lambda repository, _: rollback(repository, MODEL)


def by_deploying_again(engines: dict[int, Path]) -> tuple[Any, Any]:
    """`maskplan deploy`, of the earlier version's file to go back to it."""
    served: list[Path] = []

    def add(repository: Path, _: int, number: int) -> None:
        done = deploy(engines[number], DeployOptions(repository, MODEL))
        served.append(done.folder / str(done.version) / "model.onnx")

    def undo(repository: Path, _: int) -> None:
        served.pop()
        deploy(served[-1], DeployOptions(repository, MODEL))

    return add, undo


def by_folders(served: int) -> tuple[Any, Any]:
    """Version folders and the policy `latest`; a rollback takes the folder away."""

    def add(repository: Path, version: int, number: int) -> None:
        if version == 1:
            write_model(repository, served)
        add_version(repository, version, number)

    def undo(repository: Path, version: int) -> None:
        (repository / MODEL / str(version)).rename(repository / MODEL / f".{version}")

    return add, undo


def in_place() -> tuple[Any, Any]:
    """The file of version 1 is replaced, atomically."""
    before: list[bytes] = []

    def add(repository: Path, version: int, number: int) -> None:
        if version == 1:
            write_model(repository, 1)
            add_version(repository, 1, number)
        else:
            before.append((repository / MODEL / "1" / "model.onnx").read_bytes())
            replace(repository, graph(number))

    def replace(repository: Path, data: bytes) -> None:
        (repository / MODEL / "1" / ".new").write_bytes(data)
        (repository / MODEL / "1" / ".new").rename(repository / MODEL / "1" / "model.onnx")

    return add, lambda repository, _: replace(repository, before.pop())


def steps(deployments: int, rollbacks: int) -> list[str]:
    """After the first deployment: two deployments and a rollback, as often as there are rollbacks, then the rest."""
    return ["add", "add", "undo"] * rollbacks + ["add"] * (deployments - 2 * rollbacks - 1)


def lose(way: Way, deployments: int, rollbacks: int) -> dict[str, Any]:
    """Change the model under load and count."""
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "models"
        repository.mkdir()
        way.add(repository, 1, NUMBERS[0])
        options = ("--load-model=*",) if way.control == "explicit" else ()
        with triton_server(repository, *options, control=way.control) as server:
            wait_for(server.http, lambda number: number == NUMBERS[0])
            started = time.monotonic()
            with clients(server.http, CLIENTS) as counted:
                lost_in = change(way, repository, server, steps(deployments, rollbacks), counted)
            seconds = time.monotonic() - started
            failed_loads = sum("failed to load" in line for line in server.log().splitlines())
    result = {
        "way": way.name,
        "control": way.control,
        "deployments": deployments,
        "rollbacks": rollbacks,
        "seconds": round(seconds, 1),
        "failed_loads": failed_loads,
        "clients": {kind: {**counts(got), "lost_in_rollbacks": lost_in["undo", kind]} for kind, got in counted.items()},
    }
    print(result, flush=True)
    return result


def change(
    way: Way, repository: Path, server: TritonServer, plan: Sequence[str], counted: dict[Kind, Counted]
) -> Counter[tuple[str, Kind]]:
    """Carry out the steps, each when the server has taken the last; how many requests were lost in which kind of step."""
    generator, version, numbers = random.Random(1), 1, [NUMBERS[0]]
    lost: Counter[tuple[str, Kind]] = Counter()
    for step in plan:
        before = {kind: sum(got.refused.values()) for kind, got in counted.items()}
        if step == "add":
            version += 1
            numbers.append(NUMBERS[NUMBERS[0] == numbers[-1]])
            way.add(repository, version, numbers[-1])
        else:
            way.undo(repository, version)
            numbers.pop()
        if way.control == "explicit":
            server.load(MODEL)
        wait_for(server.http, lambda number, expected=numbers[-1]: number == expected)  # type: ignore[misc]
        time.sleep(generator.uniform(0.1, 0.6))
        for kind, got in counted.items():
            lost[step, kind] += sum(got.refused.values()) - before[kind]
    return lost


def counts(got: Counted) -> dict[str, Any]:
    answers = {str(number): count for number, count in got.answers.items() if number in NUMBERS}
    return {
        "answered": sum(answers.values()),
        "by_model": dict(sorted(answers.items())),
        "other_answers": sum(got.answers.values()) - sum(answers.values()),
        "lost": sum(got.refused.values()),
        "lost_by_status": {str(status): count for status, count in got.refused.items()},
        "messages": got.messages[:2],
    }


def latency(name: str, source: str, folder: Path, loads: LoadOptions) -> dict[str, Any]:
    """Batch 1 directly and through the server, with and without the wait for a fuller batch."""
    module, made = open_checkpoint(ModelOptions(source, "random" if ":" in source else "auto"))
    (onnx,) = export_onnx(module, made, ExportOptions(), {"fp32": folder / "model.onnx"})
    record = build_engine(onnx, BuildOptions("onnxruntime", (Profile(1, 8, 8),)), folder / "engine.onnx")
    spec = record.inputs[0]
    feeds = {spec.name: np.random.default_rng(1).standard_normal([d or 1 for d in spec.shape]).astype(spec.dtype)}
    engine = open_engine(read_engine(record.path))
    rows = {"engine called directly": run_load([lambda: void(engine.infer(feeds))], 1, loads)}
    engine.close()
    for delay_us in (1000, 0):
        repository = folder / f"models{delay_us}"
        serving = Serving(queue_delay_us=delay_us, preferred_batches=(8,))
        deploy(record.path, DeployOptions(repository, MODEL, allow_untrained=True, serving=serving))
        with triton_server(repository, "--load-model=*") as server:
            address = parse_address(server.http)
            with TritonClient(address, 60) as client:
                served = client.model(MODEL)
            for concurrency in (1, 8):
                rows[f"server, queue delay {delay_us} us, {concurrency} in flight"] = measure(
                    address, 60, served, 1, feeds, 1, concurrency, loads
                )
    fields = ("p50_ms", "p90_ms", "p99_ms", "images_per_s", "requests", "failed", "stable")
    result = {"model": name, "batch": 1, "rows": {row: {f: getattr(r, f) for f in fields} for row, r in rows.items()}}
    print(result, flush=True)
    return result


def void(_: object) -> None:
    """Drop a value."""


def lost_requests(work: Path, quick: bool) -> list[dict[str, Any]]:
    """Every way to change the model."""
    engines = {}
    for number in NUMBERS:
        (work / f"{number}.onnx").write_bytes(graph(number))
        options = BuildOptions("onnxruntime", (Profile(1, 8, 8),))
        engines[number] = build_engine(describe_onnx(work / f"{number}.onnx"), options, work / f"e{number}.onnx").path
    ways = [
        Way("maskplan deploy", "poll", *by_maskplan(engines, None)),
        Way("maskplan deploy", "explicit", *by_maskplan(engines, None)),
        Way("maskplan deploy --keep-versions 1", "poll", *by_maskplan(engines, 1)),
        Way("maskplan deploy --keep-versions 1", "explicit", *by_maskplan(engines, 1)),
        Way("maskplan deploy, of the earlier file to go back", "poll", *by_deploying_again(engines)),
        Way("version folders, latest 1", "poll", *by_folders(1)),
        Way("version folders, latest 2", "poll", *by_folders(2)),
        Way("the file replaced in place", "poll", *in_place()),
    ]
    if quick:
        return [lose(way, 4, 1) for way in ways[:2]]
    return [lose(way, DEPLOYMENTS, ROLLBACKS) for way in ways]


def latencies(work: Path, quick: bool) -> list[dict[str, Any]]:
    """Both networks."""
    rows = []
    for name, source in (("digits_resnet", "digits_resnet"), ("resnet20", RESNET20)):
        (work / name).mkdir()
        rows.append(latency(name, source, work / name, LoadOptions(window_s=0.3 if quick else 2.0)))
    return rows


PARTS: dict[str, Callable[[Path, bool], list[dict[str, Any]]]] = {
    "lost_requests": lost_requests,
    "latency": latencies,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few deployments, and nothing is written")
    parser.add_argument("--part", choices=PARTS, help="measure this part only, and keep the other one's results")
    given = parser.parse_args()
    if missing():
        sys.exit(missing())
    out = Path(__file__).with_suffix(".json")
    result: dict[str, Any] = json.loads(out.read_text()) if given.part else {}
    result |= {
        "command": "python benchmarks/performance/serving.py",
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "versions": {**versions(), "triton": "2.51.0 (nvidia-pytriton 0.7.0)"},
        "clients": {"unnamed": CLIENTS.count("unnamed"), "named": CLIENTS.count("named"), "gap_s": GAP_S},
    }
    for part in [given.part] if given.part else PARTS:
        load_before = round(os.getloadavg()[0], 2)
        with tempfile.TemporaryDirectory() as folder:
            rows = PARTS[part](Path(folder), given.quick)
        result[part] = {"load_before": load_before, "rows": rows}
    if not given.quick:
        write_json(out, result)


if __name__ == "__main__":
    main()
