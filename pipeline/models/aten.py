"""A module's operators, read off by `torch.export`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.models.layers import sample_input

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

IMAGES = 2
"""Images in the sample: one could be taken for a dimension of length 1."""


def export_aten(module: nn.Module, preprocessing: Preprocessing, *, whole_layers: bool = False) -> ExportedProgram:
    """Export a module in evaluation mode for `IMAGES` images.

    Args:
        module: Its weights stay as they are.
        preprocessing: Preprocessing, for the size of an image.
        whole_layers: Leave operators such as `linear` as they are; by default they are taken apart.

    Raises:
        Exception: Whatever the model's code leads the exporter to.
    """
    import torch

    sample = sample_input(preprocessing, IMAGES)
    for parameter in module.parameters():
        sample = sample.to(parameter)
        break
    with _quiet(), torch.no_grad():
        program = torch.export.export(module.eval(), (sample,))
        # An empty table leaves operators as they are, and takes out changes in place.
        taken_apart: ExportedProgram = program.run_decompositions({} if whole_layers else None)
        return taken_apart


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs and prints what it raises anyway."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(StringIO()), redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
