"""Permutation files: damaged ones, those of other tools or models, and those that would change the outputs are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.masking.policy import LayerPolicy
from maskplan.pipeline.models.state_dict import METADATA_KEY
from maskplan.pipeline.permutation.permute import repermute
from maskplan.pipeline.permutation.record import Permuted, read_permutation
from tests.support.permuted_nets import PROVENANCE, Shared, run, trained


@pytest.fixture(scope="module")
def permuted(tmp_path_factory: pytest.TempPathFactory) -> Permuted:
    """A permuted checkpoint and its permutation file; read-only."""
    return run(trained(), tmp_path_factory.mktemp("permuted"))


def damaged(path: Path, change: Callable[[dict[str, np.ndarray]], None], folder: Path) -> Path:
    """A copy of a permutation file with other tensors."""
    tensors = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "np") as file:
        header = file.metadata()
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "damaged.safetensors", {METADATA_KEY: header[METADATA_KEY]})
    return folder / "damaged.safetensors"


def repeated(tensors: dict[str, np.ndarray]) -> None:
    tensors["one/order"][0] = tensors["one/order"][1]


def negative(tensors: dict[str, np.ndarray]) -> None:
    tensors["one/two.weight/1"][0] = -1


def missing(tensors: dict[str, np.ndarray]) -> None:
    del tensors["one/order"]


def shortened(tensors: dict[str, np.ndarray]) -> None:
    tensors["one/two.weight/1"] = tensors["one/two.weight/1"][:-1]


def placeless(tensors: dict[str, np.ndarray]) -> None:
    for name in [n for n in tensors if n.startswith("one/") and n != "one/order"]:
        del tensors[name]


def emptied(tensors: dict[str, np.ndarray]) -> None:
    for name in tensors:
        tensors[name] = tensors[name][:0]


@pytest.mark.parametrize("change", [repeated, negative, missing, shortened, placeless, emptied])
def test_a_damaged_permutation_is_refused(
    change: Callable[[dict[str, np.ndarray]], None], permuted: Permuted, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="not a permutation file"):
        read_permutation(damaged(permuted.permutation.path, change, tmp_path))


def test_files_of_another_kind_are_refused(permuted: Permuted, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a permutation file"):
        read_permutation(permuted.checkpoint.path)
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(InputError, match="cannot be read"):
        read_permutation(tmp_path / "text.safetensors")
    with pytest.raises(InputError, match="not found"):
        read_permutation(tmp_path / "none.safetensors")


def test_a_file_of_another_tool_is_refused(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"one/order": np.arange(4)}, tmp_path / "plain.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="not a permutation file"):
        read_permutation(tmp_path / "plain.safetensors")


@pytest.mark.parametrize("axis", [-1, 4])
def test_an_axis_that_no_tensor_has_is_refused(axis: int, permuted: Permuted, tmp_path: Path) -> None:
    order = permuted.permutation.path

    def moved(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"one/two.weight/{axis}"] = tensors.pop("one/two.weight/1")

    with pytest.raises(InputError, match=r"found: 1 axes do not fit: two\.weight"):
        repermute(trained(), PROVENANCE, damaged(order, moved, tmp_path), LayerPolicy(), tmp_path / "again.safetensors")


def test_positions_past_the_end_are_refused(permuted: Permuted, tmp_path: Path) -> None:
    order = permuted.permutation.path

    def beyond(tensors: dict[str, np.ndarray]) -> None:
        tensors["one/two.weight/1"] += 1

    with pytest.raises(InputError, match=r"found: 1 axes do not fit: two\.weight \(16, 32, 1, 1\) is too small"):
        repermute(
            trained(), PROVENANCE, damaged(order, beyond, tmp_path), LayerPolicy(), tmp_path / "again.safetensors"
        )


def test_positions_that_move_twice_are_refused(permuted: Permuted, tmp_path: Path) -> None:
    order = permuted.permutation.path

    def doubled(tensors: dict[str, np.ndarray]) -> None:
        tensors["stem/two.weight/1"] = tensors["one/two.weight/1"][:16]

    with pytest.raises(InputError, match=r"positions of two\.weight move twice"):
        repermute(
            trained(), PROVENANCE, damaged(order, doubled, tmp_path), LayerPolicy(), tmp_path / "again.safetensors"
        )


def test_a_permutation_of_another_model_is_refused(permuted: Permuted, tmp_path: Path) -> None:
    order = permuted.permutation.path
    with pytest.raises(InputError, match=r"of another model\n.*\n  found: \d+ axes do not fit"):
        repermute(trained(build=Shared), PROVENANCE, order, LayerPolicy(), tmp_path / "again.safetensors")
    assert not (tmp_path / "again.safetensors").exists()


def test_a_permutation_that_changes_the_outputs_is_not_written(permuted: Permuted, tmp_path: Path) -> None:
    """All its axes fit, but one of them was left out."""
    order = permuted.permutation.path

    def forgetful(tensors: dict[str, np.ndarray]) -> None:
        del tensors["one/two.weight/1"]

    with pytest.raises(InputError, match=r"computes another function\n(.*\n)*  found: outputs differ by"):
        repermute(
            trained(), PROVENANCE, damaged(order, forgetful, tmp_path), LayerPolicy(), tmp_path / "again.safetensors"
        )
    assert not (tmp_path / "again.safetensors").exists()
