"""Smoke test of a Triton server: does it serve the model, and is the output the same as when it was deployed?

This script is stored next to a golden input and output in a Triton repository and needs only Python, NumPy and
`pip install 'tritonclient[http]'`.

Exit codes: 0 the output matches the golden one, 1 it differs, 2 wrong usage, 3 there was no output to compare.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SAME, DIFFERS, NO_OUTPUT = 0, 1, 3


class NoOutputError(Exception):
    """There is no output to compare; the message gives the reason."""


def difference(output: npt.NDArray[Any], golden: npt.NDArray[Any]) -> float:
    """Largest difference as a share of the golden array's largest magnitude; infinite for a different shape or NaN."""
    if output.shape != golden.shape:
        return float("inf")
    expected = golden.astype(np.float64)
    largest = float(np.abs(output.astype(np.float64) - expected).max(initial=0.0))
    share = largest / max(float(np.abs(expected).max(initial=0.0)), 1e-6)
    return share if np.isfinite(share) else float("inf")


def infer(
    url: str, model: dict[str, Any], version: str, images: npt.NDArray[Any], timeout_s: float
) -> npt.NDArray[Any]:
    """Send the input over HTTP and return the server's output.

    Raises:
        NoOutputError: No client library, no server, no such model, or the model failed.
    """
    try:
        http = importlib.import_module("tritonclient.http")
        utils = importlib.import_module("tritonclient.utils")
    except ImportError as error:
        raise NoOutputError(f"{error}; pip install 'tritonclient[http]'") from error
    name = model["model"]
    try:
        client = http.InferenceServerClient(url, connection_timeout=timeout_s, network_timeout=timeout_s)
        try:
            if not client.is_model_ready(name, version):
                raise NoOutputError(f"the server at {url} is running, but {name} version {version} is not ready")
            tensor = http.InferInput(model["input"], list(images.shape), utils.np_to_triton_dtype(images.dtype))
            tensor.set_data_from_numpy(images)
            response = client.infer(name, [tensor], version, outputs=[http.InferRequestedOutput(model["output"])])
            output = response.as_numpy(model["output"])
        finally:
            client.close()
    except (OSError, utils.InferenceServerException) as error:
        raise NoOutputError(f"the server at {url} returned no output of {name} version {version}: {error}") from error
    if output is None:
        raise NoOutputError(f"the server at {url} responded without {model['output']}")
    return np.asarray(output)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, print one line, and return the exit code."""
    parser = argparse.ArgumentParser(description="Compare the output of a Triton server with the golden output.")
    parser.add_argument("--url", default="localhost:8000", help="HTTP endpoint (default: %(default)s)")
    parser.add_argument(
        "--tolerance",
        type=float,
        help="allowed share of the largest value (default: golden.json)",
    )
    parser.add_argument("--version", help="version of the model (default: from golden.json)")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds (default: %(default)g)")
    parser.add_argument(
        "--golden",
        type=Path,
        default=Path(__file__).parent,
        help="folder of the pair (default: the script's)",
    )
    options = parser.parse_args(argv)
    try:
        model = json.loads((options.golden / "golden.json").read_text(encoding="utf-8"))
        images = np.load(options.golden / "input.npy", allow_pickle=False)
        golden = np.load(options.golden / "output.npy", allow_pickle=False)
        version = options.version or str(model["version"])
        tolerance = float(model["tolerance"]) if options.tolerance is None else options.tolerance
        output = infer(options.url, model, version, images, options.timeout)
    except (OSError, ValueError, KeyError) as error:
        print(f"no output: the golden pair cannot be read: {type(error).__name__}: {error}", file=sys.stderr)
        return NO_OUTPUT
    except NoOutputError as error:
        print(f"no output: {error}", file=sys.stderr)
        return NO_OUTPUT
    share = difference(output, golden)
    same = share <= tolerance
    print(
        f"{'same' if same else 'DIFFERS'}: {model['model']} version {version}, {model['output']} {output.shape}: the largest"
        f" difference is {share:.2g} of the largest golden value; {tolerance:g} is allowed"
    )
    return SAME if same else DIFFERS


if __name__ == "__main__":
    sys.exit(main())
