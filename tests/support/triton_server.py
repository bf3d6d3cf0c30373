"""The real Triton server, started on a model repository.

NVIDIA's server comes in the package nvidia-pytriton, without backends for ONNX Runtime and TensorRT: `triton_backends/` has
some, in Python. `make test` installs the server, and an environment for these, in the folder that TRITONSERVER names.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = "TRITONSERVER"
INSTALLED = Path(os.environ.get(FOLDER) or Path(__file__).parents[2] / ".venv" / "tritonserver")
_PACKAGE = INSTALLED / "server" / "pytriton" / "tritonserver"
_LIBPYTHON = Path(str(sysconfig.get_config_var("LIBDIR"))) / str(sysconfig.get_config_var("INSTSONAME"))
_STUB = _PACKAGE / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}"


def missing() -> str:
    """Why the server cannot run here; nothing if it can."""
    if not (_PACKAGE.is_dir() and (INSTALLED / "python" / "bin" / "python3").exists()):
        return "no Triton server: `make .venv/.tritonserver` installs it (Linux on x86-64 only)"
    if not _STUB.is_dir():
        return f"Triton's Python backend has no stub for {_STUB.name}"
    if ".so" not in _LIBPYTHON.name or not _LIBPYTHON.is_file():
        return f"Triton's Python backend needs a shared libpython, and this Python has none: {_LIBPYTHON}"
    return ""


@dataclass(frozen=True)
class TritonServer:
    """A running server.

    Attributes:
        process: The server, the leader of a process group of its own.
        http: Address of its HTTP endpoint, as in 127.0.0.1:8000.
        grpc: Address of its gRPC endpoint.
        log_file: What it says.
    """

    process: subprocess.Popen[bytes]
    http: str
    grpc: str
    log_file: Path

    def log(self) -> str:
        """Everything that the server has logged."""
        return self.log_file.read_text(errors="replace")

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON (None if there is none) of a request to its HTTP endpoint."""
        connection = http.client.HTTPConnection(self.http, timeout=60)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            data = answer.read()
        except OSError as error:
            error.add_note(f"exit code {self.process.poll()}; the server's log ends with\n{self.log()[-3000:]}")
            raise
        finally:
            connection.close()
        return answer.status, json.loads(data) if data else None

    def load(self, name: str) -> None:
        """Load a model or load it again, in explicit mode; returns when it is ready."""
        status, answer = self.ask("POST", f"/v2/repository/models/{name}/load")
        assert status == 200, answer

    def unload(self, name: str) -> None:
        """Unload a model, in explicit mode."""
        status, answer = self.ask("POST", f"/v2/repository/models/{name}/unload")
        assert status == 200, answer

    def versions(self, name: str) -> dict[str, tuple[str, str]]:
        """State and reason of each version of a model that the server knows."""
        _, index = self.ask("POST", "/v2/repository/index")
        return {m["version"]: (m["state"], m.get("reason", "")) for m in index if m["name"] == name and "version" in m}

    def is_ready(self, name: str = "", version: int | None = None) -> bool:
        """Whether the server, or a version of a model, answers requests."""
        path = f"/v2/models/{name}" + ("" if version is None else f"/versions/{version}") if name else "/v2/health"
        return self.ask("GET", f"{path}/ready")[0] == 200


@contextlib.contextmanager
def triton_server(
    repository: Path,
    *options: str,
    control: str = "explicit",
    strict: bool = True,
    poll_s: int = 1,
    capability: str = "8.0",
    any_model: bool = False,
) -> Iterator[TritonServer]:
    """Serve a repository; stopped at the end, with every process that the server has started.

    Args:
        repository: An existing folder.
        options: Further options of the server.
        control: `explicit`, `poll` or `none`.
        strict: Configs have to be complete: neither the server nor a backend adds anything.
        poll_s: Seconds between two looks at the repository, if `control` is `poll`.
        capability: Compute capability of the GPU whose plans the backend for TensorRT loads.
        any_model: Both backends accept every model, without looking at its files.
    """
    with tempfile.TemporaryDirectory(prefix="triton") as work:
        backends = _backends(Path(work), any_model)
        log = Path(work) / "log"
        ports = _free_ports(3)
        command = [
            str(_PACKAGE / "bin" / "tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={backends}",
            f"--model-control-mode={control}",
            *([f"--repository-poll-secs={poll_s}"] if control == "poll" else []),
            *(["--disable-auto-complete-config"] if strict else []),
            # Names of the shared memory, by which what a killed server leaves is found.
            f"--backend-config=python,shm-region-prefix-name={Path(work).name}",
            "--exit-timeout-secs=5",
            "--strict-readiness=false",
            "--exit-on-error=false",
            *(f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics")),
            *(f"--{kind}-port={port}" for kind, port in zip(("http", "grpc", "metrics"), ports, strict=True)),
            *options,
        ]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=_environment(capability), stdout=output, stderr=output, start_new_session=True
            )
        try:
            server = TritonServer(process, f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}", log)
            _wait(server)
            yield server
        finally:
            stop(process)
            for left in Path("/dev/shm").glob(f"*{Path(work).name}*"):
                left.unlink(missing_ok=True)


def stop(process: subprocess.Popen[bytes], patience_s: float = 8) -> None:
    """Ask the server to end, and after some seconds end its process group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _backends(work: Path, any_model: bool) -> Path:
    """A folder of backends: Triton's for Python models, and ours that run in it; copies, as the server refuses links."""
    sources = Path(__file__).parent / "triton_backends"
    folder = Path(shutil.copytree(sources, work / "backends"))
    for source in (_PACKAGE / "backends" / "python", _STUB):
        shutil.copytree(source, folder / "python", dirs_exist_ok=True)
    if any_model:
        for backend in ("onnxruntime", "tensorrt"):
            shutil.copytree(sources / "any_model", folder / backend, dirs_exist_ok=True)
    return folder


def _environment(capability: str) -> dict[str, str]:
    """The stub embeds the `python3` that is first in PATH, and needs numpy < 2, which is not what the tests run on."""
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(INSTALLED / "python" / "bin"), os.environ["PATH"]]),
        "PYTHONPATH": "",
        "PYTHONDONTWRITEBYTECODE": "1",
        "LD_LIBRARY_PATH": os.pathsep.join(
            [str(_LIBPYTHON.parent), str(INSTALLED / "server" / "nvidia_pytriton.libs")]
        ),
        "OMP_NUM_THREADS": "1",
        "FAKE_GPU": capability,
    }


def _free_ports(count: int) -> Sequence[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _wait(server: TritonServer, patience_s: float = 60) -> None:
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise AssertionError(f"the Triton server ended with {server.process.returncode}:\n{server.log()}")
        with contextlib.suppress(OSError):
            if server.is_ready():
                return
        time.sleep(0.05)
    raise AssertionError(f"the Triton server is not ready after {patience_s} s:\n{server.log()}")
