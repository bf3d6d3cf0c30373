"""`main`: arguments in, exit code out. 0 done and passed, 1 a gate failed, 2 wrong usage, 3 bad input or environment."""

from __future__ import annotations

import contextvars
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from maskplan.pipeline.cli import (
    bake,
    build,
    calibrate,
    check,
    compare,
    convert,
    convert_precision,
    deploy,
    engine,
    export,
    inspect_engine,
    mask,
    permute,
    probe,
    prune,
    serve_check,
    stability,
    time_engines,
)
from maskplan.pipeline.cli.exit_codes import BAD_INPUT, GATE_FAILED, PASSED, SIGNALED, GateError
from maskplan.pipeline.cli.help_pages import GroupWithExamples
from maskplan.pipeline.cli.renamed_flags import with_new_flags
from maskplan.pipeline.core.errors import PipelineError
from maskplan.pipeline.core.escaping import one_line
from maskplan.pipeline.core.interrupts import INTERRUPTS, handle_signals
from maskplan.pipeline.core.progress import is_main_process, stderr_console
from maskplan.pipeline.core.terminal import escaped_output

_SUMMARY = """Turn a CNN checkpoint into a checked 2:4-sparse engine.

`maskplan engine MODEL` runs the whole pipeline. Every stage is also a command that works on files of other tools.
"""
_EXAMPLES = """
maskplan engine digits_resnet
maskplan engine resnet50 --weights w.pth --data imagenet
maskplan check model.onnx --report check.json
"""
# The exit code of click for Ctrl-C.
_INTERRUPTED = 130

app = typer.Typer(
    name="maskplan",
    cls=GroupWithExamples,
    help=_SUMMARY,
    epilog=_EXAMPLES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# In the order of the help page.
for module in (
    engine,
    mask,
    bake,
    export,
    permute,
    convert,
    check,
    prune,
    compare,
    calibrate,
    convert_precision,
    build,
    time_engines,
    inspect_engine,
    deploy,
    serve_check,
    stability,
    probe,
):
    module.register(app)


def _print_version(requested: bool) -> None:
    if requested:
        from maskplan.pipeline import __version__

        print(f"maskplan {__version__}")
        raise typer.Exit


@app.callback()
def common(
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Print more details on stderr."),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="Print only warnings and errors on stderr."),
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
    ),
) -> None:
    """Options of every command."""
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    if not is_main_process():
        level = logging.ERROR
    logger = logging.getLogger("maskplan")
    logger.handlers[:] = [_StderrHandler()]
    logger.setLevel(level)
    logger.propagate = False


class _StderrHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        # Names cannot start a line; errors, which have several lines, are escaped where they are made.
        arguments = record.args if isinstance(record.args, tuple) else ()
        named = tuple(one_line(a) if isinstance(a, str | Path) else a for a in arguments)
        message = str(record.msg) % named if named else record.getMessage()
        stderr_console().print(f"{prefix}{message}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        The exit code. An exception that is a bug of maskplan is not caught.
    """
    with escaped_output():
        # A copy, so that what a command sets for its messages ends with it.
        return contextvars.copy_context().run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    try:
        with handle_signals():
            arguments, notes = with_new_flags(sys.argv[1:] if argv is None else argv)
            for note in notes:
                print(f"note: {note}", file=sys.stderr)
            # `obj` passes the command line on to the report.
            app(args=arguments, prog_name="maskplan", obj=tuple(arguments))
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        # What the system refused where nothing more specific was known: a name too long, a folder in place of a file.
        if logging.getLogger("maskplan").isEnabledFor(logging.DEBUG):
            raise
        print(f"error: {_system_error(error)}", file=sys.stderr)
        return BAD_INPUT
    except GateError as error:
        print(f"failed: {error}", file=sys.stderr)
        return GATE_FAILED
    except SystemExit as end:  # typer always raises it, also after success
        code = end.code if isinstance(end.code, int) else PASSED if end.code is None else GATE_FAILED
        if code == _INTERRUPTED:
            print("interrupted; finished stages are kept: run the same command again to continue", file=sys.stderr)
            return SIGNALED + (INTERRUPTS.pending or signal.SIGINT)
        return code
    return PASSED


def _system_error(error: OSError) -> PipelineError:
    where = None if error.filename is None else os.fsdecode(error.filename)
    return PipelineError(
        "the operating system refuses an operation",
        where=where,
        found=error.strerror or f"{type(error).__name__}: {error}",
        fix="check the path, its permissions and the space on the disk; -v shows where it happened",
    )
