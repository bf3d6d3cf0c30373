"""Deployments that are killed, run at the same time, or find files of another process."""

from __future__ import annotations

import dataclasses
import errno
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from deployable import PROVENANCE, assert_served, built, contents, killed

from maskplan.pipeline.core.errors import HostError, InputError
from maskplan.pipeline.triton.deploy import DeployOptions, deploy
from maskplan.pipeline.triton.golden import Golden
from maskplan.pipeline.triton.repository import add_version


def test_a_killed_deployment_leaves_the_old_or_the_new_version_served(tmp_path: Path) -> None:
    options = DeployOptions(tmp_path / "base", "net")
    deploy(built(tmp_path / "first"), options)
    second = built(tmp_path / "second", dataclasses.replace(PROVENANCE, labels=("v", "w", "x", "y", "z")))
    copies = killed(
        tmp_path / "base",
        tmp_path / "copies",
        "from maskplan.pipeline.triton.deploy import DeployOptions, deploy",
        f"deploy(Path({str(second)!r}), DeployOptions(models, 'net'))",
    )
    served, kept = [], []
    for models in copies:
        served.append(assert_served(models / "net"))
        if served[-1] == (1,):
            assert {n: d for n, d in contents(models).items() if n in contents(tmp_path / "base")} == contents(
                tmp_path / "base"
            )
        version = deploy(second, dataclasses.replace(options, repository=models)).version
        kept.append(assert_served(models / "net"))
        assert kept[-1][-1] == version
        assert not list(models.rglob("*.maskplan-tmp"))
    assert served == sorted(served)
    assert served[0] == (1,)
    assert served[-1] == (2,)
    # Version 1 has other labels and cannot be served beside the new one; version 2 can, unless it was never served.
    assert set(kept) == {(2,), (3,), (2, 3)}
    # A folder, four files, two renames and what tidying up removes.
    assert len(served) > 8


def test_concurrent_deployments_all_succeed_or_report_the_conflict(tmp_path: Path) -> None:
    engine, options = built(tmp_path / "engine"), DeployOptions(tmp_path / "models", "net")
    deploy(engine, options)
    versions: list[int] = []
    conflicts: list[str] = []

    def run() -> None:
        try:
            versions.append(deploy(engine, options).version)
        except HostError as error:
            conflicts.append(error.what)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(versions) == list(range(2, 2 + len(versions)))
    assert len(versions) + len(conflicts) == 8
    assert set(conflicts) <= {"another deployment is writing to the model"}
    assert {p.name for p in (tmp_path / "models/net").iterdir()} == {
        "config.pbtxt",
        "labels.txt",
        *map(str, range(1, 2 + len(versions))),
    }


def test_a_locked_folder_is_not_changed(tmp_path: Path) -> None:
    engine, options = built(tmp_path / "engine"), DeployOptions(tmp_path / "models", "net")
    deploy(engine, options)
    before = contents(tmp_path / "models")
    holds = (
        "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX); print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holds, tmp_path / "models/net"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(HostError, match="another deployment is writing"):
            deploy(engine, options)
        assert contents(tmp_path / "models") == before
        process.communicate(b"\n")
    assert deploy(engine, options).version == 2


def test_a_version_created_by_another_process_is_not_changed(tmp_path: Path) -> None:
    """Where a file system has no locks, the folder's name tells."""
    (tmp_path / "net/1").mkdir(parents=True)
    (tmp_path / "net/1/model.plan").write_bytes(b"theirs")
    with pytest.raises(HostError, match="another deployment is writing") as caught:
        add_version(tmp_path / "net", 1, {}, {"model.plan": b"ours"})
    assert "another process has created version 1" in str(caught.value)
    assert contents(tmp_path / "net") == {"1/model.plan": b"theirs"}
    with pytest.raises(HostError, match="cannot write"):
        add_version(tmp_path / "gone", 1, {}, {"model.plan": b"ours"})
    assert not (tmp_path / "gone").exists()


def test_a_file_system_without_locks_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    assert deploy(built(tmp_path / "engine"), DeployOptions(tmp_path / "models", "net")).version == 1


def test_an_existing_empty_folder_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "models/net").mkdir(parents=True)
    golden = Golden({"input": np.zeros(1, np.float32)}, {"logits": np.zeros(1, np.float32)})
    with pytest.raises(InputError, match="golden"):
        deploy(built(tmp_path / "engine"), DeployOptions(tmp_path / "models", "net"), golden)
    assert (tmp_path / "models/net").is_dir()
