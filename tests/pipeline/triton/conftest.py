"""The real Triton server, where it is installed; it also loads every config that a test of this folder makes."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from triton_server import TritonServer, missing, triton_server

from maskplan.pipeline.triton import config, deploy
from maskplan.pipeline.triton.client import TritonClient, parse_address
from maskplan.pipeline.triton.pbtxt import parse, quoted


@dataclass(frozen=True)
class Served:
    """A repository and the server of it, which loads a model when told to."""

    repository: Path
    server: TritonServer

    def infer(self, name: str, feeds: dict[str, Any], version: int | None = None) -> dict[str, Any]:
        """All outputs for one request."""
        client = TritonClient(parse_address(self.server.http), 30)
        try:
            outputs = [spec.name for spec in client.model(name, version).outputs]
            return client.infer(name, feeds, outputs, version).outputs
        finally:
            client.close()


@pytest.fixture(scope="session")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The real server in explicit mode and with strict configs. Deploy under a name of your own, and load it."""
    if missing():
        pytest.skip(missing())
    repository = tmp_path_factory.mktemp("triton") / "models"
    repository.mkdir()
    with triton_server(repository) as server:
        yield Served(repository, server)


@pytest.fixture(scope="session")
def loads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str] | None]:
    """A function that has the real server load a model with a config, in strict mode; it returns what the server says.

    The backends accept any model, so that only the config is judged. None where there is no server.
    """
    if missing():
        yield None
        return
    verdicts: dict[str, str] = {}
    with contextlib.ExitStack() as running:
        servers: list[tuple[TritonServer, Path]] = []

        def restart() -> None:
            running.close()
            repository = tmp_path_factory.mktemp("configs") / "models"
            repository.mkdir()
            servers[:] = [(running.enter_context(triton_server(repository, any_model=True)), repository)]

        def load(text: str) -> str:
            # Which versions are served changes nothing that a config is judged by.
            key = re.sub(r"versions: \[.*?\]", "", text)
            # Triton 2.51 now and then crashes while it unloads one model and loads another.
            for attempt in range(3):
                if key in verdicts:
                    break
                if not servers:
                    restart()
                try:
                    verdicts[key] = _load(*servers[0], text)
                except OSError:
                    if servers[0][0].process.poll() is None or attempt == 2:
                        raise
                    servers.clear()
            return verdicts[key]

        yield load


def _load(server: TritonServer, repository: Path, text: str) -> str:
    written = parse(text)
    # A name of its own: Triton 2.51 now and then crashes when it loads a model again that it is unloading.
    name = f"{written.text('name')[:200]}-{next(_counter)}"
    text = text.replace(quoted(written.text("name")), quoted(name), 1)
    folder = repository / name
    folder.mkdir()
    versions = [
        v for p in written.messages("version_policy") for s in p.messages("specific") for v in s.texts("versions")
    ]
    try:
        for version in versions:
            (folder / version).mkdir()
        for output in written.messages("output"):
            if output.text("label_filename"):
                (folder / output.text("label_filename")).write_text("a\nb\n")
        # There is no GPU, and the backend's NumPy has no BF16.
        text = text.replace("KIND_GPU", "KIND_CPU").replace("TYPE_BF16", "TYPE_FP16")
        (folder / "config.pbtxt").write_text(text)
        status, answer = server.ask("POST", f"/v2/repository/models/{name}/load")
        if status != 200:
            return str(answer)
        ready = {version for version, (state, _) in server.versions(name).items() if state == "READY"}
        server.unload(name)
        return "" if ready == set(versions) else f"served: {ready}, wanted: {versions}"
    finally:
        folder.rename(repository.parent / name)


_counter = itertools.count()


@pytest.fixture(autouse=True)
def _every_config_loads(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, loads: Callable[[str], str] | None
) -> Iterator[None]:
    """Load every config that the test's process makes; what the server refuses fails the test."""
    texts: list[str] = []
    make = config.config_text

    def recorded(*args: Any, **options: Any) -> str:
        texts.append(make(*args, **options))
        return texts[-1]

    for module in (config, deploy, request.module):
        if hasattr(module, "config_text"):
            monkeypatch.setattr(module, "config_text", recorded)
    yield
    if loads is not None:
        refused = {text: said for text in dict.fromkeys(texts) if (said := loads(text))}
        assert not refused, "\n".join(f"{said}\n{text}" for text, said in refused.items())
