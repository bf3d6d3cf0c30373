"""Deploying to disks that are full, read-only or others than the engine's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from deployable import assert_served, built, contents

from maskplan.engines.sidecar import read_engine
from maskplan.pipeline.triton.deploy import DeployOptions, deploy
from maskplan.pipeline.triton.golden import golden_pair
from maskplan.pipeline.triton.rollback import rollback

# Deploys and rolls back in children that cannot write files of more bytes than each limit; prints the errors' first lines.
LIMITED = """
import os, resource, sys
from pathlib import Path
from maskplan.engines.sidecar import read_engine
from maskplan.pipeline.core.errors import HostError
from maskplan.pipeline.triton.deploy import DeployOptions, deploy
from maskplan.pipeline.triton.golden import golden_pair
from maskplan.pipeline.triton.rollback import rollback

engine, copies, limits = Path(sys.argv[1]), Path(sys.argv[2]), list(map(int, sys.argv[3:]))
golden = golden_pair(read_engine(engine))
for limit in limits:
    for name, run in (
        ("deploy", lambda: deploy(engine, DeployOptions(copies / f"deploy{limit}", "net"), golden)),
        ("rollback", lambda: rollback(copies / f"rollback{limit}", "net")),
    ):
        if not (child := os.fork()):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                run()
            except HostError as error:
                os._exit(10 if error.what == "the disk is full" else 11)
            os._exit(0)
        print(name, limit, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_disk_that_is_full_at_any_file_changes_nothing_that_is_served(tmp_path: Path) -> None:
    engine = built(tmp_path / "engine")
    golden = golden_pair(read_engine(engine))
    for _ in range(2):
        deploy(engine, DeployOptions(tmp_path / "models", "net"), golden)
    before = contents(tmp_path / "models")
    assert len(before) > 10
    # Each limit stops at another file.
    limits = sorted({0, *(len(data) - 1 for data in before.values()), max(map(len, before.values()))})
    for limit in limits:
        for kind in ("deploy", "rollback"):
            shutil.copytree(tmp_path / "models", tmp_path / "copies" / f"{kind}{limit}")
    command = [sys.executable, "-c", LIMITED, engine, tmp_path / "copies", *map(str, limits)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    codes = {(name, int(limit)): int(code) for name, limit, code in map(str.split, done.stdout.splitlines())}
    assert set(codes.values()) == {0, 10}
    for (kind, limit), code in codes.items():
        after = tmp_path / "copies" / f"{kind}{limit}"
        if code:
            assert contents(after) == before
            assert not list(after.rglob("*.maskplan-tmp"))
            assert assert_served(after / "net") == (1, 2)
        else:
            assert assert_served(after / "net") == ((2, 3) if kind == "deploy" else (1,))
    assert codes["deploy", limits[-1]] == codes["rollback", limits[-1]] == 0


def mounted(setup: str, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A command of maskplan after a mount that it alone sees."""
    script = f'set -e; cd "$1"; {setup}; shift; exec "$@"'
    command = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        script,
        "-",
        folder,
        sys.executable,
        "-m",
        "maskplan.pipeline",
        *arguments,
    ]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def _mounts() -> None:
    """Skip where this process must not mount."""
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/mnt"]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("this process must not mount file systems")


@pytest.mark.usefixtures("_mounts")
def test_a_read_only_repository_is_a_host_error(tmp_path: Path) -> None:
    engine = built(tmp_path / "engine")
    for _ in range(2):
        deploy(engine, DeployOptions(tmp_path / "models", "net"))
    before = contents(tmp_path / "models")
    read_only = "mount --bind models models; mount -o remount,ro,bind models"
    for arguments in ((engine,), ("--rollback",)):
        done = mounted(read_only, tmp_path, "deploy", *arguments, "--repository", "models", "--name", "net")
        assert (done.returncode, done.stdout) == (3, ""), done.stderr
        assert done.stderr.startswith("error: cannot write")
        assert "Read-only file system" in done.stderr
        assert "--repository" in done.stderr
    assert contents(tmp_path / "models") == before


@pytest.mark.usefixtures("_mounts")
def test_a_disk_without_space_is_a_host_error(tmp_path: Path) -> None:
    engine = built(tmp_path / "engine")
    (tmp_path / "models").mkdir()
    small = "mount -t tmpfs -o size=8k tmpfs models"
    done = mounted(small, tmp_path, "deploy", engine, "--repository", "models", "--name", "net")
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    assert done.stderr.startswith("error: the disk is full")


def test_a_repository_on_another_file_system(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    engine = built(tmp_path / "engine")
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        for version in (1, 2, 3):
            assert deploy(engine, DeployOptions(Path(folder) / "models", "net")).version == version
        assert rollback(Path(folder) / "models", "net").version == 2
        assert assert_served(Path(folder) / "models/net") == (1, 2)
        assert not list(Path(folder).rglob("*.maskplan-tmp"))
