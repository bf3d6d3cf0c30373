"""What a stage depends on: other images or a new version of the stage run it again, the same inputs do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskplan.pipeline.core.artifacts import Checkpoint, ImageSet, MaskSet, Pattern, Preprocessing, Provenance
from maskplan.pipeline.core.files import write_atomically
from maskplan.pipeline.data.dataset import Dataset
from maskplan.pipeline.learning import few_images
from maskplan.pipeline.models.checkpoint import ModelOptions
from maskplan.pipeline.models.synthesize import SynthesizeOptions
from maskplan.pipeline.recipe import Recipe
from maskplan.pipeline.stages import model
from maskplan.pipeline.stages.job import Images, ImageSets, Job
from maskplan.pipeline.stages.versions import STAGE_VERSIONS
from maskplan.pipeline.stages.workspace import Workspace

PROVENANCE = Provenance("net", True, "file w.pth", "0" * 64, 2, (), Preprocessing(1, 8, 8, 0, "bilinear", (0.5,), (1,)))
SETS = ImageSets(
    *(ImageSet(role, 9, role, labeled_sha256=f"{role} with labels") for role in ("train", "select", "val"))
)


class Part:
    """A part of the data, of which only the number of images counts here."""

    def __init__(self, images: int) -> None:
        self.labels = np.zeros(images)

    def __len__(self) -> int:
        return len(self.labels)


def images_of(sets: ImageSets, images: int = 1) -> Images:
    part: Any = Part(images)
    return Images(Dataset(("a",), part, part, part), sets)


def checkpoint(path: Path, *_: object, **__: object) -> Checkpoint:
    return Checkpoint(path, write_atomically(path, b"weights"), 7, PROVENANCE)


@pytest.fixture
def stages_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[ImageSets], set[str]]:
    """Runs the stages that read training images, with work that only writes files; the names of those that worked."""
    dense = checkpoint(tmp_path / "dense.safetensors")

    def masks(_module: object, _provenance: object, _options: object, out: Path, *_: object, **__: object) -> MaskSet:
        return MaskSet(out, write_atomically(out, b"masks"), "net", Pattern(2, 4), "channel", "learned", "", (), ())

    monkeypatch.setattr(model, "load_module", lambda *_: None)
    monkeypatch.setattr(model, "choose_masks", masks)
    monkeypatch.setattr(model, "bake", lambda _module, _provenance, _masks, out: checkpoint(out))
    monkeypatch.setattr(
        model, "recalibrate", lambda _module, _provenance, _train, _options, out, _sets, _dense: checkpoint(out)
    )

    def run(sets: ImageSets) -> set[str]:
        with Workspace(tmp_path / "out") as ws:
            job = Job(ws, ModelOptions("net.py:build"), Recipe())
            chosen = model.mask(job, dense, "learned", images_of(sets))
            baked = model.bake_masks(job, dense, chosen, "sparse", ws.hidden("sparse-baked.safetensors"))
            model.recalibrate_statistics(job, dense, baked, images_of(sets), "sparse", ws.path("sparse.safetensors"))
            return set(ws.seconds)

    assert run(SETS) == {"mask", "bake-sparse", "recalibrate-sparse"}
    return run


def test_nothing_runs_again_for_the_same_images(stages_run: Callable[[ImageSets], set[str]]) -> None:
    assert stages_run(SETS) == set()


@pytest.mark.parametrize("field", ["sha256", "labeled_sha256"])
def test_other_images_run_what_was_made_from_them_again(
    field: str, stages_run: Callable[[ImageSets], set[str]]
) -> None:
    other_train = replace(SETS, train=replace(SETS.train, **{field: "other"}))
    assert stages_run(other_train) == {"mask", "recalibrate-sparse"}
    assert stages_run(replace(other_train, select=replace(SETS.select, **{field: "other"}))) == {"mask"}


def test_other_validation_images_change_neither_masks_nor_statistics(
    stages_run: Callable[[ImageSets], set[str]],
) -> None:
    assert stages_run(replace(SETS, val=replace(SETS.val, sha256="other"))) == set()


def test_a_new_version_of_a_stage_runs_that_stage_again(
    stages_run: Callable[[ImageSets], set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STAGE_VERSIONS, "recalibrate", STAGE_VERSIONS["recalibrate"] + 1)
    assert stages_run(SETS) == {"recalibrate-sparse"}
    assert stages_run(SETS) == set()


@pytest.mark.parametrize(("images", "runs_again"), [(5000, False), (4096, True)])
def test_another_setting_for_few_images_runs_only_masks_of_few_images_again(
    images: int, *, runs_again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = checkpoint(tmp_path / "dense.safetensors")

    def masks(_module: object, _provenance: object, _options: object, out: Path, *_: object, **__: object) -> MaskSet:
        return MaskSet(out, write_atomically(out, b"masks"), "net", Pattern(2, 4), "channel", "learned", "", (), ())

    monkeypatch.setattr(model, "load_module", lambda *_: None)
    monkeypatch.setattr(model, "choose_masks", masks)

    def run() -> bool:
        with Workspace(tmp_path / "out") as ws:
            model.mask(Job(ws, ModelOptions("net.py:build"), Recipe()), dense, "learned", images_of(SETS, images))
            return "mask" in ws.seconds

    assert [run(), run()] == [True, False]
    monkeypatch.setitem(few_images._SETTING, "match_blocks", 0.4)
    assert run() == runs_again


def test_another_dense_network_gives_other_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pruned one may be the same: what differs may be masked, or the statistics alone."""
    monkeypatch.setattr(model, "load_module", lambda *_: None)
    monkeypatch.setattr(model, "recalibrate", lambda _m, _p, _train, _options, out, *_: checkpoint(out))
    baked = checkpoint(tmp_path / "baked.safetensors")

    def run(dense: str) -> set[str]:
        with Workspace(tmp_path / "out") as ws:
            job = Job(ws, ModelOptions("net.py:build"), Recipe())
            source = replace(baked, sha256=dense)
            model.recalibrate_statistics(job, source, baked, images_of(SETS), "sparse", ws.path("s.safetensors"))
            return set(ws.seconds)

    assert [run(dense) for dense in ("a", "a", "b")] == [{"recalibrate-sparse"}, set(), {"recalibrate-sparse"}]


def test_synthetic_images_are_made_again_for_other_weights_or_options_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "load_module", lambda *_: None)
    monkeypatch.setattr(model, "synthesize_images", lambda *_: np.zeros((16, 8, 8, 1), np.uint8))
    dense = checkpoint(tmp_path / "dense.safetensors")

    def run(sha256: str, options: SynthesizeOptions, code: str = "") -> bool:
        with Workspace(tmp_path / "out") as ws:
            job = Job(ws, ModelOptions("net.py:build"), Recipe(synthesize=options), code=code)
            made = model.synthesize(job, replace(dense, sha256=sha256))
            assert (len(made.data.train), len(made.data.select), len(made.data.val)) == (14, 2, 0)
            assert [s.images for s in made.sets.shaping] == [14, 2]
            return "synthesize" in ws.seconds

    plain = SynthesizeOptions(images=16)
    assert [run("a", plain), run("a", plain), run("b", plain), run("b", plain)] == [True, False, True, False]
    assert run("b", replace(plain, seed=1))
    assert run("b", replace(plain, steps=7))
    assert run("b", replace(plain, steps=7), code="other")
    assert not run("b", replace(plain, steps=7), code="other")
