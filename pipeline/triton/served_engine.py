"""A model behind a server as an engine, so that the gate judges it like a file."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from maskplan.engines.base import Arrays, CallTiming, Classifier
from maskplan.pipeline.core.artifacts import Profile
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.triton.client import ServedModel, TritonClient


class ServedEngine:
    """An `Engine` whose calls go to a server.

    Args:
        client: Connection to the server; stays open.
        model: The model.
        version: The version that has to answer; every answer is checked.
    """

    def __init__(self, client: TritonClient, model: ServedModel, version: int) -> None:
        self.inputs, self.outputs = model.inputs, model.outputs
        self.last_timing: CallTiming | None = None
        self._client, self._name, self._version = client, model.name, version

    def infer(self, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run once, through the server."""
        answer = self._client.infer(self._name, feeds, [o.name for o in self.outputs], self._version)
        if answer.version not in (None, self._version):
            raise InputError(
                "another version answers",
                where=self._client.address,
                found=f"version {answer.version} of {self._name} instead of {self._version}",
                fix="repeat the check when the deployment has ended",
            )
        return answer.outputs

    def close(self) -> None:
        """Nothing is held here."""


def served_classifier(client: TritonClient, model: ServedModel, version: int) -> Classifier:
    """The served model as a classifier; batches are at most the server's.

    Raises:
        InputError: The model is not a classifier.
    """
    profiles = (Profile(1, model.max_batch, model.max_batch),) if model.max_batch else ()
    return Classifier(ServedEngine(client, model, version), f"{model.name} of {client.address}", profiles)
