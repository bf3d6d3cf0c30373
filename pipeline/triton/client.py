"""A client of a Triton server: KServe's version 2 over HTTP with binary tensors, by the standard library."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, urlsplit

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import TensorSpec
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.escaping import one_line
from maskplan.pipeline.core.serialization import parse_json

Arrays = Mapping[str, npt.NDArray[Any]]

DATATYPES: Final[Mapping[str, str]] = {
    "FP64": "float64",
    "FP32": "float32",
    "FP16": "float16",
    "INT64": "int64",
    "INT32": "int32",
    "INT16": "int16",
    "INT8": "int8",
    "UINT64": "uint64",
    "UINT32": "uint32",
    "UINT16": "uint16",
    "UINT8": "uint8",
    "BOOL": "bool",
}
"""KServe's names of data types, and NumPy's."""
KSERVE_NAMES: Final[Mapping[str, str]] = {numpy: kserve for kserve, numpy in DATATYPES.items()}
"""The same the other way around."""
_HTTP_PORT = 8000
_HEADER_BYTES = "Inference-Header-Content-Length"


@dataclass(frozen=True)
class Address:
    """Where a server listens: `HOST:PORT`, `http://HOST:PORT/PREFIX` or `https://...`; the port is 8000 by default."""

    host: str
    port: int
    tls: bool
    prefix: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https://' if self.tls else ''}{host}:{self.port}{self.prefix}"


def parse_address(url: str) -> Address:
    """Parse the address of a server.

    Raises:
        InputError: It is none.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port
        valid = parts.scheme in ("http", "https") and bool(host) and port != 0 and not (parts.query or parts.fragment)
        valid = valid and url.isascii() and url.isprintable() and " " not in url and "@" not in parts.netloc
    except ValueError:
        valid = False
    if not valid:
        raise InputError(
            "not the address of a server", found=repr(url), fix="write for example --url localhost:8000 or https://host"
        )
    tls = parts.scheme == "https"
    return Address(str(host), port or (443 if tls else _HTTP_PORT), tls, parts.path.rstrip("/"))


class RefusedError(InputError):
    """The server responds, and refuses the request; `status` is HTTP's."""

    def __init__(self, status: int, found: str, where: object) -> None:
        super().__init__("the server refuses the request", where=where, found=f"{status} {found}".strip())
        self.status = status


@dataclass(frozen=True)
class ServedModel:
    """A model as a server describes it.

    Attributes:
        name: Of the model.
        versions: That are served, ascending; a request that names none gets the last.
        platform: `tensorrt_plan`, `onnxruntime_onnx` or another.
        inputs: With the batch, where there is one.
        outputs: As the inputs.
        max_batch: Largest batch of a request; 0 if the batch is part of the shapes.
        preferred_batches: That the server forms without waiting, ascending.
    """

    name: str
    versions: tuple[int, ...]
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int
    preferred_batches: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """The outputs of a request by name, and the version that computed them; None if the server does not say."""

    outputs: dict[str, npt.NDArray[Any]]
    version: int | None


class TritonClient:
    """One connection to a server, kept open between requests and opened again after an error. Not for several threads.

    Args:
        address: The server's.
        timeout_s: Seconds to wait for a connection, and for each part of a response.
    """

    def __init__(self, address: Address, timeout_s: float) -> None:
        self.address, self._timeout_s = address, timeout_s
        self._connection: http.client.HTTPConnection | None = None

    def server(self) -> str:
        """Name and version of the server.

        Raises:
            InputError: There is no server, or none that speaks this protocol.
        """
        try:
            about = self._json("GET", "/v2")
        except RefusedError as error:
            raise self._no_protocol(str(error.found)) from error
        if not isinstance(about.get("name"), str):
            raise self._no_protocol(f"{about}"[:200])
        return one_line(f"{about['name']} {about.get('version', '')}".strip())

    def model(self, name: str, version: int | None = None) -> ServedModel:
        """What the server says about a model that is ready.

        Raises:
            InputError: It has no such model or version, or the model is not ready.
        """
        path = _model_path(name, version)
        try:
            about = self._json("GET", path)
            config = self._json("GET", f"{path}/config")
        except RefusedError as error:
            shown = name if version is None else f"{name} version {version}"
            raise InputError(
                f"the server does not serve {shown}",
                where=self.address,
                found=f"{error.found}; it has {self._models() or 'no model'}",
                fix="check --model and --version, and the server's log if it could not load the model",
            ) from error
        try:
            batching = config.get("dynamic_batching") or {}
            return ServedModel(
                name,
                tuple(sorted(int(v) for v in about["versions"])),
                str(about["platform"]),
                tuple(map(_spec, about["inputs"])),
                tuple(map(_spec, about["outputs"])),
                int(config.get("max_batch_size", 0)),
                tuple(sorted(int(size) for size in batching.get("preferred_batch_size", ()))),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._no_protocol(f"metadata of {name}: {type(error).__name__}: {error}") from error

    def infer(self, name: str, feeds: Arrays, outputs: Sequence[str], version: int | None = None) -> Answer:
        """Run a model once.

        Args:
            name: Of the model.
            feeds: Inputs by name.
            outputs: Names of the outputs to return.
            version: Of the model; None leaves the choice to the server.

        Raises:
            RefusedError: The server refuses the request, or the model fails.
            InputError: There is no response, or one that is not KServe's.
        """
        arrays = {key: np.ascontiguousarray(array) for key, array in feeds.items()}
        header = json.dumps(
            {
                "inputs": [
                    {
                        "name": key,
                        "shape": list(array.shape),
                        "datatype": KSERVE_NAMES[array.dtype.name],
                        "parameters": {"binary_data_size": array.nbytes},
                    }
                    for key, array in arrays.items()
                ],
                "outputs": [{"name": key, "parameters": {"binary_data": True}} for key in outputs],
            }
        ).encode()
        path = f"{_model_path(name, version)}/infer"
        headers = {"Content-Type": "application/octet-stream", _HEADER_BYTES: str(len(header))}
        body = b"".join([header, *(array.tobytes() for array in arrays.values())])
        received, data = self._request("POST", path, body, headers)
        try:
            size = int(received.get(_HEADER_BYTES.lower(), len(data)))
            about = parse_json(data[:size])
            found = _tensors(about["outputs"], memoryview(data)[size:])
            missing = [key for key in outputs if key not in found]
            served = about.get("model_version")
            answer = Answer(found, int(served) if served is not None else None)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._no_protocol(f"response of {name}: {type(error).__name__}: {error}") from error
        if missing:
            raise self._no_protocol(f"a response without {', '.join(missing)}")
        return answer

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> TritonClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _models(self) -> str:
        try:
            index = parse_json(self._request("POST", "/v2/repository/index", b"{}", {})[1])
            states = [f"{m['name']} {m.get('version', '')} {m.get('state', '')} {m.get('reason', '')}" for m in index]
            return ", ".join(" ".join(one_line(state).split()) for state in states[:8])
        except (InputError, KeyError, TypeError, ValueError, AttributeError):
            return ""

    def _json(self, method: str, path: str) -> dict[str, Any]:
        _, data = self._request(method, path, None, {})
        try:
            value = parse_json(data)
        except ValueError as error:
            raise self._no_protocol(repr(data[:60])) from error
        if not isinstance(value, dict):
            raise self._no_protocol(repr(data[:60]))
        return value

    def _request(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[Mapping[str, str], bytes]:
        """Headers, by lower-case name, and body of a response with status 200."""
        reused = self._connection is not None
        try:
            try:
                response, data = self._send(method, path, body, headers)
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                if not reused:
                    raise
                # The server has closed the connection since the last request.
                self.close()
                response, data = self._send(method, path, body, headers)
        except TimeoutError as error:
            self.close()
            raise InputError(
                "the server did not respond in time",
                where=self.address,
                found=f"nothing for {self._timeout_s:g} s",
                fix="raise --timeout, or check the server",
            ) from error
        except ssl.SSLError as error:
            self.close()
            raise InputError(
                "no TLS connection to the server",
                where=self.address,
                found=error.reason or str(error),
                fix="use http:// for a server without TLS; SSL_CERT_FILE names a certificate authority of your own",
            ) from error
        except http.client.HTTPException as error:
            self.close()
            raise self._no_protocol(f"{type(error).__name__}: {error}") from error
        except OSError as error:
            self.close()
            raise InputError(
                "no server responds",
                where=self.address,
                found=error.strerror or str(error),
                fix="start the server, or check --url",
            ) from error
        if response.status != 200:
            raise RefusedError(response.status, _error_text(data) or response.reason, self.address)
        return {name.lower(): value for name, value in response.headers.items()}, data

    def _send(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[http.client.HTTPResponse, bytes]:
        if self._connection is None:
            host, port = self.address.host, self.address.port
            self._connection = (
                http.client.HTTPSConnection(host, port, timeout=self._timeout_s)
                if self.address.tls
                else http.client.HTTPConnection(host, port, timeout=self._timeout_s)
            )
        self._connection.request(method, self.address.prefix + path, body, dict(headers))
        response = self._connection.getresponse()
        return response, response.read()

    def _no_protocol(self, found: str) -> InputError:
        return InputError(
            "not a Triton server, or not its HTTP port",
            where=self.address,
            found=one_line(found),
            fix="give the HTTP port, 8000 by default, not the gRPC port 8001 or the metrics port 8002",
        )


def _model_path(name: str, version: int | None) -> str:
    return f"/v2/models/{quote(name, safe='')}" + ("" if version is None else f"/versions/{version}")


def _spec(tensor: Mapping[str, Any]) -> TensorSpec:
    dims = tuple(None if int(d) < 0 else int(d) for d in tensor["shape"])
    kind = str(tensor["datatype"])
    return TensorSpec(str(tensor["name"]), DATATYPES.get(kind, kind), dims)


def _tensors(described: Sequence[Mapping[str, Any]], data: memoryview) -> dict[str, npt.NDArray[Any]]:
    """Arrays from a response's JSON and the binary data after it.

    Raises:
        ValueError: Sizes and shapes do not match.
    """
    arrays, at = {}, 0
    for tensor in described:
        dtype = np.dtype(DATATYPES[tensor["datatype"]])
        size = tensor.get("parameters", {}).get("binary_data_size")
        if size is None:
            array = np.array(tensor["data"], dtype)
        else:
            if len(data) < at + size:
                raise ValueError(f"{len(data)} bytes of data, {at + size} announced")
            array = np.frombuffer(data[at : at + size], dtype)
            at += size
        arrays[str(tensor["name"])] = array.reshape([int(d) for d in tensor["shape"]])
    return arrays


def _error_text(data: bytes) -> str:
    try:
        text = parse_json(data)["error"]
    except (ValueError, KeyError, TypeError):
        text = data[:200].decode(errors="replace")
    return one_line(str(text))[:500]
