"""Compiled loops where nothing can be cached."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Neither the folder of the package nor that of the user can be written. Root may write anywhere, so both are taken away.
READ_ONLY = """
import numba.core.caching as caching

nowhere = classmethod(lambda cls, *_: None)
caching.InTreeCacheLocator.from_function = caching.UserWideCacheLocator.from_function = nowhere
"""
MASKS = """
import numpy as np
import maskplan.pipeline.learning.fused
import maskplan.pipeline.masking.layerwise_descent
from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.masking.transposable import transposable_mask
from maskplan.pipeline.permutation import anneal

print(int(transposable_mask(np.ones((8, 8)), Pattern(2, 4)).sum()))
anneal.start(np.ones((4, 2), np.float32), np.arange(4), 2, 4, 1, table=False)
"""
PLOT = """
import maskplan.pipeline.report.plots
from matplotlib.figure import Figure

Figure().text(0, 0, "x")
"""


@pytest.mark.parametrize(
    "program", [pytest.param(READ_ONLY + MASKS, marks=pytest.mark.slow), PLOT], ids=["masks", "plots"]
)
def test_without_a_place_for_caches_the_work_is_done_in_silence(program: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA", "XDG", "MPL"))}
    environment["HOME"] = "/dev/null/home"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert (done.returncode, done.stderr) == (0, "")
