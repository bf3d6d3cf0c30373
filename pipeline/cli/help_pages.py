"""Help pages: examples as a user would type them, and defaults read from the options records.

Records are imported only when a help page is printed, so that `maskplan --help` stays fast.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from maskplan.pipeline.core.escaping import one_line

Defaults = Callable[[], Mapping[str, object]]


class GroupWithExamples(TyperGroup):
    """The first help page, and the messages about wrong usage, which repeat what was typed."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        with _escaped_usage_errors():
            return super().invoke(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options before the command."""
        with _escaped_usage_errors():
            return list(super().parse_args(ctx, args))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the page; the epilog is printed verbatim, because typer would wrap commands like prose."""
        examples, self.epilog = self.epilog, None
        super().format_help(ctx, formatter)
        _print_examples(examples)


class CommandWithExamples(TyperCommand):
    """The help page of a command."""

    defaults: ClassVar[tuple[Defaults, ...]] = ()

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the page with the defaults that apply to options left out."""
        values = {name: value for defaults in self.defaults for name, value in defaults().items()}
        for parameter in self.params:
            if parameter.default is None and values.get(parameter.name or "") not in (None, ()):
                # The command ends after its help page, so the value is never used as an argument.
                parameter.default = _shown(values[parameter.name or ""])
        examples, self.epilog = self.epilog, None
        super().format_help(ctx, formatter)
        _print_examples(examples)


def add_command(
    app: typer.Typer, function: Callable[..., None], examples: str, defaults: Defaults | None = None, name: str = ""
) -> None:
    """Add a command to the app.

    Args:
        app: The app.
        function: The command.
        examples: Command lines for the help page, one a line.
        defaults: Gives default values of options by parameter name; called when the help page is printed.
        name: Of the command; the function's by default.
    """
    page = type("CommandPage", (CommandWithExamples,), {"defaults": () if defaults is None else (defaults,)})
    app.command(name or function.__name__, cls=page, epilog=examples)(function)


@contextlib.contextmanager
def _escaped_usage_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # The exceptions of click, which typer brings along under a private name.
        if isinstance(message := getattr(error, "message", None), str):
            error.message = one_line(message)  # type: ignore[attr-defined]
        raise


def _shown(value: object) -> object:
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def _print_examples(examples: str | None) -> None:
    lines = (examples or "").strip().splitlines()
    if lines:
        print("\n".join(["Examples:", *(f"  {line.strip()}" for line in lines)]))
