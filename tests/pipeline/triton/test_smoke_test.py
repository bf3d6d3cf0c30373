"""The script next to a golden pair: its comparison, and if tritonclient is installed, a server with Triton's protocol."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from deployable import built
from triton_messages import MISSING, environment

from maskplan.engines.sidecar import read_engine
from maskplan.pipeline.triton.deploy import DeployOptions, deploy
from maskplan.pipeline.triton.golden import golden_pair
from maskplan.pipeline.triton.smoke_test import DIFFERS, NO_OUTPUT, SAME, difference, main


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """The folder of a deployed engine's golden pair."""
    engine = built(tmp_path / "engine")
    deploy(engine, DeployOptions(tmp_path / "models", "net"), golden_pair(read_engine(engine)))
    return tmp_path / "models/net/1/golden"


@pytest.mark.parametrize(
    ("found", "wanted", "share"),
    [
        ([[1.0, -4.0]], [[1.0, -4.0]], 0.0),
        ([[1.0, -3.0]], [[1.0, -4.0]], 0.25),
        ([[5.0, -4.0]], [[1.0, -4.0]], 1.0),
        ([[1.0, -4.0]], [[1.0]], np.inf),
        ([[1.0]], [1.0], np.inf),
        ([[np.nan, -4.0]], [[1.0, -4.0]], np.inf),
        ([[np.inf, -4.0]], [[1.0, -4.0]], np.inf),
        ([[0.0]], [[0.0]], 0.0),
    ],
)
def test_the_difference_is_a_share_of_the_largest_golden_value(found: Any, wanted: Any, share: float) -> None:
    assert difference(np.array(found, np.float32), np.array(wanted, np.float32)) == share


def test_half_precision_does_not_overflow_in_the_comparison() -> None:
    assert difference(np.float16([60000]), np.float16([-60000])) == 2.0


def test_without_the_client_there_is_no_output(golden: Path) -> None:
    program = "import runpy, sys; sys.modules['tritonclient'] = None; sys.argv = ['smoke.py'];"
    program += f"runpy.run_path({str(golden / 'smoke.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (NO_OUTPUT, "")
    assert "pip install 'tritonclient[http]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("gone", ["golden.json", "input.npy", "output.npy"])
def test_without_the_pair_there_is_no_output(gone: str, golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (golden / gone).unlink()
    assert main(["--golden", str(golden)]) == NO_OUTPUT
    assert gone in capsys.readouterr().err
    (golden / gone).write_text("{}")
    assert main(["--golden", str(golden)]) == NO_OUTPUT


def test_wrong_usage_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--tolerance", "some"])
    assert end.value.code == 2


class RefusedError(Exception):
    """As tritonclient.utils.InferenceServerException."""


@pytest.mark.parametrize(
    ("state", "code", "message"),
    [
        ("right", SAME, "same: net version 1"),
        ("not ready", NO_OUTPUT, "net version 1 is not ready"),
        ("refused", NO_OUTPUT, "returned no output of net version 1: no such input"),
        ("gone", NO_OUTPUT, "returned no output of net version 1: connection reset"),
        ("silent", NO_OUTPUT, "responded without logits"),
    ],
)
def test_every_server_failure_is_reported_and_the_connection_closed(
    state: str,
    code: int,
    message: str,
    golden: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Over a stand-in of tritonclient, of the parts that the script uses."""
    closed = []

    class Client:
        def __init__(self, url: str, *, connection_timeout: float, network_timeout: float) -> None: ...

        def is_model_ready(self, name: str, version: str) -> bool:
            return state != "not ready"

        def infer(self, name: str, inputs: Any, version: str, *, outputs: Any) -> Any:
            if state in ("refused", "gone"):
                raise (
                    RefusedError("no such input") if state == "refused" else ConnectionResetError("connection reset")
                )
            output = None if state == "silent" else np.load(golden / "output.npy")
            return SimpleNamespace(as_numpy=lambda name: output)

        def close(self) -> None:
            closed.append(True)

    tensor = SimpleNamespace(set_data_from_numpy=lambda array: None)
    http = SimpleNamespace(
        InferenceServerClient=Client, InferInput=lambda *_: tensor, InferRequestedOutput=lambda name: name
    )
    utils = SimpleNamespace(np_to_triton_dtype=lambda dtype: "FP32", InferenceServerException=RefusedError)
    for name, module in (("http", http), ("utils", utils)):
        monkeypatch.setitem(sys.modules, f"tritonclient.{name}", module)
    monkeypatch.setitem(sys.modules, "tritonclient", SimpleNamespace(http=http, utils=utils))
    assert main(["--golden", str(golden)]) == code
    captured = capsys.readouterr()
    assert message in captured.out + captured.err
    assert closed == [True]


class Server(ThreadingHTTPServer):
    """What one inference needs of Triton's HTTP protocol, before the deployed model; its output is multiplied by `scale`."""

    scale = 1.0

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(200 if self.path == "/v2/models/net/versions/1/ready" else 400, {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        size = int(self.headers["Inference-Header-Content-Length"])
        asked = json.loads(body[:size])
        (tensor,), (wanted,) = asked["inputs"], asked["outputs"]
        if (self.path, tensor["name"], tensor["datatype"], wanted["name"]) != (
            "/v2/models/net/versions/1/infer",
            "input",
            "FP32",
            "logits",
        ):
            return self.answer(400, {"error": "no such model, input or output"})
        images = np.frombuffer(body[size:], np.float32).reshape(tensor["shape"])
        session = onnxruntime.InferenceSession(self.server.folder / "model.onnx", providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {"input": images})
        data = (logits * self.server.scale).ravel().tolist()
        output = {"name": "logits", "datatype": "FP32", "shape": list(logits.shape), "data": data}
        return self.answer(200, {"model_name": "net", "model_version": "1", "outputs": [output]})

    def answer(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(golden: Path) -> Iterator[Server]:
    """A server of the deployed model."""
    with Server(golden.parent) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def smoke(golden: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, golden / "smoke.py", *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.skipif(environment() is None, reason=MISSING)
def test_a_server_of_the_same_model_matches(golden: Path, server: Server) -> None:
    done = smoke(golden, "--url", server.url)
    assert done.returncode == SAME, done.stderr
    assert done.stdout.startswith("same: net version 1, logits (1, 5)")


@pytest.mark.skipif(environment() is None, reason=MISSING)
def test_a_server_of_another_model_differs(golden: Path, server: Server) -> None:
    server.scale = 1.01
    done = smoke(golden, "--url", server.url)
    assert done.returncode == DIFFERS, done.stderr
    assert done.stdout.startswith("DIFFERS: net version 1")
    assert "0.001 is allowed" in done.stdout
    assert smoke(golden, "--url", server.url, "--tolerance", 0.02).returncode == SAME


@pytest.mark.skipif(environment() is None, reason=MISSING)
def test_a_missing_or_unready_server_gives_no_output(golden: Path, server: Server, tmp_path: Path) -> None:
    done = smoke(golden, "--url", server.url, "--version", 9)
    assert (done.returncode, done.stdout) == (NO_OUTPUT, "")
    assert "net version 9 is not ready" in done.stderr
    other = Path(shutil.copytree(golden, tmp_path / "other"))
    description = json.loads((golden / "golden.json").read_text())
    (other / "golden.json").write_text(json.dumps({**description, "input": "image"}))
    done = smoke(other, "--url", server.url)
    assert done.returncode == NO_OUTPUT
    assert "no such model, input or output" in done.stderr
    done = smoke(golden, "--url", "127.0.0.1:1", "--timeout", 5)
    assert done.returncode == NO_OUTPUT
    assert "Traceback" not in done.stderr
