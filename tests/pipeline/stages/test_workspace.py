"""Stages of a folder: what runs again and what does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from workspace_stages import Note, Options, Pair, Writer, run_stage

from maskplan.pipeline.core.errors import HostError
from maskplan.pipeline.core.files import write_atomically
from maskplan.pipeline.stages.workspace import STATE, Workspace, files_of

# --- stages


def test_a_stage_is_not_run_again_for_the_same_inputs(tmp_path: Path) -> None:
    first, ran = run_stage(tmp_path / "out", {"digest": "a", "options": Options()})
    second, ran_again = run_stage(tmp_path / "out", {"digest": "a", "options": Options()})

    assert (ran, ran_again) == (True, False)
    assert first == second


@pytest.mark.parametrize(
    "changed",
    [
        {"digest": "b", "options": Options()},
        {"digest": "a", "options": Options(loud=True)},
        {"digest": "a", "options": Options(count=0)},
        {"digest": "a", "options": None},
        {"digest": "a"},
        {"digest": ["a"], "options": Options()},
        {"digest": "a", "options": Options(), "more": 1},
    ],
)
def test_a_stage_is_run_again_when_any_input_changes(tmp_path: Path, changed: dict[str, object]) -> None:
    run_stage(tmp_path / "out", {"digest": "a", "options": Options()})

    assert run_stage(tmp_path / "out", changed)[1]


def test_the_order_in_which_inputs_are_named_does_not_matter(tmp_path: Path) -> None:
    run_stage(tmp_path / "out", {"digest": "a", "images": "b"})

    assert not run_stage(tmp_path / "out", {"images": "b", "digest": "a"})[1]


def test_only_the_last_inputs_of_a_stage_are_remembered(tmp_path: Path) -> None:
    """A stage's file is one; going back to earlier inputs must not take the record of a file that is gone."""
    run_stage(tmp_path / "out", {"digest": "a"}, text="first")
    run_stage(tmp_path / "out", {"digest": "b"}, text="second one")

    note, ran = run_stage(tmp_path / "out", {"digest": "a"}, text="first")

    assert ran
    assert note.path.read_text() == "first"


def test_stages_of_the_same_inputs_do_not_share_a_record(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out") as ws:
        ws.stage("one", Note, {"digest": "a"}, Writer(ws, "one.txt"))
        two = ws.stage("two", Note, {"digest": "a"}, Writer(ws, "two.txt"))

    assert two.path.name == "two.txt"


def test_a_copied_record_of_another_stage_is_not_taken(tmp_path: Path) -> None:
    run_stage(tmp_path / "out", {"digest": "a"})
    shutil.copy(tmp_path / "out" / STATE / "write.json", tmp_path / "out" / STATE / "two.json")

    with Workspace(tmp_path / "out") as ws:
        work = Writer(ws)
        ws.stage("two", Note, {"digest": "a"}, work)

    assert work.runs == 1


def test_what_was_reused_is_listed_in_order_and_the_rest_is_clocked(tmp_path: Path) -> None:
    run_stage(tmp_path / "out", {"digest": "a"})
    with Workspace(tmp_path / "out") as ws:
        ws.stage("write", Note, {"digest": "a"}, Writer(ws))
        ws.stage("more", Note, {"digest": "a"}, Writer(ws, "more.txt"))

    assert ws.reused == ["write"]
    assert list(ws.seconds) == ["more"]


@pytest.mark.parametrize("spoil", [Path.unlink, lambda p: p.write_text("two Words"), lambda p: p.write_bytes(b"")])
def test_a_stage_is_run_again_when_its_file_is_gone_or_changed(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    note, _ = run_stage(tmp_path / "out", {"digest": "a"})
    spoil(note.path)

    again, ran = run_stage(tmp_path / "out", {"digest": "a"})

    assert ran
    assert again == note
    assert note.path.read_text() == "two words"


@pytest.mark.parametrize("index", [0, 1, 2])
def test_every_file_that_a_record_names_is_looked_at(tmp_path: Path, index: int) -> None:
    def both(ws: Workspace) -> Pair:
        a, b, c = (Writer(ws, f"{name}.txt", text=name)() for name in "abc")
        return Pair((a, b), c)

    with Workspace(tmp_path / "out") as ws:
        pair = ws.stage("pair", Pair, {}, lambda: both(ws))
    (*pair.notes, pair.first)[index].path.unlink()

    with Workspace(tmp_path / "out") as ws:
        assert ws.stage("pair", Pair, {}, lambda: both(ws)) == pair
    assert ws.reused == []
    assert all(path.is_file() for path, _ in files_of(pair))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '"text"',
        "{}",
        '{"key": "KEY"}',
        '{"key": "KEY", "record": null}',
        '{"key": "KEY", "record": {}}',
        '{"key": "KEY", "record": {"path": "note.txt", "sha256": "x", "words": "two"}}',
        '{"key": "KEY", "record": {"path": "note.txt", "sha256": "x", "words": 2, "more": 1}}',
        "\xff\xfe",
    ],
)
def test_a_damaged_record_makes_the_stage_run_again(tmp_path: Path, content: str) -> None:
    run_stage(tmp_path / "out", {"digest": "a"})
    record = tmp_path / "out" / STATE / "write.json"
    key = json.loads(record.read_text())["key"]
    record.write_bytes(content.replace("KEY", key).encode("latin-1"))

    assert run_stage(tmp_path / "out", {"digest": "a"})[1]
    assert not run_stage(tmp_path / "out", {"digest": "a"})[1]


def test_work_that_fails_leaves_no_record(tmp_path: Path) -> None:
    def fail() -> Note:
        raise HostError("no more space")

    with pytest.raises(HostError), Workspace(tmp_path / "out") as ws:
        ws.stage("write", Note, {"digest": "a"}, fail)

    assert run_stage(tmp_path / "out", {"digest": "a"})[1]


def test_the_record_of_the_last_success_does_not_outlive_its_file(tmp_path: Path) -> None:
    """Another input's work overwrites the file and dies before its record: the old record must not vouch for the file."""
    run_stage(tmp_path / "out", {"digest": "a"}, text="first")

    def write_and_die() -> Note:
        write_atomically(tmp_path / "out" / "note.txt", b"second")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Workspace(tmp_path / "out") as ws:
        ws.stage("write", Note, {"digest": "b"}, write_and_die)

    note, ran = run_stage(tmp_path / "out", {"digest": "a"}, text="first")
    assert ran
    assert note.path.read_text() == "first"


# --- another place


def test_a_moved_folder_goes_on_with_its_own_files(tmp_path: Path) -> None:
    run_stage(tmp_path / "here", {"digest": "a"})
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "here", tmp_path / "elsewhere" / "there")

    note, ran = run_stage(tmp_path / "elsewhere" / "there", {"digest": "a"})

    assert not ran
    assert note.path == tmp_path / "elsewhere" / "there" / "note.txt"


def test_the_copy_of_a_folder_does_not_use_the_files_of_the_original(tmp_path: Path) -> None:
    run_stage(tmp_path / "here", {"digest": "a"})
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    (tmp_path / "there" / "note.txt").unlink()

    assert run_stage(tmp_path / "there", {"digest": "a"})[1]


def test_records_hold_no_path_of_the_folder(tmp_path: Path) -> None:
    run_stage(tmp_path / "here", {"digest": "a"})

    text = (tmp_path / "here" / STATE / "write.json").read_text()

    assert str(tmp_path) not in text
    assert json.loads(text)["record"]["path"] == "note.txt"


def test_the_same_work_in_two_folders_has_the_same_record(tmp_path: Path) -> None:
    for name in ("here", "there"):
        run_stage(tmp_path / name, {"digest": "a", "options": Options()})

    here, there = ((tmp_path / name / STATE / "write.json").read_bytes() for name in ("here", "there"))
    assert here == there


def test_a_relative_folder_stays_where_it_was_when_the_process_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "away").mkdir()

    with Workspace(Path("out")) as ws:
        monkeypatch.chdir(tmp_path / "away")
        ws.stage("write", Note, {}, Writer(ws))

    assert (tmp_path / "out" / "note.txt").is_file()


# --- files_of


def test_files_of_finds_records_inside_records_and_tuples() -> None:
    a, b, c = (Note(Path(name), name * 2, 1) for name in "abc")

    assert sorted(files_of(Pair((a, b), c))) == [(Path("a"), "aa"), (Path("b"), "bb"), (Path("c"), "cc")]
    assert list(files_of((Options(), "text", None, (a,)))) == [(Path("a"), "aa")]
