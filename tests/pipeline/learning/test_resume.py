"""Interrupted learning resumes to bit-identical masks, and several processes learn the same masks."""

from __future__ import annotations

import csv
import dataclasses
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gray_images
import numpy as np
import pytest
import torch
from torch import nn

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.errors import HostError, InputError
from maskplan.pipeline.core.interrupts import INTERRUPTS, handle_signals
from maskplan.pipeline.data.dataset import Dataset
from maskplan.pipeline.data.digits import PREPROCESSING, load_digits
from maskplan.pipeline.learning import learner
from maskplan.pipeline.learning.masked_net import Masks
from maskplan.pipeline.learning.options import LearnerFiles, LearnOptions
from maskplan.pipeline.learning.schedule import training_batches
from maskplan.pipeline.learning.state import load_state, state_key
from maskplan.pipeline.learning.trainer import learn_masks
from maskplan.pipeline.masking.magnitude import magnitude_mask
from maskplan.pipeline.models.batchnorm import RecalibrateOptions, update_statistics
from maskplan.pipeline.models.state_dict import tensors_sha256

TWO_FOUR = Pattern(2, 4)
SUPPORT = str(Path(gray_images.__file__).parent)
# Fifteen steps in three epochs.
QUICK = LearnOptions(epochs=3, batch=24, ema=0.9, augment="shift", save_every=2, seed=4)


class Net(nn.Module):
    """Two maskable convolutions with BatchNorm between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.wide, self.bn2 = nn.Conv2d(8, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.last, self.head = nn.Conv2d(16, 8, 1), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.stem(x)))
        x = torch.relu(self.bn2(self.wide(x)))
        return self.head(self.last(x).mean((2, 3)))


@pytest.fixture(scope="module")
def net(data: Dataset) -> nn.Module:
    """With BatchNorm statistics of the images, as a trained network has."""
    torch.manual_seed(0)
    made = Net()
    update_statistics(made, data.train, PREPROCESSING, RecalibrateOptions())
    return made


@pytest.fixture(scope="module")
def start(net: nn.Module) -> Masks:
    names = ("wide.weight", "last.weight")
    return {n: magnitude_mask(net.state_dict()[n].numpy(), TWO_FOUR) for n in names}


@pytest.fixture(scope="module")
def data() -> Dataset:
    """Some of the digits: five batches of training images."""
    whole = load_digits()
    train, select = (dataclasses.replace(s, indices=s.indices[:n]) for s, n in ((whole.train, 120), (whole.select, 40)))
    return dataclasses.replace(whole, train=train, select=select)


Learn = Callable[..., Masks]


@pytest.fixture(scope="module")
def learn(net: nn.Module, start: Masks, data: Dataset) -> Learn:
    """Learn masks with `QUICK` and changed options; the checkpoint goes to a file, the log beside it."""

    def run(state: Path | None = None, **options: object) -> Masks:
        chosen = dataclasses.replace(QUICK, **options)  # type: ignore[arg-type]
        files = LearnerFiles(state, log_dir=state.parent if state else None)
        return learn_masks(net, start, TWO_FOUR, PREPROCESSING, data, chosen, files=files, device="cpu")[0]

    return run


def same(a: Masks, b: Masks) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(learn: Learn) -> Masks:
    """The masks of a run that was not interrupted."""
    return learn()


class InjectedError(RuntimeError):
    """Ends a run in these tests."""


def interrupt_after(steps: int, monkeypatch: pytest.MonkeyPatch, error: Callable[[], None]) -> None:
    """Call `error` instead of loading the images of the step after these."""
    left = [steps]

    def limited(*arguments: object, **named: object) -> Iterator[object]:
        for batch in training_batches(*arguments, **named):  # type: ignore[arg-type]
            if left[0] == 0:
                error()
            left[0] -= 1
            yield batch

    monkeypatch.setattr(learner, "training_batches", limited)


def fail() -> None:
    raise InjectedError


@pytest.mark.parametrize("steps", [1, 2, 5, 8, 9, 13])
def test_an_interrupted_run_ends_with_the_same_masks(
    steps: int, learn: Learn, start: Masks, whole: Masks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "learning.safetensors"
    with monkeypatch.context() as patch:
        interrupt_after(steps, patch, fail)
        with pytest.raises(InjectedError):
            learn(state)
    assert state.exists() == (steps >= 2)
    assert same(learn(state), whole)
    assert not same(whole, start)


def test_a_run_that_is_interrupted_repeatedly_ends_with_the_same_masks(
    learn: Learn, whole: Masks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "learning.safetensors"
    for _ in range(4):
        with monkeypatch.context() as patch:
            interrupt_after(3, patch, fail)
            with pytest.raises(InjectedError):
                learn(state)
    assert same(learn(state), whole)


def test_the_best_masks_survive_an_interruption(learn: Learn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rising noise and a high learning rate make the first epoch the best."""
    options = {"lr": 1.0, "noise_start": 0.0, "noise_end": 100.0}
    whole = learn(tmp_path / "whole.safetensors", **options)
    with (tmp_path / "learning.csv").open() as file:
        scores = [float(r["select_divergence"]) for r in csv.DictReader(file) if r["select_divergence"]]
    assert scores[0] < 0.9 * min(scores[1:])
    state = tmp_path / "learning.safetensors"
    with monkeypatch.context() as patch:
        interrupt_after(8, patch, fail)
        with pytest.raises(InjectedError):
            learn(state, **options)
    assert same(learn(state, **options), whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_state_after_the_current_step(
    number: int,
    net: nn.Module,
    start: Masks,
    learn: Learn,
    whole: Masks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With checkpoints at the end of epochs only, the state after step 7 is what the signal saved."""
    state = tmp_path / "learning.safetensors"
    with monkeypatch.context() as patch, handle_signals():
        # The step that the signal arrives in is finished.
        interrupt_after(6, patch, lambda: os.kill(os.getpid(), number))
        with pytest.raises(KeyboardInterrupt):
            learn(state, save_every=0)
        assert INTERRUPTS.pending == number
    key = state_key(QUICK, tensors_sha256(net.state_dict()), start, ())
    stored = load_state(state, key)
    assert stored is not None
    assert stored.progress.steps == 7
    with handle_signals():
        assert same(learn(state, save_every=0), whole)


def test_the_interval_between_checkpoints_does_not_change_the_masks(learn: Learn, whole: Masks, tmp_path: Path) -> None:
    assert same(learn(tmp_path / "s.safetensors", save_every=3), whole)


@pytest.mark.parametrize("change", [{"seed": 5}, {"lr": 0.2}, {"epochs": 2}])
def test_a_checkpoint_of_other_options_is_not_resumed(
    change: dict[str, object], learn: Learn, whole: Masks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "learning.safetensors"
    learn(state)
    expected = learn(**change)
    assert not same(expected, whole)
    assert same(learn(state, **change), expected)
    assert "learning restarts" in caplog.text


def test_a_damaged_checkpoint_is_an_error(learn: Learn, tmp_path: Path) -> None:
    state = tmp_path / "learning.safetensors"
    learn(state, epochs=1)
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read"):
        learn(state, epochs=1)


def test_a_full_disk_keeps_the_last_complete_checkpoint(
    learn: Learn, whole: Masks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full after the second checkpoint."""
    folder = tmp_path / "state"
    folder.mkdir()
    state = folder / "learning.safetensors"
    monkeypatch.setattr(os, "fsync", lambda _: None)
    with monkeypatch.context() as patch:
        saves = [0]

        def full(handle: int) -> None:
            saves[0] += 1
            if saves[0] > 4:  # a file and its folder, twice
                raise OSError(28, "No space left on device")

        patch.setattr(os, "fsync", full)
        with pytest.raises(HostError, match="the disk is full"):
            learn(state)
    assert [p.name for p in folder.iterdir() if p.name != "learning.csv"] == ["learning.safetensors"]
    assert same(learn(state), whole)


def test_metrics_are_logged_at_the_end_of_each_epoch(learn: Learn, tmp_path: Path) -> None:
    learn(tmp_path / "learning.safetensors")
    with (tmp_path / "learning.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows if r["select_top1"]] == [5, 10, 15]
    last = rows[-1]
    assert 0 <= float(last["entropy"]) <= 1
    assert 0 < float(last["moved"]) < 1
    assert float(last["tau"]) == pytest.approx(QUICK.tau_end)
    assert float(last["lr"]) == pytest.approx(QUICK.lr / 100)


def test_learning_stops_after_epochs_without_gain(net: nn.Module, start: Masks, data: Dataset) -> None:
    """At a learning rate near zero, no epoch is better than the start."""
    options = dataclasses.replace(QUICK, epochs=30, lr=1e-12, ema=0.0, patience=2)
    masks, learning = learn_masks(net, start, TWO_FOUR, PREPROCESSING, data, options, device="cpu")
    assert learning.epochs == 2
    assert same(masks, start)


WORKER = """
import os
import sys
from pathlib import Path

import numpy as np
import torch
from gray_images import PREPROCESSING, dataset, random_images
from torch import nn

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.learning.options import LearnOptions
from maskplan.pipeline.learning.trainer import LearnerFiles, learn_masks
from maskplan.pipeline.masking.magnitude import magnitude_mask

torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1),
                    nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)).eval()
start = {n: magnitude_mask(net.state_dict()[n].numpy(), Pattern(2, 4)) for n in ("3.weight", "7.weight")}
out = Path(sys.argv[1])
masks, learning = learn_masks(net, start, Pattern(2, 4), PREPROCESSING, dataset(random_images(240), 160),
                              LearnOptions(epochs=2, batch=16, seed=4, match_blocks=float(sys.argv[2])),
                              files=LearnerFiles(out / "state.safetensors"), device="cpu")
rank = os.environ["RANK"]
np.savez(out / f"{rank}.npz", **masks)
(out / f"{rank}.txt").write_text(
    f"{learning.steps} {learning.groups_changed} {learning.select_divergence_start} {learning.select_divergence_end}"
)
"""


@pytest.mark.slow
@pytest.mark.parametrize("share_of_blocks", ["0", "0.5"])
def test_two_processes_learn_the_same_masks(share_of_blocks: str, tmp_path: Path) -> None:
    """With the environment that torchrun sets; torchrun itself is run by the slow test of the command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": SUPPORT}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), share_of_blocks],
            env=common | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    errors = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    first, second = (dict(np.load(tmp_path / f"{rank}.npz")) for rank in (0, 1))
    assert same(first, second)
    figures, figures_of_other = ((tmp_path / f"{rank}.txt").read_text().split() for rank in (0, 1))
    assert figures == figures_of_other
    # Half the steps of one process: each has its own half of the images.
    steps, groups_changed, divergence_start, divergence_end = figures
    assert steps == "10"
    assert float(groups_changed) > 0
    assert float(divergence_end) < float(divergence_start)


def test_processes_get_disjoint_shares_of_the_images() -> None:
    digits = load_digits()
    options = LearnOptions(epochs=1, batch=64)

    def images_of(process: int, processes: int) -> list[bytes]:
        batches = training_batches(digits.train, PREPROCESSING, options, 0, process, processes)
        return [x.tobytes() for batch in batches for x in batch.images]

    parts = [images_of(rank, 3) for rank in range(3)]
    assert len({len(p) for p in parts}) == 1
    # The digits contain a few images twice.
    assert len(set(parts[0]) & set(parts[1])) < 5
    assert len([x for p in parts for x in p]) == len(digits.train) // 192 * 192


@pytest.mark.parametrize("first_step", [0, 3, 5, 7])
def test_batches_from_the_middle_are_those_of_a_whole_run(first_step: int, data: Dataset) -> None:
    options = LearnOptions(epochs=3, batch=24, augment="shift+flip", seed=2)
    whole = list(training_batches(data.train, PREPROCESSING, options))
    rest = list(training_batches(data.train, PREPROCESSING, options, first_step))
    assert len(rest) == len(whole) - first_step
    for a, b in zip(rest, whole[first_step:], strict=True):
        assert np.array_equal(a.images, b.images)
        assert np.array_equal(a.labels, b.labels)
        assert a.ends_epoch == b.ends_epoch
