"""Checkpoints: the requested weights are loaded, files are read back unchanged, and the provenance is kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from torch import nn

from maskplan.pipeline.core.artifacts import ImageSet, Provenance
from maskplan.pipeline.core.errors import HostError, InputError
from maskplan.pipeline.core.serialization import encode
from maskplan.pipeline.models.checkpoint import (
    ModelOptions,
    load_checkpoint,
    load_module,
    open_checkpoint,
    read_checkpoint,
    save_checkpoint,
    weights_file,
)
from maskplan.pipeline.models.digits_resnet import DigitsResNet
from maskplan.pipeline.models.registry import BUNDLED_WEIGHTS
from maskplan.pipeline.models.state_dict import tensors_sha256

DIGITS = tuple("0123456789")


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted
    )


def on_disk(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path)


def digits_net(seed: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return DigitsResNet()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "dense.safetensors"


def sparse_provenance(trained: bool = True) -> Provenance:
    """Of a pruned digits_resnet, with every field set."""
    _, dense = open_checkpoint(ModelOptions("digits_resnet"))
    images = ImageSet("train", 3, "cd" * 32, ("0" * 16, "f" * 16))
    return dataclasses.replace(
        dense,
        trained=trained,
        origin="somewhere.pth",
        masked=("blocks.0.conv1.weight",),
        pattern="2:4",
        layout="channel",
        method="learned",
        recalibrated_images=12,
        image_sets=(images,),
    )


# Where weights come from ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["auto", "pretrained"])
def test_the_bundled_model_comes_with_its_trained_weights(out: Path, weights: str) -> None:
    written = load_checkpoint(ModelOptions("digits_resnet", weights), out)
    assert same(on_disk(out), on_disk(BUNDLED_WEIGHTS))
    assert (written.provenance.trained, written.provenance.origin) == (True, "bundled")
    assert (written.provenance.model, written.provenance.classes) == ("digits_resnet", 10)
    assert written.provenance.labels == DIGITS
    assert written.provenance.masked == ()


def test_random_weights_are_untrained_and_named_by_their_seed(out: Path) -> None:
    written = load_checkpoint(ModelOptions("digits_resnet", "random", seed=5), out)
    assert same(on_disk(out), dict(digits_net(5).state_dict()))
    assert (written.provenance.trained, written.provenance.origin) == (False, "random, seed 5")
    assert not same(on_disk(out), dict(digits_net(6).state_dict()))


def test_auto_falls_back_to_random_weights_with_a_warning(
    tiny_spec: str, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = load_checkpoint(ModelOptions(tiny_spec), out)
    assert not written.provenance.trained
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "random weights: suitable for timing only" in warnings[0]


def test_pretrained_weights_that_do_not_exist_are_an_error(tiny_spec: str, out: Path) -> None:
    with pytest.raises(HostError, match="has no pretrained weights"):
        load_checkpoint(ModelOptions(tiny_spec, "pretrained"), out)
    assert not out.exists()


def test_another_number_of_classes_makes_random_weights_without_labels(out: Path) -> None:
    written = load_checkpoint(ModelOptions("digits_resnet", classes=4), out)
    assert on_disk(out)["head.weight"].shape == (4, 64)
    assert (written.provenance.classes, written.provenance.labels) == (4, ())
    assert not written.provenance.trained


@pytest.mark.parametrize("name", ["ours.pth", "theirs.safetensors", "bare.bin"])
def test_weights_of_another_tool_are_trained_and_come_from_that_file(tmp_path: Path, out: Path, name: str) -> None:
    state, file = dict(digits_net().state_dict()), tmp_path / name
    if file.suffix == ".safetensors":
        safetensors.torch.save_file(state, file, {"format": "pt"})
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, file)
    written = load_checkpoint(ModelOptions("digits_resnet", str(file)), out)
    assert same(on_disk(out), state)
    assert (written.provenance.trained, written.provenance.origin) == (True, name)
    assert written.provenance.labels == DIGITS
    assert str(tmp_path) not in out.read_bytes().decode("latin-1")


def test_weights_for_a_users_model_are_read_with_its_preprocessing(tiny_spec: str, out: Path) -> None:
    random, _ = open_checkpoint(ModelOptions(tiny_spec, "random", seed=3))
    file = out.parent.parent / "w.pth"
    torch.save(random.state_dict(), file)
    written = load_checkpoint(ModelOptions(tiny_spec, str(file)), out).provenance
    assert (written.model, written.classes, written.labels) == ("tiny_build", 3, ())
    assert (written.preprocessing.height, written.preprocessing.mean) == (16, (0.5, 0.5, 0.5))


@pytest.mark.parametrize("trained", [True, False])
def test_a_maskplan_checkpoint_keeps_its_provenance(tmp_path: Path, out: Path, trained: bool) -> None:
    """Untrained weights do not become trained by passing through a file."""
    provenance = sparse_provenance(trained)
    file = tmp_path / "sparse.safetensors"
    save_checkpoint(digits_net().state_dict(), provenance, file)
    module, found = open_checkpoint(ModelOptions("digits_resnet", str(file)))
    assert found == provenance
    assert same(dict(module.state_dict()), dict(digits_net().state_dict()))
    assert load_checkpoint(ModelOptions("digits_resnet", str(file)), out).provenance == provenance


def test_weights_of_another_model_are_refused_and_nothing_is_written(tiny_spec: str, out: Path) -> None:
    with pytest.raises(InputError, match="does not fit the model") as raised:
        load_checkpoint(ModelOptions(tiny_spec, str(BUNDLED_WEIGHTS)), out)
    assert raised.value.where == BUNDLED_WEIGHTS
    assert not out.exists()


def test_a_mask_file_is_refused_as_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "masks.safetensors"
    masks = {"blocks.0.conv1.weight": np.ones((16, 16, 3, 3), np.bool_)}
    safetensors.numpy.save_file(masks, file, {"maskplan": json.dumps({"model": "digits_resnet", "pattern": "2:4"})})
    with pytest.raises(InputError):
        open_checkpoint(ModelOptions("digits_resnet", str(file)))
    with pytest.raises(InputError):
        read_checkpoint(file)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (ModelOptions("resnet50"), None),
        (ModelOptions("resnet50", "pretrained"), None),
        (ModelOptions("resnet50", "random"), None),
        (ModelOptions("resnet50", "some/w.pth"), Path("some/w.pth")),
        (ModelOptions("digits_resnet"), BUNDLED_WEIGHTS),
        (ModelOptions("digits_resnet", "pretrained"), BUNDLED_WEIGHTS),
        (ModelOptions("digits_resnet", "random"), None),
        (ModelOptions("digits_resnet", classes=4), None),
        (ModelOptions("digits_resnet", "w.pth", classes=4), Path("w.pth")),
    ],
)
def test_the_file_that_holds_the_weights_is_known_without_opening_it(
    options: ModelOptions, expected: Path | None
) -> None:
    assert weights_file(options) == expected


@pytest.mark.parametrize("wrong", [{"classes": 0}, {"seed": -1}])
def test_options_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        ModelOptions("resnet50", **wrong)  # type: ignore[arg-type]


# What is written ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["auto", "random"])
def test_what_is_written_is_read_back(out: Path, weights: str) -> None:
    options = ModelOptions("digits_resnet", weights, seed=2)
    written = load_checkpoint(options, out)
    assert read_checkpoint(out) == written
    assert written.path == out
    assert written.bytes == out.stat().st_size
    assert written.sha256 == hashlib.sha256(out.read_bytes()).hexdigest()
    # Built from another seed, so that weights that were not loaded would show.
    module = load_module(dataclasses.replace(options, seed=3), written)
    assert same(dict(module.state_dict()), on_disk(out))
    assert not any(m.training for m in module.modules())


@pytest.mark.parametrize("weights", ["auto", "random"])
def test_the_digest_is_of_the_dense_tensors_whatever_file_they_came_from(out: Path, weights: str) -> None:
    written = load_checkpoint(ModelOptions("digits_resnet", weights), out)
    copied = out.with_name("copy.pth")
    torch.save(on_disk(out), copied)
    again = load_checkpoint(ModelOptions("digits_resnet", str(copied)), out.with_name("again.safetensors"))
    assert written.provenance.dense_sha256 == again.provenance.dense_sha256 == tensors_sha256(on_disk(out))


def test_opening_and_loading_give_the_same(out: Path) -> None:
    options = ModelOptions("digits_resnet", "random", seed=4)
    module, provenance = open_checkpoint(options)
    assert load_checkpoint(options, out).provenance == provenance
    assert same(on_disk(out), dict(module.state_dict()))
    assert not any(m.training for m in module.modules())


def test_the_bytes_depend_on_the_options_only(tiny_spec: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else" / "where" / "tiny.py"
    elsewhere.parent.mkdir(parents=True)
    shutil.copy(tiny_spec.rpartition(":")[0], elsewhere)
    sums = []
    for i, spec in enumerate((tiny_spec, tiny_spec, f"{elsewhere}:build")):
        torch.manual_seed(100 + i)
        out = tmp_path / str(i) / f"{i}.safetensors"
        sums.append(load_checkpoint(ModelOptions(spec, "random", seed=1), out).sha256)
    assert len(set(sums)) == 1
    other = load_checkpoint(ModelOptions(tiny_spec, "random", seed=2), tmp_path / "other.safetensors")
    assert other.sha256 != sums[0]


@pytest.mark.slow  # the whole line in another process is a plain test of test_run.py
def test_the_bytes_are_the_same_in_another_process(out: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from maskplan.pipeline.models.checkpoint import ModelOptions, load_checkpoint\n"
        "print(load_checkpoint(ModelOptions('digits_resnet', 'random', seed=1), Path(sys.argv[1])).sha256)"
    )
    written = load_checkpoint(ModelOptions("digits_resnet", "random", seed=1), out)
    printed = subprocess.run(
        [sys.executable, "-c", program, str(out.with_name("other.safetensors"))],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.strip() == written.sha256


def test_every_field_of_the_record_comes_back(out: Path) -> None:
    provenance = sparse_provenance()
    save_checkpoint({"a": torch.zeros(2)}, provenance, out)
    assert read_checkpoint(out).provenance == provenance


def test_another_tool_reads_the_file(out: Path) -> None:
    """The header's one key of ours is JSON text, as safetensors wants it."""
    save_checkpoint(digits_net().state_dict(), sparse_provenance(), out)
    with safetensors.safe_open(out, "np") as file:
        assert set(file.keys()) == set(digits_net().state_dict())
        text = file.metadata()["maskplan"]
    assert json.loads(text)["dense_sha256"] == sparse_provenance().dense_sha256


# What cannot be read --------------------------------------------------------------------------------------------------


def test_a_file_of_another_tool_has_no_provenance(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(InputError, match="not a checkpoint of maskplan") as raised:
        read_checkpoint(file)
    assert raised.value.where == file
    assert "--weights" in str(raised.value.fix)


@pytest.mark.parametrize("name", ["missing.safetensors", "missing.pth"])
def test_a_missing_file_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError) as raised:
        read_checkpoint(tmp_path / name)
    assert raised.value.where == tmp_path / name


def test_a_file_cut_short_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "cut.safetensors"
    whole = BUNDLED_WEIGHTS.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError, match="cannot be read"):
            read_checkpoint(file)


@pytest.mark.parametrize(
    "spoil", [{"classes": "ten"}, {"model": None}, {"preprocessing": {}}, {"image_sets": 3}, {"surprise": 1}], ids=str
)
def test_invalid_provenance_is_an_error_for_weights_too(tmp_path: Path, spoil: dict[str, object]) -> None:
    file = tmp_path / "odd.safetensors"
    header = {"maskplan": json.dumps({**encode(sparse_provenance()), **spoil})}
    safetensors.torch.save_file(dict(digits_net().state_dict()), file, header)
    for read in (read_checkpoint, lambda f: open_checkpoint(ModelOptions("digits_resnet", str(f)))):
        with pytest.raises(InputError, match="metadata cannot be read") as raised:
            read(file)
        assert raised.value.where == file
