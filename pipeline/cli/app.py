"""`main`: arguments in, exit code out. 0 done and passed, 1 a gate failed, 2 wrong usage, 3 bad input or environment."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence

import typer

from maskplan.pipeline.cli import (
    calibrate,
    checkpoints,
    compare,
    convert,
    engine,
    engines,
    gates,
    permute,
    probe,
    stability,
)
from maskplan.pipeline.cli.renamed_flags import with_new_flags
from maskplan.pipeline.core.errors import PipelineError
from maskplan.pipeline.core.interrupts import INTERRUPTS, listening
from maskplan.pipeline.core.progress import is_main_process, stderr_console

PASSED, GATE_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 3, 130
_SIGNALLED = 128

_SUMMARY = """Take a CNN checkpoint to a 2:4-sparse engine that can be trusted.

`maskplan engine MODEL` runs the whole line; every stage is also a command that works alone on files of other tools.
"""
_EXAMPLES = """Examples:\n
  maskplan engine digits_resnet\n
  maskplan engine resnet50 --weights w.pth --data imagenet\n
  maskplan check model.onnx --report check.json
"""

app = typer.Typer(
    name="maskplan",
    help=_SUMMARY,
    epilog=_EXAMPLES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (engine, checkpoints, permute, convert, gates, compare, calibrate, engines, stability, probe):
    module.register(app)


def _print_version(asked: bool) -> None:
    if asked:
        from maskplan.pipeline import __version__

        print(f"maskplan {__version__}")
        raise typer.Exit


@app.callback()
def common(
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Say more on stderr."),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="Only warnings and errors on stderr."),
    version: bool = typer.Option(
        False, "--version", help="Print the version and end.", is_eager=True, callback=_print_version
    ),
) -> None:
    """Options of every command."""
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    if not is_main_process():
        level = logging.ERROR
    handler = _Narration()
    logger = logging.getLogger("maskplan")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


class _Narration(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        stderr_console().print(f"{prefix}{record.getMessage()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code. An error of ours (a bug) keeps its traceback.
    """
    try:
        with listening():
            typed, notes = with_new_flags(sys.argv[1:] if argv is None else argv)
            for note in notes:
                print(f"note: {note}", file=sys.stderr)
            # Commands find in `obj` what was typed, for the record.
            app(args=typed, prog_name="maskplan", obj=tuple(typed))
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except gates.GateError as error:
        print(f"failed: {error}", file=sys.stderr)
        return GATE_FAILED
    except SystemExit as end:  # how typer ends, also after a command that went well
        code = end.code if isinstance(end.code, int) else PASSED if end.code is None else GATE_FAILED
        if code == INTERRUPTED:
            print("interrupted; finished stages are kept, and the same command goes on from there", file=sys.stderr)
            return _SIGNALLED + (INTERRUPTS.came or signal.SIGINT)
        return code
    return PASSED
