"""TensorRT for the contracts that the stand-in and a GPU host both have to keep."""

from __future__ import annotations

import pytest
from tensorrt_hosts import HOSTS, install_host


@pytest.fixture(params=HOSTS)
def tensorrt_host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """TensorRT and a GPU are here, stand-ins or real ones; which."""
    install_host(request.param, monkeypatch)
    return str(request.param)
