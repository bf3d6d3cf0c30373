"""The files of a model's code: the user's own file and all that it imported from outside the installed packages."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from maskplan.pipeline.core.files import sha256_of
from maskplan.pipeline.core.user_code import INSTALLED


@dataclass(frozen=True)
class SourceFile:
    """A Python file by its name relative to the folder of the model's file, so that both can be moved together."""

    name: str
    digest: str


def imported_sources(module: ModuleType) -> tuple[SourceFile, ...]:
    """The files that a module imported, directly or not, from outside the installed packages; without its own file.

    Import statements are followed where the imported module was really loaded, those inside functions too.
    """
    assert module.__file__ is not None  # made from a file
    folder = Path(module.__file__).resolve().parent
    files: dict[Path, None] = {}
    waiting, seen = [module], {module.__name__}
    while waiting:
        for found in _loaded_imports(waiting.pop()):
            if found.__name__ not in seen:
                seen.add(found.__name__)
                path = _own_file(found)
                if path is not None:
                    files[path] = None
                    waiting.append(found)
    return tuple(SourceFile(os.path.relpath(path, folder), sha256_of(path)) for path in sorted(files))


def all_found(sources: Sequence[SourceFile], folder: Path) -> bool:
    """Whether no file is missing; on another host they may be."""
    return all((folder / source.name).is_file() for source in sources)


def unchanged(sources: Sequence[SourceFile], folder: Path) -> bool:
    """Whether the files still have these digests; a missing file counts as unchanged."""
    paths = ((folder / source.name, source.digest) for source in sources)
    return all(not path.is_file() or sha256_of(path) == digest for path, digest in paths)


def code_sha256(identity: Sequence[str], sources: Sequence[SourceFile]) -> str:
    """Digest of the text of a model's code."""
    lines = [*identity, *(f"{source.name} {source.digest}" for source in sources)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _own_file(module: ModuleType) -> Path | None:
    """A module's file, unless it belongs to Python, to an installed package or to maskplan."""
    name = getattr(module, "__file__", None)
    if not name or not name.endswith(".py") or module.__name__.partition(".")[0] == "maskplan":
        return None
    path = Path(name).resolve()
    return None if any(path.is_relative_to(root) for root in INSTALLED) else path


def _loaded_imports(module: ModuleType) -> Iterator[ModuleType]:
    try:
        tree = ast.parse(Path(module.__file__ or "").read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for name in _imported_names(tree, module.__package__ or ""):
        # A package's own file runs too when one of its modules is imported.
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            found = sys.modules.get(".".join(parts[:length]))
            if found is not None:
                yield found


def _imported_names(tree: ast.AST, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                try:
                    base = importlib.util.resolve_name("." * node.level + base, package)
                except ImportError:
                    continue
            yield base
            # `from package import module` imports a module, if there is one of this name.
            yield from (f"{base}.{alias.name}" for alias in node.names if base)
