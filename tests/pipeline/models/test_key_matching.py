"""Keys of checkpoints are matched to the model's own keys."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.models.key_matching import match_names
from maskplan.pipeline.models.state_dict import fit_weights, read_state
from maskplan.pipeline.models.state_selection import StateDict

State = dict[str, torch.Tensor]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential()
    net.features = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    net.head = nn.Linear(4, 2)
    return net.eval()


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def loaded(state: State, ema: bool | None = None, net: nn.Module | None = None) -> State:
    """The state of a network after the tensors were fitted."""
    net = network(1) if net is None else net
    fit_weights(net, state, where="f", ema=ema)
    return dict(net.state_dict())


def same(found: State, wanted: State) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


WANTED = dict(network().state_dict())
OTHER = {k: v + 1 for k, v in WANTED.items()}


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.", "net._orig_mod."),
        *("model.module.", "backbone.", "lit.student.net.", "_fsdp_wrapped_module.", "module.encoder_q."),
    ],
)
def test_a_prefix_of_all_keys_is_removed(prefix: str) -> None:
    assert same(loaded(prefixed(WANTED, prefix)), WANTED)


@pytest.mark.parametrize("prefix", ["", "model.", "net._orig_mod."])
def test_the_name_of_a_wrapper_within_keys_is_removed(prefix: str) -> None:
    state = {prefix + k.replace("features.", "features.module."): v for k, v in WANTED.items()}
    assert same(loaded(state), WANTED)


def test_tensors_beside_a_lightning_model_are_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    state = {**prefixed(WANTED, "model."), "criterion.weight": torch.ones(2), "metric.total": torch.zeros(())}
    with caplog.at_level(logging.INFO, "maskplan"):
        assert same(loaded(state), WANTED)
    assert "2 tensors do not belong to the model: criterion.weight, metric.total" in caplog.text


def test_buffers_of_profilers_and_averaging_are_left_out() -> None:
    state = {**WANTED, "total_ops": torch.zeros(1), "head.total_params": torch.zeros(1)}
    assert same(loaded(state), WANTED)


def test_a_model_with_wrapper_names_of_its_own_reads_its_own_and_wrapped_keys() -> None:
    def holder(seed: int) -> nn.Module:
        net = nn.Module()
        net.module = network(seed)
        return net

    wanted = dict(holder(0).state_dict())
    assert all(k.startswith("module.") for k in wanted)
    for state in (wanted, prefixed(wanted, "module."), WANTED, prefixed(wanted, "model.")):
        assert same(loaded(dict(state), net=holder(1)), wanted)


def test_one_key_of_tied_tensors_is_enough() -> None:
    net = network(1)
    net.again = nn.Linear(4, 2)
    net.again.weight = net.head.weight
    state = {**WANTED, "again.bias": torch.ones(2)}
    fit_weights(net, state, where="f")
    assert torch.equal(net.again.weight, WANTED["head.weight"])


@pytest.mark.parametrize(
    ("state", "ema", "wanted"),
    [
        ({**prefixed(WANTED, "model."), **prefixed(OTHER, "ema_model.module.")}, None, WANTED),
        ({**prefixed(WANTED, "model."), **prefixed(OTHER, "ema_model.module.")}, True, OTHER),
        ({**prefixed(WANTED, "model."), **prefixed(OTHER, "model_ema.")}, False, WANTED),
        ({**WANTED, **prefixed(OTHER, "ema.")}, None, WANTED),
        ({**WANTED, **prefixed(OTHER, "ema.")}, True, OTHER),
        ({**prefixed(OTHER, "module."), "n_averaged": torch.tensor(3)}, None, OTHER),
        ({**prefixed(OTHER, "module."), "n_averaged": torch.tensor(3)}, True, OTHER),
    ],
    ids=["raw first", "--ema", "--no-ema", "raw beside", "averaged beside", "SWA only", "SWA, --ema"],
)
def test_averaged_weights_behind_prefixes_are_chosen_by_the_option(
    state: State, ema: bool | None, wanted: State, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "maskplan"):
        assert same(loaded(state, ema), wanted)
    assert ("averaged weights (EMA or SWA) are used" in caplog.text) == (wanted is OTHER)


@pytest.mark.parametrize(
    ("state", "ema", "says"),
    [
        (WANTED, True, "no averaged weights"),
        (prefixed(WANTED, "model."), True, "no averaged weights"),
        ({**prefixed(OTHER, "module."), "n_averaged": torch.tensor(3)}, False, "only averaged ones"),
    ],
)
def test_a_requested_kind_of_weights_that_is_missing_is_an_error(state: State, ema: bool, says: str) -> None:
    with pytest.raises(InputError, match=says):
        loaded(state, ema)


def test_several_networks_that_fit_equally_are_an_error() -> None:
    with pytest.raises(InputError, match="several networks") as raised:
        loaded({**prefixed(WANTED, "student."), **prefixed(OTHER, "teacher.")})
    assert raised.value.found == "the prefixes student., teacher."


def test_of_several_networks_the_one_with_the_models_shapes_is_taken() -> None:
    bigger = {k: torch.cat([v, v]) if v.ndim else v for k, v in WANTED.items()}
    assert same(loaded({**prefixed(bigger, "big."), **prefixed(WANTED, "small.")}), WANTED)


def test_keys_that_are_not_the_models_are_counted_without_the_usual_prefix() -> None:
    state = prefixed(WANTED, "module.")
    del state["module.head.bias"]
    with pytest.raises(InputError, match="does not fit the model") as raised:
        loaded(state)
    assert raised.value.found == "1 missing: head.bias"


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": WANTED, "state_dict_ema": OTHER},
        {"model": WANTED, "model_ema": OTHER, "epoch": 3},
        {"model": {"state_dict": WANTED}, "ema": {"module": prefixed(OTHER, "module.")}},
        {"net": WANTED, "swa_state": OTHER},
        {**WANTED, "ema_state": OTHER},
    ],
    ids=lambda c: "+".join(list(c)[:2]),
)
@pytest.mark.parametrize("ema", [None, False, True])
def test_averaged_weights_beside_raw_ones_are_chosen_by_the_option(
    tmp_path: Path, content: object, ema: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(content, tmp_path / "w.pth")
    net = network(1)
    with caplog.at_level(logging.INFO, "maskplan"):
        fit_weights(net, read_state(tmp_path / "w.pth", ema=ema), where="f", ema=ema)
    assert same(dict(net.state_dict()), OTHER if ema else WANTED)
    assert ("--no-ema uses the raw ones" if ema else "--ema uses the averaged ones") in caplog.text


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema"])
def test_a_file_with_averaged_weights_only_is_read_unless_raw_ones_are_requested(tmp_path: Path, key: str) -> None:
    torch.save({key: OTHER, "epoch": 1}, tmp_path / "w.pth")
    for ema in (None, True):
        net = network(1)
        fit_weights(net, read_state(tmp_path / "w.pth", ema=ema), where="f", ema=ema)
        assert same(dict(net.state_dict()), OTHER)
    with pytest.raises(InputError, match="only averaged ones"):
        read_state(tmp_path / "w.pth", ema=False)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["a.weight"], ["a.weight"]),
        (["model.a.weight", "model.b.weight"], ["a.weight", "b.weight"]),
        (["module.a.weight"], ["a.weight"]),
        (["net._orig_mod.b.weight"], ["b.weight"]),
        (["c.weight"], []),
    ],
)
def test_names_of_some_tensors_are_matched(names: list[str], wanted: list[str]) -> None:
    assert list(match_names(names, ["a.weight", "b.weight"]).values()) == wanted


@pytest.mark.parametrize("version", [None, 1], ids=["safetensors", "torch"])
def test_mnasnet_reads_its_older_format(version: int | None) -> None:
    """Up to version 1, the stem of a narrow MNASNet had 32 channels; a file of safetensors does not state the version."""
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    old, new = torchvision.models.mnasnet0_5(), torchvision.models.mnasnet0_5()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old._load_from_state_dict({}, "", {"version": 1}, False, [], [], [])
    assert old.layers[0].weight.shape != new.layers[0].weight.shape
    state = dict(old.state_dict())
    versions = None if version is None else {"": {"version": version}}
    fit_weights(new, StateDict(state, versions), where="f")
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(new.eval()(x), old.eval()(x))


def test_torchvision_reads_the_names_of_older_transformers() -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")

    def vit() -> nn.Module:
        return torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 16, num_classes=3).eval()

    new, wanted = vit(), vit()
    names = {"mlp.0.": "mlp.linear_1.", "mlp.3.": "mlp.linear_2."}
    old = {}
    for key, tensor in wanted.state_dict().items():
        for name, older in names.items():
            key = key.replace(name, older)
        old[key] = tensor
    assert old.keys() != wanted.state_dict().keys()
    fit_weights(new, old, where="f")
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(new(x), wanted(x))
