"""The real server polls a repository while clients send requests and deployments come, go, fail and are killed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from triton_server import TritonServer, missing, triton_server

from maskplan.engines.build import BuildOptions, build_engine
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.core.artifacts import Profile
from maskplan.pipeline.core.errors import HostError
from maskplan.pipeline.triton.deploy import DeployOptions, deploy
from maskplan.pipeline.triton.rollback import rollback

sys.path.append(str(Path(__file__).parents[3] / "benchmarks" / "performance"))

from serving_race import MODEL, Counted, Kind, clients, graph, wait_for

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "-")

# Deploys again and again, each time in a child that is killed after a random time, and prints how many children ended first.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from maskplan.pipeline.triton.deploy import DeployOptions, deploy

engines, options = [Path(p) for p in sys.argv[2:4]], DeployOptions(Path(sys.argv[1]), sys.argv[4])
moments, pause_s = int(sys.argv[5]), float(sys.argv[6])
started = time.monotonic()
if not (child := os.fork()):
    deploy(engines[1], options)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
longest, generator, whole = time.monotonic() - started, random.Random(17), 0
for moment in range(moments):
    if not (child := os.fork()):
        deploy(engines[moment % 2], options)
        os._exit(0)
    # Beyond the first one's time: under load the others take longer, and some must end.
    time.sleep(generator.uniform(0, 2 * longest))
    os.kill(child, signal.SIGKILL)
    whole += os.waitpid(child, 0)[1] == 0
    time.sleep(generator.uniform(0.5, 1.5) * pause_s)
print(whole)
"""


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Engines by the number that they add to their input."""
    folder, made = tmp_path_factory.mktemp("engines"), {}
    for number in (1, 2):
        (folder / f"{number}.onnx").write_bytes(graph(number))
        options = BuildOptions("onnxruntime", (Profile(1, 8, 8),))
        made[number] = build_engine(describe_onnx(folder / f"{number}.onnx"), options, folder / f"e{number}.onnx").path
    return made


@pytest.fixture(scope="module")
def other_disk(engines: dict[int, Path]) -> Iterator[Path]:
    """A folder on another file system than the engines', if there is one: in memory, where times have steps."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def polling(engines: dict[int, Path], other_disk: Path) -> Iterator[tuple[TritonServer, Path]]:
    """A polling server and its repository, in which the first engine is served."""
    repository = other_disk / "models"
    deploy(engines[1], DeployOptions(repository, MODEL))
    with triton_server(repository, control="poll") as server:
        wait_for(server.http, lambda number: number == 1)
        yield server, repository


def is_number(expected: int) -> Callable[[int | None], bool]:
    return lambda number: number == expected


def assert_all_answered(counted: dict[Kind, Counted]) -> None:
    """No request without a version was lost, and each answer is that of one of the engines."""
    assert (dict(counted["unnamed"].refused), counted["unnamed"].messages) == ({}, [])
    for got in counted.values():
        assert set(got.answers) <= {1, 2}
        assert sum(got.answers.values()) > 20


def assert_nothing_failed(server: TritonServer) -> None:
    """The server has never failed to load a version or to read a config."""
    lines = server.log().splitlines()
    wrong = [line for line in lines if "failed to" in line.lower() and "pinned" not in line and "NVML" not in line]
    assert wrong == []
    assert not [
        line for line in lines if line.startswith("E") and "CudaDriverHelper" not in line and "NVML" not in line
    ]


def test_no_request_is_lost_by_deployments_and_rollbacks(
    polling: tuple[TritonServer, Path], engines: dict[int, Path]
) -> None:
    server, repository = polling
    with clients(server.http, ["unnamed", "named"] * 2) as counted:
        for number in (2, 1, 2):
            deploy(engines[number], DeployOptions(repository, MODEL))
            wait_for(server.http, is_number(number))
        # Only the version that a rollback withdraws may be refused to a client that names it.
        before_rollback = dict(counted["named"].refused)
        rollback(repository, MODEL)
        wait_for(server.http, is_number(1))
    assert before_rollback == {}
    assert_all_answered(counted)
    assert_nothing_failed(server)


def test_a_version_taken_back_while_the_server_loads_it_is_loaded_in_peace(
    polling: tuple[TritonServer, Path], engines: dict[int, Path]
) -> None:
    server, repository = polling
    with clients(server.http, ["unnamed"] * 2) as counted:
        deploy(engines[2], DeployOptions(repository, MODEL))
        loading = f"loading: {MODEL}:{max(int(p.name) for p in (repository / MODEL).glob('[0-9]*'))}"
        end = time.monotonic() + 20
        while loading not in server.log() and time.monotonic() < end:
            time.sleep(0.01)
        rollback(repository, MODEL)
        time.sleep(1.5)
        wait_for(server.http, is_number(1))
    assert_all_answered(counted)
    assert_nothing_failed(server)


def kill_deployments(repository: Path, engines: dict[int, Path], moments: int, pause_s: float) -> int:
    command = [sys.executable, "-c", KILLED, repository, engines[1], engines[2], MODEL, str(moments), str(pause_s)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_server_never_sees_a_part_of_a_killed_deployment(
    polling: tuple[TritonServer, Path], engines: dict[int, Path]
) -> None:
    server, repository = polling
    with clients(server.http, ["unnamed"] * 2) as counted:
        kill_deployments(repository, engines, 6, 0.2)
        deploy(engines[2], DeployOptions(repository, MODEL))
        wait_for(server.http, is_number(2))
    assert_all_answered(counted)
    assert_nothing_failed(server)
    assert not list(repository.rglob("*.maskplan-tmp"))


@pytest.mark.slow
def test_thirty_killed_deployments_leave_the_old_or_the_new_engine(engines: dict[int, Path], tmp_path: Path) -> None:
    repository = tmp_path / "models"
    deploy(engines[1], DeployOptions(repository, MODEL))
    with triton_server(repository, control="poll") as server, clients(server.http, ["unnamed"] * 4) as counted:
        whole = kill_deployments(repository, engines, 30, 1.0)
        deploy(engines[2], DeployOptions(repository, MODEL))
        wait_for(server.http, is_number(2))
        assert_nothing_failed(server)
    assert 0 < whole < 30
    assert_all_answered(counted)


@pytest.mark.slow
def test_two_deployments_at_once_are_served_or_refused(engines: dict[int, Path], tmp_path: Path) -> None:
    repository = tmp_path / "models"
    deploy(engines[1], DeployOptions(repository, MODEL))
    deployed: list[int] = []
    refused: list[str] = []

    def again(number: int) -> None:
        for _ in range(10):
            try:
                deployed.append(deploy(engines[number], DeployOptions(repository, MODEL)).version)
            except HostError as error:
                refused.append(error.what)
            time.sleep(random.uniform(0, 0.3))

    with triton_server(repository, control="poll") as server, clients(server.http, ["unnamed"] * 4) as counted:
        threads = [threading.Thread(target=again, args=(number,)) for number in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        last = deploy(engines[2], DeployOptions(repository, MODEL)).version
        end = time.monotonic() + 30
        while not server.is_ready(MODEL, last) and time.monotonic() < end:
            time.sleep(0.05)
        assert server.is_ready(MODEL, last)
        wait_for(server.http, is_number(2))
        assert_nothing_failed(server)
    assert set(refused) <= {"another deployment is writing to the model"}
    assert sorted(deployed) == list(range(2, 2 + len(deployed)))
    assert_all_answered(counted)


@pytest.mark.slow
@pytest.mark.parametrize("control", ["poll", "explicit"])
def test_no_request_is_lost_by_fifty_deployments_and_twenty_rollbacks(
    control: str, engines: dict[int, Path], tmp_path: Path
) -> None:
    repository, numbers = tmp_path / "models", [1]
    deploy(engines[1], DeployOptions(repository, MODEL))
    explicit: tuple[Any, ...] = ("--load-model=*",) if control == "explicit" else ()
    generator = random.Random(control)
    with triton_server(repository, *explicit, control=control) as server:
        wait_for(server.http, is_number(1))
        with clients(server.http, ["unnamed"] * 8) as counted:
            for step in ["add", "add", "undo"] * 20 + ["add"] * 10:
                if step == "add":
                    numbers.append(3 - numbers[-1])
                    deploy(engines[numbers[-1]], DeployOptions(repository, MODEL))
                else:
                    numbers.pop()
                    rollback(repository, MODEL)
                if control == "explicit":
                    server.load(MODEL)
                # Some steps come before the server has taken the last.
                if generator.random() < 0.7:
                    wait_for(server.http, is_number(numbers[-1]))
                time.sleep(generator.uniform(0, 0.5))
            wait_for(server.http, is_number(numbers[-1]))
        assert_nothing_failed(server)
    assert_all_answered(counted)
    assert min(counted["unnamed"].answers.values()) > 500
