"""The list of mutants stays in step with the code; `make mutants` runs the mutants themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_every_mutant_fits_the_code_and_its_tests_exist() -> None:
    command = [sys.executable, str(Path(__file__).with_name("run.py")), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
