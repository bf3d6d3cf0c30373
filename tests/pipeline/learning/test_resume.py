"""Learning that is broken off and gone on with ends with the same masks, to the bit; and several processes agree."""

from __future__ import annotations

import csv
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.errors import HostError, InputError
from maskplan.pipeline.core.interrupts import INTERRUPTS, handle_signals
from maskplan.pipeline.data.dataset import Dataset
from maskplan.pipeline.data.digits import PREPROCESSING, load_digits
from maskplan.pipeline.learning import trainer
from maskplan.pipeline.learning.masked_net import Masks
from maskplan.pipeline.learning.options import LearnOptions
from maskplan.pipeline.learning.schedule import training_batches
from maskplan.pipeline.learning.state import load_state
from maskplan.pipeline.learning.trainer import LearnerFiles, learn_masks
from maskplan.pipeline.masking.magnitude import magnitude_mask
from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint

TWO_FOUR = Pattern(2, 4)
QUICK = LearnOptions(epochs=3, batch=256, ema=0.9, augment="shift", save_every=2, seed=4)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return open_checkpoint(ModelOptions("digits_resnet"))[0]


@pytest.fixture(scope="module")
def start(net: nn.Module) -> Masks:
    names = [n for n, p in net.named_parameters() if p.ndim == 4 and p.shape[1] % 4 == 0]
    return {n: magnitude_mask(net.state_dict()[n].numpy(), TWO_FOUR) for n in names}


def learn(net: nn.Module, start: Masks, state: Path | None = None, **options: object) -> Masks:
    chosen = dataclasses.replace(QUICK, **options)  # type: ignore[arg-type]
    files = LearnerFiles(state, log_dir=state.parent if state else None)
    return learn_masks(net, start, TWO_FOUR, PREPROCESSING, load_digits(), chosen, files=files, device="cpu")[0]


def same(a: Masks, b: Masks) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(net: nn.Module, start: Masks) -> Masks:
    return learn(net, start)


class BrokenError(RuntimeError):
    """What ends a run in these tests."""


def broken_after(steps: int, monkeypatch: pytest.MonkeyPatch, error: Callable[[], None]) -> None:
    """Let the images of learning end with an error once so many steps were asked for, by whichever process."""
    left = [steps]

    def limited(*arguments: object, **named: object) -> Iterator[object]:
        for batch in training_batches(*arguments, **named):  # type: ignore[arg-type]
            if left[0] == 0:
                error()
            left[0] -= 1
            yield batch

    monkeypatch.setattr(trainer, "training_batches", limited)


def fail() -> None:
    raise BrokenError


@pytest.mark.parametrize("steps", [1, 2, 5, 8, 9, 13])
def test_a_run_that_was_broken_off_ends_with_the_same_masks(
    steps: int, net: nn.Module, start: Masks, whole: Masks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "learning.safetensors"
    with monkeypatch.context() as patch:
        broken_after(steps, patch, fail)
        with pytest.raises(BrokenError):
            learn(net, start, state)
    assert state.exists() == (steps >= 2)
    assert same(learn(net, start, state), whole)
    assert not same(whole, start)


def test_a_run_broken_off_again_and_again_gets_there(
    net: nn.Module, start: Masks, whole: Masks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "learning.safetensors"
    for _ in range(4):
        with monkeypatch.context() as patch:
            broken_after(3, patch, fail)
            with pytest.raises(BrokenError):
                learn(net, start, state)
    assert same(learn(net, start, state), whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves_it(
    number: int, net: nn.Module, start: Masks, whole: Masks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a checkpoint every so many steps, what is there is what the signal had saved."""
    state = tmp_path / "learning.safetensors"
    with monkeypatch.context() as patch, handle_signals():
        # The batch after the signal is still taken.
        broken_after(6, patch, lambda: os.kill(os.getpid(), number))
        with pytest.raises(KeyboardInterrupt):
            learn(net, start, state, save_every=0)
        assert INTERRUPTS.pending == number
    key = trainer.state_key(QUICK, trainer.tensors_sha256(net.state_dict()), start, ())
    stored = load_state(state, key)
    assert stored is not None
    assert stored.progress.steps == 7
    with handle_signals():
        assert same(learn(net, start, state, save_every=0), whole)


def test_how_often_it_is_saved_does_not_matter(net: nn.Module, start: Masks, whole: Masks, tmp_path: Path) -> None:
    assert same(learn(net, start, tmp_path / "s.safetensors", save_every=3), whole)


@pytest.mark.parametrize("change", [{"seed": 5}, {"lr": 0.2}, {"epochs": 2}])
def test_a_checkpoint_of_another_question_is_not_gone_on_from(
    change: dict[str, object], net: nn.Module, start: Masks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "learning.safetensors"
    learn(net, start, state)
    expected = learn(net, start, **change)
    assert same(learn(net, start, state, **change), expected)
    assert "learning starts anew" in caplog.text


def test_a_damaged_checkpoint_is_told(net: nn.Module, start: Masks, tmp_path: Path) -> None:
    state = tmp_path / "learning.safetensors"
    learn(net, start, state)
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read"):
        learn(net, start, state)


def test_a_full_disk_keeps_the_last_good_checkpoint(
    net: nn.Module, start: Masks, whole: Masks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder takes no more files after the second checkpoint."""
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
            learn(net, start, state)
    assert [p.name for p in folder.iterdir() if p.name != "learning.csv"] == ["learning.safetensors"]
    assert same(learn(net, start, state), whole)


def test_metrics_are_logged_by_epoch(net: nn.Module, start: Masks, tmp_path: Path) -> None:
    learn(net, start, tmp_path / "learning.safetensors")
    with (tmp_path / "learning.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows if r["select_top1"]] == [5, 10, 15]
    last = rows[-1]
    assert 0 <= float(last["entropy"]) <= 1
    assert 0 < float(last["moved"]) < 1
    assert float(last["tau"]) == pytest.approx(QUICK.tau_end)
    assert float(last["lr"]) == pytest.approx(QUICK.lr / 100)


def test_learning_stops_when_nothing_is_gained(net: nn.Module, start: Masks) -> None:
    """At a rate of next to nothing no epoch is better than the start."""
    data = load_digits()
    options = dataclasses.replace(QUICK, epochs=30, lr=1e-12, ema=0.0, patience=2)
    masks, took = learn_masks(net, start, TWO_FOUR, PREPROCESSING, data, options, device="cpu")
    assert took.epochs == 2
    assert same(masks, start)


WORKER = """
import os
import sys
from pathlib import Path

import numpy as np
import torch

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.data.digits import PREPROCESSING, load_digits
from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
from maskplan.pipeline.learning.options import LearnOptions
from maskplan.pipeline.learning.trainer import LearnerFiles, learn_masks
from maskplan.pipeline.masking.magnitude import magnitude_mask

torch.set_num_threads(1)
net, _ = open_checkpoint(ModelOptions("digits_resnet"))
names = [n for n, p in net.named_parameters() if p.ndim == 4 and p.shape[1] % 4 == 0]
start = {n: magnitude_mask(net.state_dict()[n].numpy(), Pattern(2, 4)) for n in names}
options = LearnOptions(epochs=2, batch=128, seed=4)
out = Path(sys.argv[1])
masks, took = learn_masks(net, start, Pattern(2, 4), PREPROCESSING, load_digits(), options,
                          files=LearnerFiles(out / "state.safetensors"), device="cpu")
rank = os.environ["RANK"]
np.savez(out / f"{rank}.npz", **masks)
(out / f"{rank}.txt").write_text(f"{took.steps} {took.select_divergence_start} {took.select_divergence_end}")
"""


def test_two_processes_learn_the_same_masks(start: Masks, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "worker.py"), str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    first, second = (dict(np.load(tmp_path / f"{rank}.npz")) for rank in (0, 1))
    assert same(first, second)
    assert not same(first, start)
    told, told_by_other = ((tmp_path / f"{rank}.txt").read_text().split() for rank in (0, 1))
    assert told == told_by_other
    # Half the steps of one process: each has its own half of the images.
    steps, divergence_start, divergence_end = told
    assert steps == "10"
    assert float(divergence_end) < float(divergence_start)


def test_processes_share_the_images_and_no_two_get_the_same(net: nn.Module) -> None:
    data: Dataset = load_digits()
    options = LearnOptions(epochs=1, batch=64)

    def seen(process: int, processes: int) -> list[bytes]:
        batches = training_batches(data.train, PREPROCESSING, options, 0, process, processes)
        return [x.tobytes() for batch in batches for x in batch.images]

    parts = [seen(rank, 3) for rank in range(3)]
    assert len({len(p) for p in parts}) == 1
    # The digits hold a few images twice.
    assert len(set(parts[0]) & set(parts[1])) < 5
    assert len([x for p in parts for x in p]) == len(data.train) // 192 * 192


@pytest.mark.parametrize("start_at", [0, 3, 5, 7])
def test_batches_from_the_middle_are_those_of_a_whole_run(start_at: int) -> None:
    data, options = load_digits(), LearnOptions(epochs=3, batch=256, augment="shift+flip", seed=2)
    whole = list(training_batches(data.train, PREPROCESSING, options))
    rest = list(training_batches(data.train, PREPROCESSING, options, start_at))
    assert len(rest) == len(whole) - start_at
    for a, b in zip(rest, whole[start_at:], strict=True):
        assert np.array_equal(a.images, b.images)
        assert np.array_equal(a.labels, b.labels)
        assert a.ends_epoch == b.ends_epoch
    assert torch.is_tensor(torch.from_numpy(whole[0].images))
