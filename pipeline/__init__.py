"""maskplan's line: records, verdicts, the stages, and the one file that knows their order (`run.py`)."""

__version__ = "0.1.0"
