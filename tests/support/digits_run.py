"""Options of the finished run on the digits that tests share; a run in its folder with the same keeps its masks."""

from __future__ import annotations

LEARN = "[learn]\nepochs = 10\n"
"""A third of the epochs, with which the digits lose as little."""
