"""Runs users' own Python files, and what those import, from their text: cached bytecode may be of an older text."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType

INSTALLED = tuple(
    Path(path).resolve()
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
    if (path := sysconfig.get_paths().get(name))
)


def create_module(file: Path, name: str) -> ModuleType | None:
    """An empty module for a Python file, which `execute` fills; None if its name is not that of a Python file."""
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or not isinstance(spec.loader, SourceFileLoader):
        return None
    spec.loader = _FromText(name, spec.loader.path)
    return importlib.util.module_from_spec(spec)


def execute(module: ModuleType) -> None:
    """Run the file of a module, which may raise anything; to be called inside `imports_from`."""
    assert module.__spec__ is not None
    assert module.__spec__.loader is not None
    # Data classes look up their own module while they are created.
    sys.modules[module.__name__] = module
    module.__spec__.loader.exec_module(module)


@contextmanager
def imports_from(folder: Path) -> Iterator[None]:
    """Let a file import modules of its folder, as when Python runs it as a script."""
    path = str(folder.resolve())
    sys.path.insert(0, path)
    sys.meta_path.insert(0, _FindText)
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(path)
        with suppress(ValueError):
            sys.meta_path.remove(_FindText)


class _FromText(SourceFileLoader):
    """Compiles the file itself. Python takes cached bytecode for current if second and size of the file are the same."""

    def get_code(self, fullname: str) -> types.CodeType:
        path = self.get_filename(fullname)
        code: types.CodeType = self.source_to_code(self.get_data(path), path)
        return code


class _FindText:
    """Finds what Python finds; files outside the installed packages are compiled anew."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            file = Path(spec.loader.path).resolve()
            if not any(file.is_relative_to(root) for root in INSTALLED):
                spec.loader = _FromText(name, spec.loader.path)
        return spec
