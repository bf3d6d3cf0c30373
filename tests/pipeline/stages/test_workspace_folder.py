"""The output folder: one run at a time, and what is left of a run that failed."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from workspace_stages import fail_after_a_stage, run_stage

from maskplan.pipeline.core.errors import HostError, InputError
from maskplan.pipeline.core.files import TEMPORARY_SUFFIX
from maskplan.pipeline.stages.workspace import STATE, Workspace

# --- one run at a time


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """A folder with a finished stage that somebody holds."""
    run_stage(tmp_path / "out", {"digest": "a"})
    with (tmp_path / "out" / STATE / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write("4242")
        lock.flush()
        yield tmp_path / "out"


def test_a_folder_in_use_is_refused_with_its_holder(held: Path) -> None:
    with pytest.raises(HostError) as refused, Workspace(held):
        pass

    assert "another run is using the folder" in str(refused.value)
    assert str(held) in str(refused.value)
    assert "4242" in str(refused.value)


def test_a_refused_run_touches_nothing(held: Path) -> None:
    (held / f".note.txt.4242{TEMPORARY_SUFFIX}").write_text("half of it")

    with pytest.raises(HostError), Workspace(held):
        pass

    assert (held / "note.txt").is_file()
    assert (held / f".note.txt.4242{TEMPORARY_SUFFIX}").is_file()
    assert (held / STATE / "lock").read_text() == "4242"


def test_the_command_line_refuses_a_folder_in_use(held: Path, cli: Callable[..., Any], tiny_spec: str) -> None:
    ran = cli("engine", tiny_spec, "--weights", "random", "--out", held)

    assert ran.code == 3
    assert "another run is using the folder" in ran.err
    assert "process 4242" in ran.err


def test_one_process_holds_a_folder_against_another(tmp_path: Path) -> None:
    hold = (
        "import sys; from pathlib import Path; from maskplan.pipeline.stages.workspace import Workspace\n"
        "with Workspace(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(HostError, match=f"process {other.pid}"), Workspace(tmp_path / "out"):
            pass
        other.kill()
        other.wait()

        # The lock went with the process, though its file still names it.
        with Workspace(tmp_path / "out"):
            pass


def test_the_lock_of_a_dead_process_does_not_block(tmp_path: Path) -> None:
    (tmp_path / "out" / STATE).mkdir(parents=True)
    (tmp_path / "out" / STATE / "lock").write_text("999999999")

    assert run_stage(tmp_path / "out", {})[1]


def test_a_folder_is_free_again_after_a_run_even_a_failed_one(tmp_path: Path) -> None:
    for error in (InputError("bad"), HostError("full"), KeyboardInterrupt(), ZeroDivisionError()):
        with pytest.raises(type(error)), Workspace(tmp_path / "out"):
            raise error

    with Workspace(tmp_path / "out"):
        pass


# --- what is left


def test_temporary_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    run_stage(tmp_path / "out", {"digest": "a"})
    leftovers = [
        tmp_path / "out" / f".note.txt.12{TEMPORARY_SUFFIX}",
        tmp_path / "out" / STATE / f".write.json.12{TEMPORARY_SUFFIX}",
    ]
    for path in leftovers:
        path.write_text("half of it")

    _, ran = run_stage(tmp_path / "out", {"digest": "a"})

    assert not ran
    assert not any(path.exists() for path in leftovers)


def test_files_of_others_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".hidden").write_text("mine")
    (tmp_path / "out" / "notes.md").write_text("mine too")

    with pytest.raises(InputError):
        fail_after_a_stage(tmp_path / "out", InputError("bad"))

    assert (tmp_path / "out" / ".hidden").read_text() == "mine"
    assert (tmp_path / "out" / "notes.md").read_text() == "mine too"


@pytest.mark.parametrize("parents", ["out", "a/b/out"])
def test_bad_input_removes_the_folders_that_the_run_made(tmp_path: Path, parents: str) -> None:
    with pytest.raises(InputError):
        fail_after_a_stage(tmp_path / parents, InputError("bad"))

    assert list(tmp_path.iterdir()) == []


def test_bad_input_leaves_an_empty_folder_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    with pytest.raises(InputError):
        fail_after_a_stage(tmp_path / "out", InputError("bad"))

    assert list((tmp_path / "out").iterdir()) == []


def test_bad_input_keeps_what_an_earlier_run_finished(tmp_path: Path) -> None:
    run_stage(tmp_path / "out", {"digest": "a"})

    with pytest.raises(InputError), Workspace(tmp_path / "out"):
        raise InputError("bad")

    assert not run_stage(tmp_path / "out", {"digest": "a"})[1]


def test_bad_input_after_keep_leaves_finished_stages(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        fail_after_a_stage(tmp_path / "out", InputError("bad"), keep=True)

    assert not run_stage(tmp_path / "out", {"digest": "a"})[1]


@pytest.mark.parametrize("error", [HostError("the disk is full"), KeyboardInterrupt(), ZeroDivisionError()])
def test_only_bad_input_undoes_finished_stages(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        fail_after_a_stage(tmp_path / "out", error)

    assert not run_stage(tmp_path / "out", {"digest": "a"})[1]


def test_a_host_error_before_any_stage_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(HostError), Workspace(tmp_path / "a" / "out"):
        raise HostError("PyTorch is not installed")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["file", "file/out", "file/a/b"])
def test_a_folder_that_cannot_be_made_is_a_host_error(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("mine")

    with pytest.raises(HostError, match="cannot write") as error, Workspace(tmp_path / out):
        pass

    assert str(tmp_path / out) in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"
