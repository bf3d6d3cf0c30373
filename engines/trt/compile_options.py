"""Options of the stage that compiles the line's ONNX files."""

from __future__ import annotations

from dataclasses import dataclass

from maskplan.pipeline.core.choices import AUTO, CompileMode


@dataclass(frozen=True)
class CompileOptions:
    """Whether to compile.

    Attributes:
        mode: `auto` compiles where the compiler is installed, and a refusal is a warning; `required` ends the run where it
            is not installed, and a refusal fails the run; `off` does not compile.
    """

    mode: CompileMode = AUTO
