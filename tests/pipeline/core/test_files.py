"""Files appear complete or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from maskplan.pipeline.core.errors import HostError, InputError
from maskplan.pipeline.core.files import (
    TEMPORARY_SUFFIX,
    read_bytes,
    remove_leftovers,
    sha256_of,
    sibling,
    temporary_path,
    write_atomically,
    write_json,
)


def test_bytes_and_digest_are_those_given(tmp_path: Path) -> None:
    data = os.urandom(100_000)
    out = tmp_path / "file"
    assert write_atomically(out, data) == hashlib.sha256(data).hexdigest() == sha256_of(out)
    assert read_bytes(out) == data


def test_folders_are_made_and_nothing_else_is_left(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "file"
    write_atomically(out, b"one")
    write_atomically(out, b"two")
    assert out.read_bytes() == b"two"
    assert [p.name for p in out.parent.iterdir()] == ["file"]


def test_a_reader_never_sees_part_of_a_file(tmp_path: Path) -> None:
    out = tmp_path / "file"
    versions = [bytes([i]) * (1 << 18) for i in range(2)]
    write_atomically(out, versions[0])
    writer = threading.Thread(target=lambda: [write_atomically(out, versions[i % 2]) for i in range(60)])
    writer.start()
    seen = set()
    while writer.is_alive():
        seen.add(out.read_bytes())
    writer.join()
    assert seen <= set(versions)
    assert seen


def test_a_writer_killed_at_any_moment_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    out = tmp_path / "file"
    program = (
        "import sys; from pathlib import Path; from maskplan.pipeline.core.files import write_atomically\n"
        "out = Path(sys.argv[1])\n"
        "for i in range(10**9):\n"
        "    write_atomically(out, bytes([i % 250]) * (1 << 20))\n"
        "    print(i, flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(out)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    for _ in range(5):
        child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    data = out.read_bytes()
    assert len(data) == 1 << 20
    assert len(set(data)) == 1
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "message", "fix"),
    [(errno.ENOSPC, "the disk is full", "free some space"), (errno.EACCES, "cannot write", "--out")],
)
def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, message: str, fix: str
) -> None:
    out = tmp_path / "file"
    write_atomically(out, b"old")

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    monkeypatch.setattr(Path, "replace", fail) if call == "replace" else None
    with pytest.raises(HostError, match=message) as raised:
        write_atomically(out, b"new")
    monkeypatch.undo()
    assert (raised.value.where, raised.value.found) == (out, os.strerror(number))
    assert fix in str(raised.value.fix)
    assert out.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_error_names_the_option_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    for write in (
        lambda p: write_json(p, {}, option="--report"),
        lambda p: write_atomically(p, b"", option="--report"),
    ):
        with pytest.raises(HostError, match="cannot write") as raised:
            write(tmp_path / "plain" / "below")
        assert str(raised.value.fix).endswith("with --report")


def test_a_destination_that_cannot_be_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "plain").write_bytes(b"")
    for out in (tmp_path / "folder", tmp_path / "plain" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(HostError, match="cannot write"):
            write_atomically(out, b"data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "plain"]


def test_json_is_readable_and_ends_its_line(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    digest = write_json(out, {"b": [1, 2.5], "a": None})
    assert out.read_text() == json.dumps({"b": [1, 2.5], "a": None}, indent=2) + "\n"
    assert digest == sha256_of(out)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_without_a_meaning_is_refused_before_anything_is_written(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "r.json", {"a": value})
    assert not list(tmp_path.iterdir())


def test_leftovers_are_removed_and_all_else_stays(tmp_path: Path) -> None:
    names = [f".out.onnx.123{TEMPORARY_SUFFIX}", "out.onnx", ".hidden", f"visible{TEMPORARY_SUFFIX}"]
    (tmp_path / "below").mkdir()
    for name in (*names, f"below/.deep.1{TEMPORARY_SUFFIX}"):
        (tmp_path / name).write_bytes(b"")
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["below", *names[1:]])
    assert len(list((tmp_path / "below").iterdir())) == 1


def test_leftovers_of_a_missing_folder_are_none(tmp_path: Path) -> None:
    remove_leftovers(tmp_path / "none")


@pytest.mark.parametrize("read", [read_bytes, sha256_of])
def test_a_file_that_is_missing_or_a_folder_is_an_error(tmp_path: Path, read: object) -> None:
    assert callable(read)
    with pytest.raises(InputError, match="file not found") as raised:
        read(tmp_path / "none")
    assert raised.value.where == tmp_path / "none"
    with pytest.raises(InputError, match="cannot read") as raised:
        read(tmp_path)
    assert raised.value.found == os.strerror(errno.EISDIR)


def test_the_digest_of_an_empty_file_is_that_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert sha256_of(tmp_path / "empty") == hashlib.sha256().hexdigest()


@pytest.mark.parametrize("name", ["n" * 240 + ".onnx", "n" * 255, "ü" * 120, "n" * 229])
def test_names_as_long_as_a_file_may_have_can_be_written(name: str, tmp_path: Path) -> None:
    write_atomically(tmp_path / name, b"data")
    assert [p.name for p in tmp_path.iterdir()] == [name]
    temporary = temporary_path(tmp_path / name, ".data")
    temporary.touch()
    assert temporary != temporary_path(tmp_path / ("n" * 239 + "m.onnx"), ".data")
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert len(os.fsencode(sibling(tmp_path / name, ".0123.data").name)) <= 255


def test_a_link_or_folder_under_the_temporary_name_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    temporary_path(tmp_path / "file").symlink_to(tmp_path / "mine")
    write_atomically(tmp_path / "file", b"data")
    assert (tmp_path / "mine").read_bytes() == b"mine"
    assert (tmp_path / "file").read_bytes() == b"data"
    (tmp_path / f".a.1{TEMPORARY_SUFFIX}").mkdir()
    (tmp_path / f".a.1{TEMPORARY_SUFFIX}" / "part").touch()
    (tmp_path / f".b.1{TEMPORARY_SUFFIX}").symlink_to(tmp_path / "nothing")
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine"]
