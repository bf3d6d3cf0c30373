"""Requests that Triton refuses while it switches versions: hand-written models and config, nothing of maskplan.

    tritonserver --model-repository=R --model-control-mode=poll --repository-poll-secs=1
    python benchmarks/performance/serving_race.py --repository R --url localhost:8000 --versions 20

R must be an empty folder. Eight clients send requests while versions are added, with the policy `latest`: half of them leave
the version to the server, the others read the newest version from the model's metadata and name it. It prints how many
requests of each kind the server answered and refused.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import http.client
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from onnx import TensorProto, helper, numpy_helper

Kind = Literal["unnamed", "named"]
"""Whether a client leaves the version to the server, or reads the newest from the metadata and names it."""

MODEL = "net"
WIDTH = 16
X = np.arange(WIDTH, dtype=np.float32).reshape(1, WIDTH)
# Seconds between two requests of a client.
GAP_S = 0.005
CONFIG = """name: "net"
platform: "onnxruntime_onnx"
max_batch_size: 8
version_policy {{ latest {{ num_versions: {versions} }} }}
input [ {{ name: "x" data_type: TYPE_FP32 dims: [ 16 ] }} ]
output [ {{ name: "y" data_type: TYPE_FP32 dims: [ 16 ] }} ]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
dynamic_batching {{ }}
"""


def graph(number: int) -> bytes:
    """A model that adds a number."""
    made = helper.make_graph(
        [helper.make_node("Add", ["x", "c"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDTH])],
        [numpy_helper.from_array(np.full(WIDTH, number, np.float32), "c")],
    )
    data: bytes = helper.make_model(
        made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()
    return data


def connect(url: str) -> http.client.HTTPConnection:
    """A connection to the server."""
    return http.client.HTTPConnection(url, timeout=60)


def ask(connection: http.client.HTTPConnection, version: str = "") -> tuple[int, bytes, np.ndarray[Any, Any] | None]:
    """Status, body and output of one request."""
    header = json.dumps(
        {
            "inputs": [
                {"name": "x", "shape": [1, WIDTH], "datatype": "FP32", "parameters": {"binary_data_size": X.nbytes}}
            ],
            "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
        }
    ).encode()
    path = f"/v2/models/{MODEL}{f'/versions/{version}' if version else ''}/infer"
    connection.request("POST", path, header + X.tobytes(), {"Inference-Header-Content-Length": str(len(header))})
    response = connection.getresponse()
    data = response.read()
    if response.status != 200:
        return response.status, data, None
    return 200, data, np.frombuffer(data[int(response.headers["Inference-Header-Content-Length"]) :], np.float32)


def number_of(output: np.ndarray[Any, Any] | None) -> int | None:
    """Which number the model adds; None for an output of no such model."""
    if output is None or output.shape != (WIDTH,):
        return None
    number = round(float(output[0] - X[0, 0]))
    return number if np.array_equal(output, X[0] + np.float32(number)) else None


@dataclass
class Counted:
    """What the clients of one kind got.

    Attributes:
        answers: By the number that the model adds; None is no such model.
        refused: By status; -1 is a broken connection.
        messages: The first few.
    """

    answers: collections.Counter[int | None] = field(default_factory=collections.Counter)
    refused: collections.Counter[int] = field(default_factory=collections.Counter)
    messages: list[str] = field(default_factory=list)


@contextlib.contextmanager
def clients(url: str, kinds: list[Kind], gap_s: float = GAP_S) -> Iterator[dict[Kind, Counted]]:
    """Clients that send requests within the context, and what they got."""
    counted: dict[Kind, Counted] = {kind: Counted() for kind in kinds}
    lock, stopped = threading.Lock(), threading.Event()

    def run(kind: Kind) -> None:
        connection = connect(url)
        while not stopped.wait(gap_s):
            try:
                version = ""
                if kind == "named":
                    connection.request("GET", f"/v2/models/{MODEL}")
                    version = json.loads(connection.getresponse().read())["versions"][-1]
                status, data, output = ask(connection, version)
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                connection.close()
                status, data, output = -1, repr(error).encode(), None
            with lock:
                if status == 200:
                    counted[kind].answers[number_of(output)] += 1
                else:
                    counted[kind].refused[status] += 1
                    counted[kind].messages = [*counted[kind].messages, data.decode(errors="replace")][:5]
        connection.close()

    threads = [threading.Thread(target=run, args=(kind,)) for kind in kinds]
    for thread in threads:
        thread.start()
    try:
        yield counted
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


def wait_for(url: str, is_served: Callable[[int | None], bool], patience_s: float = 60) -> None:
    """Wait until a model answers whose number is the right one."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            contextlib.closing(connect(url)) as connection,
        ):
            if is_served(number_of(ask(connection)[2])):
                return
        time.sleep(0.02)
    raise TimeoutError("the server does not serve the new version")


def write_model(repository: Path, versions: int) -> None:
    """A model without versions; `versions` of them will be served at a time."""
    (repository / MODEL).mkdir(parents=True)
    (repository / MODEL / "config.pbtxt").write_text(CONFIG.format(versions=versions))


def add_version(repository: Path, version: int, number: int) -> None:
    """A version whose folder appears when it is complete."""
    staged = repository / MODEL / ".staged"
    staged.mkdir()
    (staged / "model.onnx").write_bytes(graph(number))
    staged.rename(repository / MODEL / str(version))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--versions", type=int, default=20)
    parser.add_argument("--served", type=int, default=1, help="versions that are served at a time")
    given = parser.parse_args()
    generator = random.Random(1)
    write_model(given.repository, given.served)
    add_version(given.repository, 1, 1)
    wait_for(given.url, lambda number: number == 1)
    with clients(given.url, ["unnamed", "named"] * 4) as counted:
        for version in range(2, 2 + given.versions):
            add_version(given.repository, version, 1 + version % 2)
            wait_for(given.url, lambda number, version=version: number == 1 + version % 2)  # type: ignore[misc]
            time.sleep(generator.uniform(0.1, 0.6))
    for kind, got in counted.items():
        refused = dict(got.refused)
        print(f"{kind}: {sum(got.answers.values())} answered, {sum(refused.values())} refused {refused}")
        print("\n".join(f"    {message}" for message in got.messages))


if __name__ == "__main__":
    main()
