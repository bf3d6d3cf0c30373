"""The client of a Triton server: addresses, and servers that are none, refuse, break off or keep silent."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.triton.client import RefusedError, TritonClient, parse_address

METADATA = {
    "name": "net",
    "versions": ["10", "9"],
    "platform": "onnxruntime_onnx",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
    "outputs": [{"name": "y", "datatype": "BF16", "shape": [-1]}],
}
CONFIG = {"max_batch_size": 8, "dynamic_batching": {"preferred_batch_size": [4, 2]}}
Reply = Callable[[str, bytes], tuple[int, bytes, dict[str, str]]]


@contextlib.contextmanager
def http_server(reply: Reply, *, closes: bool = False) -> Iterator[str]:
    """A server that replies to every request with what the function returns; it may close each connection after it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _reply(self) -> None:
            status, data, headers = reply(self.path, self.rfile.read(int(self.headers.get("Content-Length", 0))))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
            # Without announcing it.
            self.close_connection = closes

        do_GET = do_POST = _reply  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def raw_server(data: bytes | None) -> Iterator[str]:
    """A socket that sends these bytes to everybody; None sends nothing and keeps the connection open."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def run() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    held.append(connection)
                    if data is not None:
                        connection.recv(65536)
                        connection.sendall(data)
                        connection.close()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in held:
                connection.close()


def described(path: str, _: bytes) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(CONFIG if path.endswith("/config") else METADATA).encode(), {}


@pytest.mark.parametrize(
    ("url", "host", "port", "tls", "prefix"),
    [
        ("localhost:8000", "localhost", 8000, False, ""),
        ("gpu-host", "gpu-host", 8000, False, ""),
        ("http://10.0.0.1:9000/", "10.0.0.1", 9000, False, ""),
        ("https://host/triton/a", "host", 443, True, "/triton/a"),
        ("[::1]:8001", "::1", 8001, False, ""),
    ],
)
def test_addresses(url: str, host: str, port: int, tls: bool, prefix: str) -> None:
    address = parse_address(url)
    assert (address.host, address.port, address.tls, address.prefix) == (host, port, tls, prefix)
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "url",
    ["", ":8000", "grpc://host:1", "host:port", "host:99999", "host:0", "a b", "host:1?x", "me@host", "hôst", "a\nb"],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="not the address of a server"):
        parse_address(url)


def test_what_a_server_says_about_a_model() -> None:
    with http_server(described) as url, TritonClient(parse_address(f"http://{url}/under"), 5) as client:
        served = client.model("net")
    assert (served.versions, served.max_batch, served.preferred_batches) == ((9, 10), 8, (2, 4))
    assert [(s.name, s.dtype, s.shape) for s in (*served.inputs, *served.outputs)] == [
        ("x", "float32", (None, 2)),
        ("y", "BF16", (None,)),
    ]


@pytest.mark.parametrize("data", [b"\x00\x00\x18\x04\x00\x00\x00\x00\x00", b"SSH-2.0-x\r\n", b""])
def test_another_protocol_is_not_tritons(data: bytes) -> None:
    with raw_server(data) as url, pytest.raises(InputError, match="not a Triton server, or not its HTTP port"):
        TritonClient(parse_address(url), 5).server()


@pytest.mark.parametrize("data", [b"<html>", b"[]", b"{}", b'{"name": 3}', b"\xff" * 5, b"[" * 100_000])
def test_another_http_server_is_not_tritons(data: bytes) -> None:
    with http_server(lambda *_: (200, data, {})) as url, TritonClient(parse_address(url), 5) as client:
        with pytest.raises(InputError, match="not a Triton server"):
            client.server()
        with pytest.raises(InputError, match="not a Triton server"):
            client.model("net")


@pytest.mark.parametrize(
    "tensor",
    [
        {"name": "z", "datatype": "FP32", "shape": [1], "data": [1]},
        {"name": "y", "datatype": "BYTES", "shape": [1], "data": ["a"]},
        {"name": "y", "datatype": "FP32", "shape": [3], "parameters": {"binary_data_size": 8}},
        {"name": "y", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 7}},
        {"name": "y", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 80}},
        {"name": "y", "datatype": "FP32", "shape": ["x"], "data": [1]},
        {"name": "y", "datatype": "FP32", "shape": [1]},
        [],
    ],
)
def test_a_response_that_does_not_hold_the_output_is_not_tritons(tensor: Any) -> None:
    header = json.dumps({"model_version": "1", "outputs": [tensor]}).encode()
    reply = 200, header + bytes(8), {"inference-header-content-length": str(len(header))}
    with (
        http_server(lambda *_: reply) as url,
        TritonClient(parse_address(url), 5) as client,
        pytest.raises(InputError, match="not a Triton server"),
    ):
        client.infer("net", {"x": np.zeros((1, 2), np.float32)}, ["y"])


def test_outputs_as_binary_and_as_json() -> None:
    tensors = [
        {"name": "y", "datatype": "FP16", "shape": [2], "parameters": {"binary_data_size": 4}},
        {"name": "z", "datatype": "INT64", "shape": [1, 2], "data": [3, 4]},
        {"name": "w", "datatype": "BOOL", "shape": [], "parameters": {"binary_data_size": 1}},
    ]
    header = json.dumps({"model_version": "7", "outputs": tensors}).encode()
    received: list[bytes] = []

    def reply(path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        received.extend((path.encode(), body))
        data = header + np.float16([1, 2]).tobytes() + b"\x01"
        return 200, data, {"Inference-Header-Content-Length": str(len(header))}

    with http_server(reply) as url, TritonClient(parse_address(url), 5) as client:
        x = np.arange(6, dtype=np.int8).reshape(2, 3)[:, ::2]
        answer = client.infer("a net/1", {"x": x}, ["y", "z", "w"], 7)
    assert answer.version == 7
    assert {k: (v.dtype.name, v.tolist()) for k, v in answer.outputs.items()} == {
        "y": ("float16", [1, 2]),
        "z": ("int64", [[3, 4]]),
        "w": ("bool", True),
    }
    path, body = received
    assert path == b"/v2/models/a%20net%2F1/versions/7/infer"
    assert body.endswith(bytes([0, 2, 3, 5]))


def test_a_refusal_has_the_servers_words() -> None:
    reply = 503, b'{"error": "not\\u001b ready"}', {}
    with http_server(lambda *_: reply) as url, TritonClient(parse_address(url), 5) as client:
        with pytest.raises(RefusedError, match=r"503 not\\x1b ready") as refused:
            client.infer("net", {"x": np.zeros(1, np.float32)}, ["y"])
        assert refused.value.status == 503
        with pytest.raises(InputError, match="the server does not serve net"):
            client.model("net")


def test_a_silent_server_is_given_up() -> None:
    with raw_server(None) as url, pytest.raises(InputError, match="did not respond in time") as raised:
        TritonClient(parse_address(url), 0.2).server()
    assert "nothing for 0.2 s" in str(raised.value)


def test_no_server_and_no_tls() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(InputError, match="no server responds"):
        TritonClient(parse_address(url), 5).server()
    with pytest.raises(InputError, match="no server responds"):
        TritonClient(parse_address("nowhere.invalid:8000"), 5).server()
    with http_server(described) as plain, pytest.raises(InputError, match="no TLS connection") as raised:
        TritonClient(parse_address(f"https://{plain}"), 5).server()
    assert "http://" in str(raised.value.fix)


def test_a_connection_that_the_server_has_closed_is_opened_again() -> None:
    with http_server(described, closes=True) as url, TritonClient(parse_address(url), 5) as client:
        for _ in range(5):
            assert client.model("net").versions == (9, 10)
