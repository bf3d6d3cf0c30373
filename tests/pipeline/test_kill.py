"""Runs that are killed, interrupted or run out of disk: no partial file, and the next run ends with the same bytes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors import safe_open
from small_line import STAGES, TIMED, VISIBLE, Line, digests, stages_of

SAME = [name for name in VISIBLE if name not in TIMED]


def start(line: Line, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "maskplan.pipeline", "engine", *line.options, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_whole(folder: Path) -> None:
    """Every file at its final name can be read to its end."""
    for path in folder.rglob("*"):
        if path.is_dir() or path.name.startswith(".") or path.name == "lock":
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".onnx":
            onnx.checker.check_model(onnx.load(path))
        elif path.suffix == ".safetensors":
            with safe_open(path, "np") as file:
                for name in file.keys():  # noqa: SIM118
                    assert np.asarray(file.get_tensor(name)).size
        elif path.suffix == ".csv":
            continue  # a log, which grows
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")
        else:
            raise AssertionError(f"a file that this test does not know: {path}")


def kill_until_done(line: Line, out: Path, seed: int, kills: int, cli: Callable[..., Any]) -> int:
    """Kill runs at random moments, in new folders and in ones that were killed before; how many had begun a stage."""
    moments, begun = random.Random(seed), 0
    for _ in range(kills):
        process = start(line, out)
        assert process.stderr is not None
        # Imports take their time; from the first word on, the run is at work for about three seconds.
        first = process.stderr.readline()
        time.sleep(moments.uniform(0, 3))
        process.send_signal(signal.SIGKILL)
        _, rest = process.communicate()
        begun += "…" in first + rest
        assert_whole(out)
    ran = cli("engine", *line.options, "--out", out)
    assert ran.code == 0, ran.err
    assert digests(out, SAME) == digests(line.out, SAME)
    assert not list(out.rglob("*.maskplan-tmp"))
    return begun


def test_killed_runs_leave_whole_files_and_end_with_the_same_bytes(
    line: Line, cli: Callable[..., Any], tmp_path: Path
) -> None:
    assert kill_until_done(line, tmp_path / "out", seed=1, kills=2, cli=cli) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_twenty_killed_runs(line: Line, cli: Callable[..., Any], tmp_path: Path, seed: int) -> None:
    assert kill_until_done(line, tmp_path / f"another folder {seed}", seed=seed, kills=5, cli=cli) >= 1


@pytest.mark.slow
def test_ctrl_c_keeps_finished_stages_and_says_so(line: Line, cli: Callable[..., Any], tmp_path: Path) -> None:
    process = start(line, tmp_path / "out")
    assert process.stderr is not None
    told = ""
    while "export-dense: " not in told:
        told += process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to continue" in rest
    assert "Traceback" not in rest
    assert_whole(tmp_path / "out")
    ran = cli("engine", *line.options, "--out", tmp_path / "out")
    assert ran.code == 0
    assert {"load", "images", "export-dense"} <= set(stages_of(ran.err).reused)
    assert digests(tmp_path / "out", SAME) == digests(line.out, SAME)


# --- a full disk

# Files may grow to the first argument's number of bytes; a larger write fails as on a full disk.
LIMITED = """
import os, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
os.execv(sys.argv[2], sys.argv[2:])
"""


def run_limited(line: Line, out: Path, limit: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "maskplan.pipeline", "engine", *line.options, "--out", str(out)]
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *command], capture_output=True, text=True, check=False
    )


def limits(line: Line) -> list[int]:
    """From not even a record of the first stage to everything but the largest file, which is the report."""
    sizes = {name: (line.out / name).stat().st_size for name in VISIBLE}
    # The report's size depends on the digits of its figures, so the last limit keeps its distance.
    second = max(size for name, size in sizes.items() if name != "report.html")
    return [100, sizes["dense.safetensors"] - 1, sizes["dense.onnx"] - 1, (second + sizes["report.html"]) // 2]


def fill_disk(line: Line, out: Path, limit: int) -> None:
    """The run ends with one message and leaves whole files only."""
    done = run_limited(line, out, limit)
    assert done.returncode == 3, done.stderr
    message = done.stderr[done.stderr.index("error:") :]
    assert message.startswith("error: the disk is full")
    assert "run the same command again" in message
    assert "Traceback" not in done.stderr
    if out.exists():
        assert_whole(out)
        assert not list(out.rglob("*.maskplan-tmp"))


@pytest.mark.slow
def test_a_full_disk_ends_with_a_message_and_finished_stages_are_kept(
    line: Line, cli: Callable[..., Any], tmp_path: Path
) -> None:
    fill_disk(line, tmp_path / "none", limits(line)[0])
    out = tmp_path / "all but the report"
    fill_disk(line, out, limits(line)[-1])
    ran = cli("engine", *line.options, "--out", out)
    assert ran.code == 0, ran.err
    assert len(stages_of(ran.err).reused) == len(STAGES) - 1
    assert digests(out, SAME) == digests(line.out, SAME)


@pytest.mark.slow
def test_a_run_continues_after_a_full_disk_wherever_it_stopped(
    line: Line, cli: Callable[..., Any], tmp_path: Path
) -> None:
    finished = []
    for limit in limits(line)[:-1]:
        out = tmp_path / f"limit {limit}"
        fill_disk(line, out, limit)
        ran = cli("engine", *line.options, "--out", out)
        assert ran.code == 0, ran.err
        finished.append(len(stages_of(ran.err).reused))
        assert digests(out, SAME) == digests(line.out, SAME)
    assert finished[0] == 0
    assert finished == sorted(finished)


@pytest.mark.slow
def test_a_full_disk_does_not_spoil_a_finished_folder(line: Line, again: Line, cli: Callable[..., Any]) -> None:
    before = digests(again.out)
    changed = Line(again.out, (*again.options, "--masks", "magnitude"))
    done = run_limited(changed, again.out, 900)
    assert done.returncode == 3
    assert "the disk is full" in done.stderr
    assert digests(again.out) == before
    ran = cli("engine", *line.options, "--out", again.out)
    assert ran.code == 0
    assert digests(again.out, SAME) == digests(line.out, SAME)
