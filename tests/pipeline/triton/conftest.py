"""The real Triton server, where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from triton_server import TritonServer, missing, triton_server


@dataclass(frozen=True)
class Served:
    """A repository and the server of it, which loads a model when told to."""

    repository: Path
    server: TritonServer


@pytest.fixture(scope="session")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The real server in explicit mode and with strict configs. Deploy under a name of your own, and load it."""
    if missing():
        pytest.skip(missing())
    repository = tmp_path_factory.mktemp("triton") / "models"
    repository.mkdir()
    with triton_server(repository) as server:
        yield Served(repository, server)
