"""Odd checkpoints at the commands: read, or one message; and their pruning masks as masks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import odd_modules
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch.nn.utils import parametrizations, prune

from maskplan.pipeline.masking.magnitude import magnitude_mask
from maskplan.pipeline.masking.maskset import load_masks
from maskplan.pipeline.masking.patterns import parse_pattern

pytestmark = pytest.mark.filterwarnings("ignore")

RAN: dict[str, Any] = {}
exec(odd_modules.SOURCE, RAN)
State = dict[str, torch.Tensor]


class Ran(Protocol):
    code: int
    out: str
    err: str


Cli = Callable[..., Ran]


def state_of(change: Callable[[Any], object] | None = None) -> State:
    torch.manual_seed(7)
    net = RAN["plain"]()
    if change is not None:
        change(net.wide)
        change(net.last)
    return dict(net.state_dict())


def two_of_four(layer: torch.nn.Module) -> None:
    mask = magnitude_mask(layer.weight.detach().numpy(), parse_pattern("2:4"), "channel")
    prune.custom_from_mask(layer, "weight", torch.from_numpy(mask))


def with_prefix(state: State, prefix: str) -> State:
    return {prefix + k: v for k, v in state.items()}


def asp() -> State:
    state = state_of()
    mask = magnitude_mask(state["wide.weight"].numpy(), parse_pattern("2:4"), "channel")
    return {**state, "wide.__weight_mma_mask": torch.from_numpy(mask)}


PLAIN = state_of()
FILES: dict[str, Any] = {
    "lightning": {
        "state_dict": {**with_prefix(PLAIN, "model."), "loss.weight": torch.ones(3)},
        "hyper_parameters": argparse.Namespace(lr=0.1, folder=Path("x")),
        "callbacks": {"best": np.float64(0.5)},
    },
    "compiled lightning": {"state_dict": with_prefix(PLAIN, "net._orig_mod.")},
    "DataParallel": with_prefix(PLAIN, "module."),
    "DataParallel part": {k.replace("wide.", "wide.module."): v for k, v in PLAIN.items()},
    "timm with EMA": {
        "state_dict": PLAIN,
        "state_dict_ema": PLAIN,
        "args": argparse.Namespace(a=1),
        "metric": np.float32(1),
    },
    "EMA only": {"model_ema": PLAIN},
    "SWA": {**with_prefix(PLAIN, "module."), "n_averaged": torch.tensor(3)},
    "half": {k: v.half() for k, v in PLAIN.items()},
    "bfloat16": {k: v.bfloat16() for k, v in PLAIN.items()},
    "channels-last": {
        k: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in PLAIN.items()
    },
    "sparse": {k: v.to_sparse() if v.ndim > 1 else v for k, v in PLAIN.items()},
    "quantized": {k: torch.quantize_per_tensor(v, 0.01, 0, torch.qint8) if v.ndim > 1 else v for k, v in PLAIN.items()},
    "parameters": {k: torch.nn.Parameter(v, requires_grad=False) for k, v in PLAIN.items()},
    "arrays": {k: v.numpy() for k, v in PLAIN.items()},
    "weight_norm": state_of(parametrizations.weight_norm),
    "old weight_norm": state_of(torch.nn.utils.weight_norm),
    "spectral_norm": state_of(parametrizations.spectral_norm),
    "old spectral_norm": state_of(torch.nn.utils.spectral_norm),
    "pruned": state_of(lambda m: prune.l1_unstructured(m, "weight", 0.5)),
    "pruned 2:4": state_of(two_of_four),
    "ASP": asp(),
    "thop": {**PLAIN, "total_ops": torch.zeros(1), "wide.total_params": torch.zeros(1)},
}
WRONG: dict[str, tuple[Any, str]] = {
    "another head": ({**PLAIN, "head.weight": torch.zeros(5, 16), "head.bias": torch.zeros(5)}, "with another shape"),
    "two networks": ({**with_prefix(PLAIN, "a."), **with_prefix(PLAIN, "b.")}, "several networks"),
    "nothing": ({}, "no tensors"),
    "meta": ({k: v.to("meta") for k, v in PLAIN.items()}, "'meta'"),
    "module": (RAN["plain"]().wide, "would run code"),
    "orthogonal": (state_of(parametrizations.orthogonal), "with its parametrizations"),
    "complex": ({**PLAIN, "wide.weight": PLAIN["wide.weight"].to(torch.complex64)}, "complex"),
    "text": ({**PLAIN, "wide.weight": "x"}, "1 missing: wide.weight"),
    "nested": ({"state_dict": {"encoder": PLAIN}}, "no tensors"),
    "NaN": ({**PLAIN, "wide.bias": torch.full((12,), float("nan"))}, "NaN or infinity"),
}


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "odd.py").write_text(odd_modules.SOURCE)
    (tmp_path / "quick.toml").write_text("[learn]\nepochs = 1\n")
    return f"{tmp_path / 'odd.py'}:plain"


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_a_checkpoint_that_fits_is_baked(cli: Cli, spec: str, tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    model = (spec, "--weights", tmp_path / "w.pth")
    ran = cli("mask", *model, "--method", "magnitude", "-o", tmp_path / "m.safetensors")
    assert ran.code == 0, ran.err
    ran = cli("bake", *model, "--masks", tmp_path / "m.safetensors", "-o", tmp_path / "s.safetensors")
    assert ran.code == 0, ran.err
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        assert set(file.keys()) == set(PLAIN)


@pytest.mark.parametrize(("content", "says"), WRONG.values(), ids=WRONG)
def test_a_checkpoint_that_does_not_fit_is_refused(
    cli: Cli, spec: str, tmp_path: Path, content: object, says: str
) -> None:
    torch.save(content, tmp_path / "w.pth")
    ran = cli("mask", spec, "--weights", tmp_path / "w.pth", "--method", "magnitude", "-o", tmp_path / "m.safetensors")
    assert ran.code == 3, ran
    assert says in ran.err
    assert ran.err.count("error:") == 1


def test_a_sharded_checkpoint_is_read(cli: Cli, spec: str, tmp_path: Path) -> None:
    names = sorted(PLAIN)
    for number, part in enumerate((names[::2], names[1::2])):
        safetensors.torch.save_file({n: PLAIN[n] for n in part}, tmp_path / f"{number}.safetensors")
    index = tmp_path / "w.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: f"{i % 2}.safetensors" for i, n in enumerate(names)}}))
    ran = cli("mask", spec, "--weights", index, "--method", "magnitude", "-o", tmp_path / "m.safetensors")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize("kind", ["pruned 2:4", "ASP"])
@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_pruning_masks_of_a_checkpoint_are_taken_as_masks(
    cli: Cli, spec: str, tmp_path: Path, toy_data: Path, kind: str, prefix: str
) -> None:
    file = tmp_path / "w.pth"
    torch.save({"state_dict": with_prefix(FILES[kind], prefix)}, file)
    model = (spec, "--weights", file)
    wanted = {"wide.weight"} if kind == "ASP" else {"wide.weight", "last.weight"}
    ran = cli("bake", *model, "--masks", file, "-o", tmp_path / "s.safetensors")
    assert ran.code == 0, ran.err
    assert f"2:4 on {len(wanted)} layers" in ran.out
    baked = safetensors.torch.load_file(tmp_path / "s.safetensors")
    learning = ("--method", "learned", "--data", toy_data, "--recipe", tmp_path / "quick.toml")
    ran = cli("mask", *model, "--init", file, *learning, "-o", tmp_path / "m.safetensors")
    assert ran.code == 0, ran.err
    assert f"{len(wanted)} pruning masks are used" in ran.err
    masks = load_masks(tmp_path / "m.safetensors")
    assert masks.keys() == wanted
    for name, mask in masks.items():
        assert mask.sum() == mask.size // 2
        stored = FILES[kind].get(f"{name}_mask", FILES[kind].get("wide.__weight_mma_mask")).bool()
        assert torch.equal(baked[name] != 0, stored)


def test_unstructured_masks_of_a_checkpoint_are_refused_with_what_to_do(cli: Cli, spec: str, tmp_path: Path) -> None:
    torch.save(FILES["pruned"], tmp_path / "w.pth")
    model = (spec, "--weights", tmp_path / "w.pth")
    ran = cli("bake", *model, "--masks", tmp_path / "w.pth", "-o", tmp_path / "s.safetensors")
    assert ran.code == 3
    assert "none is 2:4" in ran.err
    assert "maskplan convert" in ran.err


@pytest.mark.slow
def test_the_line_takes_the_masks_of_a_checkpoint(cli: Cli, spec: str, tmp_path: Path) -> None:
    torch.save(FILES["pruned 2:4"], tmp_path / "w.pth")
    recipe = tmp_path / "quick.toml"
    recipe.write_text("[time]\nseconds = 0.1\nbatches = [1]\n[compare]\nfixed_images = 2\n")
    options = ("--weights", tmp_path / "w.pth", "--masks", tmp_path / "w.pth", "--recipe", recipe)
    ran = cli("engine", spec, *options, "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert load_masks(tmp_path / "out" / "masks.safetensors").keys() == {"wide.weight", "last.weight"}


@pytest.mark.parametrize("flag", ["--ema", "--no-ema"])
def test_options_for_averaged_weights_need_a_file(cli: Cli, spec: str, tmp_path: Path, flag: str) -> None:
    ran = cli("mask", spec, "--weights", "random", flag, "-o", tmp_path / "m.safetensors")
    assert ran.code == 3
    assert "give --weights FILE" in ran.err


def test_the_option_for_averaged_weights_takes_them(cli: Cli, spec: str, tmp_path: Path) -> None:
    averaged = {k: v + 1 for k, v in PLAIN.items()}
    torch.save({"state_dict": PLAIN, "state_dict_ema": averaged}, tmp_path / "w.pth")
    model = (spec, "--weights", tmp_path / "w.pth")
    assert cli("mask", *model, "--method", "magnitude", "-o", tmp_path / "m.safetensors").code == 0
    for flags, wanted in (((), PLAIN), (("--no-ema",), PLAIN), (("--ema",), averaged)):
        ran = cli("bake", *model, *flags, "--masks", tmp_path / "m.safetensors", "-o", tmp_path / "s.safetensors")
        assert ran.code == 0, ran.err
        stored = safetensors.torch.load_file(tmp_path / "s.safetensors")
        assert torch.equal(stored["head.weight"], wanted["head.weight"])
