"""Exit codes of `maskplan`, and the error that stands for a failed gate."""

from __future__ import annotations

PASSED, GATE_FAILED, WRONG_USAGE, BAD_INPUT = 0, 1, 2, 3
# A process that a signal ends: 128 plus the number of the signal.
SIGNALED = 128


class GateError(Exception):
    """A check or a gate failed: the command ends with exit code 1."""
