"""A module's operators, as `torch.export` records them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.models.layers import sample_input
from maskplan.pipeline.models.module_outputs import flat_outputs

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

SAMPLE_BATCH = 2
"""Images in the sample input; with one image, the batch axis could be mistaken for a dimension of length 1."""


def export_aten(module: nn.Module, preprocessing: Preprocessing, *, whole_layers: bool = False) -> ExportedProgram:
    """Export a module in evaluation mode for `SAMPLE_BATCH` images.

    Args:
        module: Its weights do not change.
        preprocessing: Gives the size of an image.
        whole_layers: Keep operators such as `linear`; by default they are decomposed.

    Raises:
        Exception: Any that the exporter raises for the model's code.
    """
    import torch

    sample = sample_input(preprocessing, SAMPLE_BATCH)
    first = next(module.parameters(), None)
    if first is not None:
        sample = sample.to(first)
    with _quiet(), torch.no_grad(), flat_outputs(module):
        program = torch.export.export(module.eval(), (sample,))
        # An empty table keeps the operators but still replaces in-place changes by functional ones.
        decomposed: ExportedProgram = program.run_decompositions({} if whole_layers else None)
        return decomposed


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the output of the exporter, which logs and prints what it also raises."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(StringIO()), redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
