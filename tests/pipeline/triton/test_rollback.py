"""Rolling a deployment back: what was served is served again, whatever interrupted it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deployable import PROVENANCE, assert_served, built, contents, killed, plan

from maskplan.pipeline.core.errors import HostError, InputError
from maskplan.pipeline.triton.deploy import DeployOptions, deploy
from maskplan.pipeline.triton.rollback import rollback

# A config that somebody wrote, which leaves the choice of versions to Triton.
FOREIGN = """platform: "onnxruntime_onnx" max_batch_size: 4
input { name: "input" data_type: TYPE_FP32 dims: [3, 8, 8] }
output { name: "logits" data_type: TYPE_FP32 dims: 5 }
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A repository with three versions of a model: the second has other labels, the third is served beside the second."""
    options = DeployOptions(tmp_path / "models", "net")
    deploy(built(tmp_path / "first"), options)
    engine = built(tmp_path / "second", dataclasses.replace(PROVENANCE, labels=("v", "w", "x", "y", "z")))
    deploy(engine, options)
    deploy(engine, dataclasses.replace(options, keep_versions=2))
    assert assert_served(tmp_path / "models/net") == (2, 3)
    return tmp_path / "models"


def hidden_from_triton(name: str) -> bool:
    """Triton takes a folder's leading digits for its version, with a sign and white space before them."""
    return not name.lstrip(" +-")[:1].isdigit()


def test_each_rollback_restores_the_config_and_keeps_every_file_where_it_was(tmp_path: Path) -> None:
    options = DeployOptions(tmp_path / "models", "net")
    folder = tmp_path / "models/net"
    states = []
    for labels in (("a", "b", "c", "d", "e"), ("v", "w", "x", "y", "z"), ()):
        deploy(built(tmp_path / "engine", dataclasses.replace(PROVENANCE, labels=labels)), options)
        states.append((folder / "config.pbtxt").read_bytes())
    for version in (2, 1):
        before = contents(folder)
        done = rollback(tmp_path / "models", "net")
        assert (done.folder, done.version, done.platform) == (folder, version, "onnxruntime_onnx")
        assert all(path.exists() for path in done.files)
        assert (folder / "config.pbtxt").read_bytes() == states[version - 1]
        assert assert_served(folder) == (version,)
        after = contents(folder)
        # A server may be loading the version: only the file that Triton does not read has another name.
        undone = f"{version + 1}/previous-config.pbtxt"
        assert before.keys() - after.keys() == {undone}
        assert after.keys() - before.keys() == {undone.replace("previous", "rolled-back")}
        assert {n: d for n, d in after.items() if n in before and n != "config.pbtxt"} == {
            n: d for n, d in before.items() if n not in (undone, "config.pbtxt")
        }


def test_the_number_of_a_version_taken_back_is_not_used_again(models: Path, tmp_path: Path) -> None:
    assert rollback(models, "net").version == 2
    assert deploy(built(tmp_path / "next"), DeployOptions(models, "net")).version == 4
    assert rollback(models, "net").version == 2
    assert assert_served(models / "net") == (2,)


def test_hand_made_changes_of_a_config_come_back(models: Path, tmp_path: Path) -> None:
    config = models / "net/config.pbtxt"
    config.write_text(config.read_text().replace("microseconds: 1000", "microseconds: 77"))
    tuned = config.read_bytes()
    deploy(built(tmp_path / "next"), DeployOptions(models, "net"))
    assert b"microseconds: 1000" in config.read_bytes()
    rollback(models, "net")
    assert config.read_bytes() == tuned


def test_a_config_that_somebody_wrote_comes_back_with_its_version(tmp_path: Path) -> None:
    folder = tmp_path / "models/net"
    (folder / "7").mkdir(parents=True)
    config = FOREIGN
    (folder / "config.pbtxt").write_text(config)
    assert deploy(built(tmp_path / "engine"), DeployOptions(tmp_path / "models", "net")).version == 8
    assert rollback(tmp_path / "models", "net").version == 7
    assert (folder / "config.pbtxt").read_text() == config
    # Left to itself Triton serves the highest number.
    assert [p.name for p in folder.iterdir() if p.is_dir() and not hidden_from_triton(p.name)] == ["7"]


def test_a_config_that_names_no_version_needs_one_to_go_back_to(tmp_path: Path) -> None:
    folder = tmp_path / "models/net"
    (folder / "7").mkdir(parents=True)
    config = FOREIGN
    (folder / "config.pbtxt").write_text(config)
    deploy(built(tmp_path / "engine"), DeployOptions(tmp_path / "models", "net"))
    (folder / "7").rmdir()
    before = contents(tmp_path / "models")
    with pytest.raises(InputError, match="missing: every earlier version"):
        rollback(tmp_path / "models", "net")
    assert contents(tmp_path / "models") == before


def test_a_version_that_cannot_be_marked_is_reported(models: Path) -> None:
    """Somebody's folder has the name of the mark; what is served is already the old version."""
    (models / "net/3/rolled-back-config.pbtxt/mine").mkdir(parents=True)
    with pytest.raises(HostError, match="cannot write"):
        rollback(models, "net")
    assert assert_served(models / "net") == (2,)


def test_a_version_taken_back_is_not_served_again(tmp_path: Path) -> None:
    options, folder = DeployOptions(tmp_path / "models", "net"), tmp_path / "models/net"
    engine = built(tmp_path / "engine")
    for _ in range(3):
        deploy(engine, options)
    rollback(tmp_path / "models", "net")
    assert assert_served(folder) == (1, 2)
    assert deploy(engine, options).version == 4
    assert assert_served(folder) == (2, 4)
    deploy(engine, dataclasses.replace(options, keep_versions=9))
    assert assert_served(folder) == (1, 2, 4, 5)


def test_a_version_that_an_interrupted_deployment_left_is_not_served(tmp_path: Path) -> None:
    options, folder = DeployOptions(tmp_path / "models", "net"), tmp_path / "models/net"
    engine = built(tmp_path / "engine")
    deploy(engine, options)
    config = (folder / "config.pbtxt").read_bytes()
    deploy(engine, options)
    (folder / "config.pbtxt").write_bytes(config)
    assert deploy(engine, options).version == 3
    assert assert_served(folder) == (1, 3)


def test_an_older_version_that_was_deleted_is_not_missed(tmp_path: Path) -> None:
    """Only the version before the one taken back has to be there; the one before that was served beside it."""
    options, folder = DeployOptions(tmp_path / "models", "net"), tmp_path / "models/net"
    for _ in range(3):
        deploy(built(tmp_path / "engine"), options)
    shutil.rmtree(folder / "1")
    assert rollback(tmp_path / "models", "net").version == 2
    assert assert_served(folder) == (2,)


def test_the_config_is_newer_than_everything_else_in_the_folder(tmp_path: Path) -> None:
    """A polling server compares times only, and those of the file system have steps of milliseconds."""
    folder = tmp_path / "models/net"
    (folder / "7").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(FOREIGN)
    engine = built(tmp_path / "engine")

    def newest() -> int:
        config = (folder / "config.pbtxt").stat().st_mtime_ns
        assert config > max(p.stat().st_mtime_ns for p in (folder, *folder.rglob("*")) if p.name != "config.pbtxt")
        return config

    times = []
    for step in (deploy, deploy, rollback, rollback):
        step(engine, DeployOptions(tmp_path / "models", "net")) if step is deploy else step(tmp_path / "models", "net")
        times.append(newest())
    assert times == sorted(set(times))


def test_several_plans_are_taken_back_together(tmp_path: Path) -> None:
    options = DeployOptions(tmp_path / "models", "net")
    deploy(plan(tmp_path / "a.plan"), options)
    before = contents(tmp_path / "models")
    deploy([plan(tmp_path / "b.plan"), plan(tmp_path / "c.plan", compute_capability="8.0")], options)
    rollback(tmp_path / "models", "net")
    after = contents(tmp_path / "models")
    assert {name: data for name, data in after.items() if name in before} == before
    assert {str(Path(name).parent) for name in set(after) - set(before)} == {"net/2"}


def test_there_is_nothing_before_the_first_version(tmp_path: Path) -> None:
    deploy(built(tmp_path / "engine"), DeployOptions(tmp_path / "models", "net"))
    before = contents(tmp_path / "models")
    with pytest.raises(InputError, match="versions 1, the served one replaced none"):
        rollback(tmp_path / "models", "net")
    assert contents(tmp_path / "models") == before
    shutil.rmtree(tmp_path / "models/net/1")
    with pytest.raises(InputError, match="versions none, the served"):
        rollback(tmp_path / "models", "net")


@pytest.mark.parametrize("gone", ["1", "2", "labels.2.txt"])
def test_a_missing_version_cannot_be_restored(gone: str, models: Path, tmp_path: Path) -> None:
    folder = models / "net"
    deploy(built(tmp_path / "next"), DeployOptions(models, "net"))
    rollback(models, "net")
    for path in [folder / gone]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = contents(models)
    if gone == "1":  # the version before the last is the one that counts
        assert rollback(models, "net").version == 2
        with pytest.raises(InputError, match="missing: version 1"):
            rollback(models, "net")
        return
    with pytest.raises(InputError, match=f"missing: (version )?{gone}"):
        rollback(models, "net")
    assert contents(models) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [("other", "no such model"), *((n, "invalid name for a model") for n in ("../models/net", "", "a/b"))],
)
def test_a_missing_model_is_refused_and_nothing_is_created(name: str, message: str, models: Path) -> None:
    before = sorted(models.parent.rglob("*"))
    with pytest.raises(InputError, match=message):
        rollback(models, name)
    assert sorted(models.parent.rglob("*")) == before


def test_a_killed_rollback_is_complete_or_can_be_completed(models: Path, tmp_path: Path) -> None:
    copies = killed(
        models, tmp_path / "copies", "from maskplan.pipeline.triton.rollback import rollback", "rollback(models, 'net')"
    )
    states = []
    for copy in copies:
        interrupted = (copy / "net/3/previous-config.pbtxt").exists()
        states.append((assert_served(copy / "net"), interrupted))
        if interrupted:
            assert rollback(copy, "net").version == 2
        assert assert_served(copy / "net") == (2,)
        assert (copy / "net/3/rolled-back-config.pbtxt").exists()
        assert not list(copy.rglob("*.maskplan-tmp"))
    # Before the config is replaced, before the version is marked, and at the end.
    assert list(dict.fromkeys(states)) == [((2, 3), True), ((2,), True), ((2,), False)]


def test_a_deployment_that_was_killed_before_its_config_is_taken_back(models: Path, tmp_path: Path) -> None:
    config = (models / "net/config.pbtxt").read_bytes()
    deploy(built(tmp_path / "next"), DeployOptions(models, "net"))
    (models / "net/config.pbtxt").write_bytes(config)
    assert rollback(models, "net").version == 3
    assert (models / "net/config.pbtxt").read_bytes() == config
    assert (models / "net/4/rolled-back-config.pbtxt").exists()


def test_the_command_reports_what_is_served(cli: Callable[..., Any], models: Path) -> None:
    ran = cli("deploy", "--rollback", "--repository", models, "--name", "net")
    assert (ran.code, ran.err) == (0, "")
    assert "version 2 is served again" in ran.out
    assert assert_served(models / "net") == (2,)
    for _ in range(2):
        ran = cli("deploy", "--rollback", "--repository", models, "--name", "net")
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.startswith("error: nothing to roll back to")


def test_a_version_older_than_the_served_one_is_not_taken_back(models: Path) -> None:
    """Somebody put a version of their own in its place: there is no deployment of ours to undo."""
    config = models / "net/config.pbtxt"
    (models / "net/9").mkdir()
    config.write_text(config.read_text().replace("versions: [ 2, 3 ]", "versions: [ 9 ]"))
    before = contents(models)
    with pytest.raises(InputError, match="nothing to roll back to"):
        rollback(models, "net")
    assert contents(models) == before
