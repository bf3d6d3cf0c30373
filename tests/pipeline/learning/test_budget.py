"""What a time budget is spent on: the strategy by the number of images, what is remembered, and what the command writes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gray_images import PREPROCESSING, dataset, random_images
from torch import nn

from maskplan.pipeline.core.artifacts import Pattern, Provenance
from maskplan.pipeline.learning import budget
from maskplan.pipeline.learning.budget import choose_strategy, seconds_per_image, strategy_file, strategy_for_budget
from maskplan.pipeline.learning.options import LearnerFiles, LearnOptions, block_files
from maskplan.pipeline.masking.magnitude import magnitude_mask
from maskplan.pipeline.pruning.mask import MaskOptions, choose_masks

TWO_FOUR = Pattern(2, 4)
DATA = dataset(random_images(140), 100)
ABOUT = Provenance("net", True, "w.pth", "", 3, ("a", "b", "c"), PREPROCESSING)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()


@pytest.mark.parametrize(
    ("images", "train", "wanted"),
    [
        (1999, 100, "layerwise"),
        (2000, 100, "full"),
        (2000, 401, "short"),
        (225_000, 45_000, "full"),
        (224_999, 45_000, "short"),
        (1e12, 1_200_000, "full"),
        (0, 0, "layerwise"),
    ],
)
def test_the_number_of_images_in_the_budget_decides(images: float, train: int, wanted: str) -> None:
    assert choose_strategy(images, train) == wanted


def of_budget(minutes: float | None, checkpoint: Path | None = None, *, resume: bool = True, second: int = 20) -> str:
    """Of 100 images, of which some number takes a second."""
    files = LearnerFiles(checkpoint, resume)
    return strategy_for_budget(LearnOptions(budget_minutes=minutes), 100, lambda: 1 / second, files)


@pytest.mark.parametrize(("minutes", "wanted"), [(0, "layerwise"), (1.6, "layerwise"), (1.7, "full"), (None, "full")])
def test_a_budget_is_counted_in_minutes(minutes: float | None, wanted: str) -> None:
    """2,000 images take 100 seconds."""
    assert of_budget(minutes) == wanted


def test_the_log_says_what_the_budget_is_spent_on(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        of_budget(1)
    assert "1 minutes are about 1200 images: layer-wise masks, without learning" in caplog.text


def test_a_step_is_timed_and_the_network_stays_as_it_is(net: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    masks = {"3.weight": magnitude_mask(net.get_parameter("3.weight").detach().numpy(), TWO_FOUR)}
    started = time.monotonic()
    seconds = seconds_per_image(net, masks, TWO_FOUR, PREPROCESSING, DATA, LearnOptions(batch=16), (), "cpu")
    assert 0 < seconds < (time.monotonic() - started) / 16
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not net.training


def test_processes_that_learn_together_do_not_decide_by_their_own_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert of_budget(1) == "full"


@pytest.mark.parametrize("is_in_first_phase", [False, True])
def test_an_interrupted_run_goes_on_as_it_began(is_in_first_phase: bool, tmp_path: Path) -> None:
    """On a host that is slower now."""
    files = LearnerFiles(tmp_path / "m.learning")
    checkpoint, written = files.checkpoint, (block_files(files) if is_in_first_phase else files).checkpoint
    assert checkpoint is not None
    assert written is not None
    assert of_budget(9, checkpoint) == "full"
    # Without a checkpoint there is nothing to go on with.
    assert of_budget(9, checkpoint, second=2) == "layerwise"
    assert of_budget(9, checkpoint) == "full"
    written.write_bytes(b"a learner's state")
    assert of_budget(9, checkpoint, second=2) == "full"
    assert of_budget(1, checkpoint, second=2) == "layerwise", "another budget"
    assert of_budget(9, checkpoint) == "full"
    assert of_budget(9, checkpoint, resume=False, second=2) == "layerwise"
    strategy_file(checkpoint).write_text("something else")
    assert of_budget(9, checkpoint, second=2) == "layerwise"


@pytest.mark.parametrize(
    ("strategy", "few_images", "method", "changes"),
    [
        ("layerwise", None, "layerwise", {}),
        ("short", None, "learned", {"match_features": 1.0, "epochs": 400}),
        ("short", False, "learned", {"match_features": 0.0, "epochs": 1}),
        ("full", None, "learned", {"match_features": 1.0, "epochs": 400}),
        ("full", False, "learned", {"match_features": 0.0, "epochs": 1}),
        ("full", True, "learned", {"match_features": 1.0, "epochs": 400}),
    ],
)
def test_the_strategy_reaches_the_learner(
    strategy: str,
    few_images: bool | None,
    method: str,
    changes: dict[str, Any],
    net: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[LearnOptions] = []

    def learn(module: nn.Module, start: Any, *args: Any, **_: Any) -> Any:
        seen.append(args[3])
        return start, None

    monkeypatch.setattr(budget, "strategy_for_budget", lambda *_, **__: strategy)
    monkeypatch.setattr("maskplan.pipeline.learning.trainer.learn_masks", learn)
    epochs = LearnOptions().epochs if changes.get("epochs") == 400 else 1
    learn_options = LearnOptions(epochs=epochs, batch=16, budget_minutes=5)
    options = MaskOptions(method="learned", few_images=few_images, learn=learn_options)
    made = choose_masks(net, ABOUT, options, tmp_path / "m.safetensors", DATA)
    assert made.method == method
    assert [{name: getattr(options, name) for name in changes} for options in seen] == ([changes] if changes else [])


@pytest.mark.parametrize(("minutes", "method"), [(1e-6, "layerwise"), (600, "learned")])
def test_the_memory_of_the_strategy_goes_with_the_checkpoint(
    minutes: float, method: str, net: nn.Module, tmp_path: Path
) -> None:
    files = LearnerFiles(tmp_path / "m.learning")
    options = MaskOptions(method="learned", learn=LearnOptions(epochs=1, batch=16, budget_minutes=minutes))
    assert choose_masks(net, ABOUT, options, tmp_path / "m.safetensors", DATA, files=files).method == method
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_given_masks_are_not_replaced_by_layerwise_ones(net: nn.Module, tmp_path: Path) -> None:
    first = tmp_path / "first.safetensors"
    choose_masks(net, ABOUT, MaskOptions(method="magnitude"), first)
    options = MaskOptions(method="learned", learn=LearnOptions(epochs=1, batch=16, budget_minutes=1e-6))
    made = choose_masks(net, ABOUT, options, tmp_path / "m.safetensors", DATA, init=first)
    assert made.method == "learned"


def test_the_command_spends_no_more_than_it_is_given(cli: Callable[..., Any], tmp_path: Path) -> None:
    ran = cli("mask", "digits_resnet", "--budget-minutes", 0.0001, "-o", tmp_path / "m.safetensors")
    assert ran.code == 0
    assert "masks (layerwise)" in ran.out
