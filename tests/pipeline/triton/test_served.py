"""Deployments of every kind, served by the real Triton server in strict mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deployable import built

from maskplan.pipeline.triton.deploy import DeployOptions, deploy


def test_classifier(tmp_path: Path, triton: Any) -> None:
    deploy(built(tmp_path / "engine"), DeployOptions(triton.repository, "classifier"))
    triton.server.load("classifier")
    assert triton.server.is_ready("classifier", 1)
    assert not triton.server.is_ready("classifier", 2)
