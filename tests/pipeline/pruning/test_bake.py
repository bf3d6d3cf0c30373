"""Baking: dropped weights become +0.0, and all other bits stay the same."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from torch import nn

from maskplan.pipeline.core.artifacts import ImageSet, Layer, MaskSet, Pattern, Preprocessing, Provenance
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.masking.maskset import read_masks
from maskplan.pipeline.models.checkpoint import read_checkpoint
from maskplan.pipeline.models.state_dict import tensors_sha256
from maskplan.pipeline.pruning.bake import bake, baked_state

HOW = Preprocessing(3, 8, 8, 0, "bilinear", (0.5,) * 3, (0.25,) * 3)
PROVENANCE = Provenance("net", False, "random, seed 0", "ab" * 32, 4, ("a", "b", "c", "d"), HOW)
TRAIN, SELECT = (ImageSet(role, 9, digit * 64, (digit * 16,)) for role, digit in (("train", "1"), ("select", "2")))
# Out of order, as a network with branches has them.
LAYERS = (
    Layer("conv.weight", "Conv", (6, 8, 3, 3), 1, 2, 900),
    Layer("deep.conv.weight", "Conv", (4, 8, 1, 1), 1, 1, 100),
    Layer("head.weight", "Gemm", (4, 8), 1, 3, 32),
    Layer("stem.weight", "Conv", (8, 3, 1, 1), 1, 0, 500),
)
MASKED = ("conv.weight", "deep.conv.weight", "head.weight")
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Net(nn.Module):
    """Weights with every kind of number, under masks and not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.bn = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 6, 3)
        self.deep = nn.ModuleDict({"conv": nn.Conv2d(8, 4, 1)})
        self.head = nn.Linear(8, 4)
        self.register_buffer("steps", torch.tensor(7))
        odd = torch.tensor([-0.0, 0.0, 1e-30, -1e-30, 3e4, -3e4, -1.5, 0.1])
        with torch.no_grad():
            for weight in (self.conv.weight, self.deep["conv"].weight, self.head.weight):
                flat = weight.view(-1)
                flat[::3] = odd.repeat(len(flat) // 8 + 1)[: len(flat[::3])]


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def masks() -> dict[str, npt.NDArray[np.bool_]]:
    """Random 2:4 masks along C, independent of magnitudes."""
    rng = np.random.default_rng(0)
    drawn = {}
    for layer in LAYERS[:3]:
        k, c, *taps = layer.shape
        ranks = rng.random((k, *taps, c // 4, 4)).argsort(axis=-1)
        drawn[layer.name] = np.ascontiguousarray(np.moveaxis((ranks < 2).reshape(k, *taps, c), -1, 1))
    return drawn


@pytest.fixture
def mask_set(masks: dict[str, npt.NDArray[np.bool_]], tmp_path: Path) -> Callable[..., MaskSet]:
    """A mask file as another tool would write it, checked against the model; keyword arguments go into its header."""

    def make(**header: Any) -> MaskSet:
        path = tmp_path / "masks.safetensors"
        safetensors.numpy.save_file(masks, path, {"maskplan": json.dumps({"model": "net", **header})})
        weights = {layer.name: np.ones(layer.shape, np.float32) for layer in LAYERS}
        return read_masks(path, weights, LAYERS, model="net", deployable=False)

    return make


def bits(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A tensor's bit patterns, which tell -0.0 from 0.0."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.view(BITS[tensor.element_size()]).reshape(tuple(tensor.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dropped_weights_are_plus_zero_and_kept_ones_keep_every_bit(
    net: Net,
    mask_set: Callable[..., MaskSet],
    masks: dict[str, npt.NDArray[np.bool_]],
    tmp_path: Path,
    dtype: torch.dtype,
) -> None:
    net.to(dtype)
    bake(net, PROVENANCE, mask_set(), tmp_path / "out.safetensors")
    state = safetensors.torch.load_file(tmp_path / "out.safetensors")
    dense = net.state_dict()
    assert state.keys() == dense.keys()
    dropped_negatives = 0
    for name in MASKED:
        mask, before, after = masks[name], bits(dense[name]), bits(state[name])
        assert state[name].dtype == dtype
        assert not after[~mask].any()
        assert np.array_equal(after[mask], before[mask])
        dropped_negatives += int((dense[name] < 0)[torch.from_numpy(~mask)].sum())
    assert dropped_negatives > 50, "no product of theirs with zero would have been -0.0"


def test_a_kept_negative_zero_stays_and_a_dropped_nan_becomes_zero(
    net: Net, mask_set: Callable[..., MaskSet], masks: dict[str, npt.NDArray[np.bool_]]
) -> None:
    mask = torch.from_numpy(masks["conv.weight"])
    with torch.no_grad():
        net.conv.weight[mask] = -0.0
        net.conv.weight[~mask] = float("nan")
        net.head.weight.fill_(float("inf"))
    state = baked_state(net, mask_set())
    found = bits(state["conv.weight"])
    assert (found[mask.numpy()] == 1 << 31).all()
    assert not found[~mask.numpy()].any()
    assert not state["head.weight"].isnan().any()


def test_nothing_else_changes(net: Net, mask_set: Callable[..., MaskSet], tmp_path: Path) -> None:
    bake(net, PROVENANCE, mask_set(), tmp_path / "out.safetensors")
    state = safetensors.torch.load_file(tmp_path / "out.safetensors")
    others = [name for name in net.state_dict() if name not in MASKED]
    assert {"stem.weight", "head.bias", "bn.running_mean", "bn.num_batches_tracked", "steps"} <= set(others)
    for name in others:
        assert state[name].dtype == net.state_dict()[name].dtype
        assert np.array_equal(bits(state[name]), bits(net.state_dict()[name])), name


def test_the_model_itself_stays_dense(net: Net, mask_set: Callable[..., MaskSet], tmp_path: Path) -> None:
    before = {name: bits(tensor).copy() for name, tensor in net.state_dict().items()}
    baked = baked_state(net, mask_set())
    bake(net, PROVENANCE, mask_set(), tmp_path / "out.safetensors")
    for name in MASKED:
        baked[name].fill_(9)
    assert all(np.array_equal(bits(tensor), before[name]) for name, tensor in net.state_dict().items())


def test_memory_order_does_not_matter(net: Net, mask_set: Callable[..., MaskSet], tmp_path: Path) -> None:
    strided = copy.deepcopy(net).to(memory_format=torch.channels_last)
    assert not strided.conv.weight.is_contiguous()
    written = [bake(n, PROVENANCE, mask_set(), tmp_path / f"{i}.safetensors") for i, n in enumerate((net, strided))]
    assert written[0].sha256 == written[1].sha256


def test_training_mode_and_requires_grad_do_not_matter(
    net: Net, mask_set: Callable[..., MaskSet], tmp_path: Path
) -> None:
    plain = bake(net, PROVENANCE, mask_set(), tmp_path / "a.safetensors")
    again = bake(net.eval().requires_grad_(False), PROVENANCE, mask_set(), tmp_path / "b.safetensors")
    assert plain.sha256 == again.sha256


def test_the_record_describes_the_file_with_layers_in_forward_order(
    net: Net, mask_set: Callable[..., MaskSet], tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "out.safetensors"
    written = bake(net, PROVENANCE, mask_set(pattern="2:4", method="learned"), out)
    assert written.path == out
    assert written.bytes == out.stat().st_size
    assert written.sha256 == hashlib.sha256(out.read_bytes()).hexdigest()
    assert written == read_checkpoint(out)
    assert written.provenance == dataclasses.replace(
        PROVENANCE,
        masked=("deep.conv.weight", "conv.weight", "head.weight"),
        pattern="2:4",
        layout="channel",
        method="learned",
    )


@pytest.mark.parametrize(
    ("of_weights", "of_masks", "expected"),
    [
        ((), (TRAIN, SELECT), (TRAIN, SELECT)),
        ((TRAIN,), (), (TRAIN,)),
        ((TRAIN,), (TRAIN, SELECT), (TRAIN, SELECT)),
        ((SELECT,), (TRAIN,), (SELECT, TRAIN)),
    ],
)
def test_image_sets_of_weights_and_masks_are_merged(
    net: Net,
    mask_set: Callable[..., MaskSet],
    tmp_path: Path,
    of_weights: tuple[ImageSet, ...],
    of_masks: tuple[ImageSet, ...],
    expected: tuple[ImageSet, ...],
) -> None:
    given = mask_set(image_sets=[dataclasses.asdict(s) for s in of_masks])
    written = bake(net, dataclasses.replace(PROVENANCE, image_sets=of_weights), given, tmp_path / "out.safetensors")
    assert written.provenance.image_sets == expected


def test_masks_in_the_flat_layout_are_refused_and_nothing_is_written(
    net: Net, mask_set: Callable[..., MaskSet], tmp_path: Path
) -> None:
    flat = dataclasses.replace(mask_set(), layout="flat")
    with pytest.raises(InputError, match="'flat' cannot be deployed") as raised:
        bake(net, PROVENANCE, flat, tmp_path / "out.safetensors")
    assert raised.value.where == flat.path
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(("digest", "warned"), [("own", False), ("", False), ("cd" * 32, True)])
def test_masks_of_other_weights_are_baked_with_a_warning(
    net: Net,
    mask_set: Callable[..., MaskSet],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    digest: str,
    warned: bool,
) -> None:
    digest = tensors_sha256(net.state_dict()) if digest == "own" else digest
    with caplog.at_level(logging.WARNING, logger="maskplan.pipeline.pruning.bake"):
        bake(net, PROVENANCE, mask_set(weights_sha256=digest), tmp_path / "out.safetensors")
    assert [("other weights of net" in r.getMessage()) for r in caplog.records] == [True] * warned
    state = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert (state["head.weight"] != 0).float().mean() <= 0.5


@pytest.mark.parametrize(("n", "m"), [(1, 4), (3, 4), (1, 2), (2, 8)])
def test_any_pattern_is_baked_and_recorded(net: Net, tmp_path: Path, n: int, m: int) -> None:
    path = tmp_path / "masks.safetensors"
    mask = np.tile(np.arange(8) % m < n, (4, 1))
    header = {"maskplan": json.dumps({"pattern": f"{n}:{m}"})}
    safetensors.numpy.save_file({"head.weight": mask}, path, header)
    given = read_masks(path, {"head.weight": np.ones((4, 8), np.float32)}, LAYERS[2:3], model="net")
    assert given.pattern == Pattern(n, m)
    written = bake(net, PROVENANCE, given, tmp_path / "out.safetensors")
    assert (written.provenance.pattern, written.provenance.masked) == (f"{n}:{m}", ("head.weight",))
    expected = np.where(mask, net.head.weight.detach().numpy(), np.float32(0))
    assert np.array_equal(safetensors.numpy.load_file(written.path)["head.weight"], expected)


def test_baking_twice_changes_nothing(net: Net, mask_set: Callable[..., MaskSet], tmp_path: Path) -> None:
    first = bake(net, PROVENANCE, mask_set(), tmp_path / "a.safetensors")
    net.load_state_dict(safetensors.torch.load_file(first.path))
    assert bake(net, first.provenance, mask_set(), tmp_path / "b.safetensors").sha256 == first.sha256
