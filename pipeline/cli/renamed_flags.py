"""Command-line options under their old names: still accepted, with a note that names the new one."""

from __future__ import annotations

from collections.abc import Sequence

RENAMED_FLAGS = {
    "--rest": "--float-dtype",
    "--confident": "--use-ci",
    "--point": "--use-point",
    "--stripped": "--strip-plan",
}
RENAMED_VALUES = {("--method", "report"): "danhofer2024", ("--masks", "report"): "danhofer2024"}


def with_new_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments with renamed options under their new names, and one note for each that was renamed."""
    renamed: list[str] = []
    notes: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag in RENAMED_FLAGS:
            notes.append(f"{flag} is now called {RENAMED_FLAGS[flag]}")
            argument = RENAMED_FLAGS[flag] + equals + value
        previous = renamed[-1] if renamed else ""
        option, old = (flag, value) if equals else (previous, argument)
        new = RENAMED_VALUES.get((option, old))
        if new is not None:
            notes.append(f"{option} {old} is now called {option} {new}")
            argument = f"{option}={new}" if equals else new
        renamed.append(argument)
    return renamed, notes
