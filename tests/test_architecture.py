"""Imports between files and between folders: they must not form a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("pipeline", "exporters", "calibration", "engines")
Graph = dict[str, set[str]]


def sources() -> Iterator[tuple[str, Path]]:
    """Every module's import name and its file."""
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            yield ".".join(("maskplan", *(parts[:-1] if parts[-1] == "__init__" else parts))), file


def is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports, inside functions too, but not those for type checkers only."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif is_typing_only(child):
            assert isinstance(child, ast.If)
            for node in child.orelse:
                yield from imports(node)
        else:
            yield from imports(child)


def imported_modules(tree: ast.AST, modules: Mapping[str, Path]) -> set[str]:
    found = set()
    for node in imports(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in modules}
        elif node.module is not None:
            assert node.level == 0, "relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in modules or node.module in modules:
                    found.add(submodule if submodule in modules else node.module)
    return found


@cache
def file_graph() -> Graph:
    modules = dict(sources())
    return {name: imported_modules(ast.parse(file.read_text()), modules) - {name} for name, file in modules.items()}


def room(module: str) -> str:
    """The folder of a module; the files directly in `pipeline/` count one by one, as they join the rooms."""
    parts = module.split(".")[1:]
    if parts[0] != "pipeline":
        return parts[0]
    return ".".join(parts[:2])


def room_graph(files: Graph) -> Graph:
    rooms: Graph = {}
    for module, targets in files.items():
        rooms.setdefault(room(module), set()).update(room(t) for t in targets if room(t) != room(module))
    return rooms


def circles(graph: Graph) -> list[set[str]]:
    """Strongly connected components of more than one node: each reaches the others."""
    reached: Graph = {}
    for start in graph:
        seen: set[str] = set()
        queue = [start]
        while queue:
            for target in graph.get(queue.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    queue.append(target)
        reached[start] = seen
    components = {frozenset(b for b in reached[a] if a in reached.get(b, ())) | {a} for a in graph}
    return [set(c) for c in components if len(c) > 1]


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert circles(graph) == [{"b", "c"}]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_imports_are_found_in_functions_and_not_under_type_checking() -> None:
    modules = {
        name: Path() for name in ("maskplan.pipeline.core.errors", "maskplan.pipeline.run", "maskplan.exporters.ops")
    }
    text = (
        "if TYPE_CHECKING:\n    from maskplan.exporters.ops import X\n"
        "def f():\n    from maskplan.pipeline.core.errors import InputError\n"
        "from maskplan.pipeline import run\n"
    )
    found = imported_modules(ast.parse(text), modules)
    assert found == {"maskplan.pipeline.core.errors", "maskplan.pipeline.run"}


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = file_graph()
    assert len(graph) > 100
    assert sum(map(len, graph.values())) > 300
    assert circles(graph) == []


def test_no_folders_import_each_other_in_a_circle() -> None:
    graph = file_graph()
    rooms = room_graph(graph)
    assert len(rooms) > 15
    between = {
        f"{a} -> {b}"
        for circle in circles(rooms)
        for a, targets in graph.items()
        for b in targets
        if room(a) in circle and room(b) in circle and room(a) != room(b)
    }
    assert sorted(between) == []


def test_core_imports_no_other_folder() -> None:
    assert room_graph(file_graph())["pipeline.core"] == set()
