"""Break the code in one place at a time and check that the nearest tests notice; `make mutants` runs all of them.

`mutants.toml` lists the mutants. Each is applied to a copy of the working tree; the working tree itself is not changed.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("mutants.toml")
PACKAGES = ("pipeline", "exporters", "calibration", "engines")
MAX_EXPLAINED = 3
# Of the tests of one mutant; a mutant that makes them run longer counts as killed.
TIMEOUT_S = 900
# A worker's exit status where a test failed, and where all passed; any other one means that no test ran.
PASSED, FAILED = 0, 1


@dataclass(frozen=True)
class Mutant:
    """One deliberate fault.

    Attributes:
        name: Short name, for `--only`.
        file: The file that is changed.
        old: Code that occurs exactly once in the file.
        new: What replaces it.
        tests: The nearest tests: files, or `file::test`.
        breaks: What the fault means for a user.
        explained: Why no test can notice it; empty for a mutant that must be killed.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    breaks: str
    explained: str = ""

    def applied(self, source: str) -> str:
        """The file's content with the fault."""
        return source.replace(self.old.strip("\n"), self.new.strip("\n"))


def read_mutants() -> list[Mutant]:
    """The mutants in the order of the list."""
    return [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in tomllib.loads(LIST.read_text())["mutant"]]


def problems_of(mutants: list[Mutant]) -> Iterator[str]:
    """Why the list no longer fits the code."""
    names = [mutant.name for mutant in mutants]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{name}: the name occurs {names.count(name)} times"
    explained = [mutant.name for mutant in mutants if mutant.explained]
    if len(explained) > MAX_EXPLAINED:
        yield f"{len(explained)} mutants are explained, at most {MAX_EXPLAINED} may be: {', '.join(explained)}"
    for mutant in mutants:
        path = ROOT / mutant.file
        source = path.read_text() if path.is_file() else ""
        count = source.count(mutant.old.strip("\n"))
        if count != 1:
            yield f"{mutant.name}: the old code occurs {count} times in {mutant.file}"
        elif path.suffix == ".py":
            try:
                if ast.dump(ast.parse(mutant.applied(source))) == ast.dump(ast.parse(source)):
                    yield f"{mutant.name}: the new code is the old code"
            except SyntaxError as error:
                yield f"{mutant.name}: the new code is no Python: {error}"
        for test in mutant.tests:
            file, _, function = test.partition("::")
            text = (ROOT / file).read_text() if (ROOT / file).is_file() else ""
            if not re.search(rf"def {re.escape(function) or 'test_'}", text):
                yield f"{mutant.name}: there is no test {test}"


def copy_tree(folder: Path) -> dict[str, str]:
    """Copy the tracked and the new files; returns an environment in which `maskplan` is the copy."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in names:
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    links = folder / ".packages" / "maskplan"
    links.mkdir(parents=True)
    for package in PACKAGES:
        (links / package).symlink_to(folder / package)
    environment = os.environ | {"PYTHONPATH": str(links.parent), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    show = "import maskplan.pipeline.run as run; print(run.__file__)"
    found = subprocess.run([sys.executable, "-c", show], env=environment, capture_output=True, text=True, check=True)
    if not Path(found.stdout.strip()).resolve().is_relative_to(folder.resolve()):
        sys.exit(f"maskplan is not imported from the copy, but from {found.stdout}")
    return environment


def run_tests(tests: tuple[str, ...], folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Exit status of pytest, and the test that failed, `before` it where a fixture failed, or the end of the output."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", f"--basetemp={folder / '.tmp'}"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return FAILED, "the tests did not end"
    failed = re.search(r"^(FAILED|ERROR) \S*?([^/\s]+\.py\S*)", done.stdout, re.MULTILINE)
    if failed is None:
        return done.returncode, done.stdout.strip()[-400:]
    return done.returncode, failed[2] if failed[1] == "FAILED" else f"before {failed[2]}"


def run_mutant(mutant: Mutant, folder: Path, environment: dict[str, str]) -> tuple[str, str]:
    """`killed`, `survived` or `not run`, and a remark."""
    path = folder / mutant.file
    source = path.read_text()
    compiled = Path(importlib.util.cache_from_source(path))
    try:
        path.write_text(mutant.applied(source))
        # Compiled code is matched by size and second of the last change, which two versions may share.
        compiled.unlink(missing_ok=True)
        status, remark = run_tests(mutant.tests, folder, environment)
    finally:
        path.write_text(source)
        compiled.unlink(missing_ok=True)
    if status == PASSED:
        return "survived", mutant.explained or mutant.breaks
    return ("killed", remark) if status == FAILED else ("not run", remark)


def main() -> int:
    """Run the mutants; exit status 1 if one survives without an explanation, or the list does not fit the code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="run this mutant; may be repeated")
    parser.add_argument("--folder", metavar="FOLDER", help="run the mutants of files below this folder")
    parser.add_argument("--check", action="store_true", help="only compare the list with the code")
    parser.add_argument("--original", action="store_true", help="run the tests on the unchanged code, which must pass")
    arguments = parser.parse_args()
    mutants = read_mutants()
    problems = list(problems_of(mutants))
    for problem in problems:
        print(problem)
    if problems or arguments.check:
        return int(bool(problems))
    if unknown := set(arguments.only) - {mutant.name for mutant in mutants}:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    mutants = [m for m in mutants if not arguments.only or m.name in arguments.only]
    mutants = [m for m in mutants if arguments.folder is None or Path(m.file).is_relative_to(arguments.folder)]
    results: list[str] = []
    with tempfile.TemporaryDirectory(prefix="maskplan-mutants-") as name:
        folder = Path(name)
        environment = copy_tree(folder)
        if arguments.original:
            status, remark = run_tests(tuple(dict.fromkeys(t for m in mutants for t in m.tests)), folder, environment)
            print(f"original: {'passed' if status == PASSED else remark}")
            return int(status != PASSED)
        for mutant in mutants:
            started = time.monotonic()
            result, remark = run_mutant(mutant, folder, environment)
            results.append("explained" if result == "survived" and mutant.explained else result)
            print(f"{results[-1]:<9} {time.monotonic() - started:5.0f} s  {mutant.name}: {remark}", flush=True)
    print(", ".join(f"{results.count(kind)} {kind}" for kind in dict.fromkeys(sorted(results))))
    return int(any(result in ("survived", "not run") for result in results))


if __name__ == "__main__":
    sys.exit(main())
