"""Which clock compares engines: the GPU's if every engine has GPU times, else the host's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from maskplan.engines.base import Arrays, CallTiming, Classifier
from maskplan.pipeline.core.artifacts import Profile, TensorSpec
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.timing.compare_latency import time_engines
from maskplan.pipeline.timing.interleaved import GPU, HOST, TimeOptions, run_interleaved
from maskplan.pipeline.timing.three_way import time_three_way


class Clock:
    """Seconds that pass only while an engine runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class OnGpu:
    """An engine whose call takes one second on the host and `gpu_ms` on the GPU; None means no GPU times."""

    inputs = (TensorSpec("x", "float32", (None, 3, 4, 4)),)
    outputs = (TensorSpec("y", "float32", (None, 5)),)

    def __init__(self, clock: Clock, gpu_ms: float | None) -> None:
        self._clock, self._gpu_ms = clock, gpu_ms
        self.last_timing: CallTiming | None = None

    def infer(self, feeds: Arrays) -> dict[str, npt.NDArray[np.float32]]:
        self._clock.now += 1.0
        self.last_timing = None if self._gpu_ms is None else CallTiming(self._gpu_ms, 0.25, 0.5, 1000.0)
        return {"y": np.zeros((len(feeds["x"]), 5), np.float32)}

    def close(self) -> None: ...


ONCE = TimeOptions((2,), seconds=0.0, min_repeats=6)


@pytest.fixture(autouse=True)
def no_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def classifiers(clock: Clock, *gpu_ms: float | None, profiles: tuple[Profile, ...] = ()) -> list[Classifier]:
    return [Classifier(OnGpu(clock, ms), str(ms), profiles) for ms in gpu_ms]


def test_the_speedup_uses_gpu_times_if_every_engine_has_them() -> None:
    clock = Clock()
    dense, sparse, pruned = classifiers(clock, 6.0, 4.0, 5.0)
    (found,) = time_engines(dense, sparse, pruned, ONCE, same_file=True, clock=clock).batches
    assert (found.by, found.speedup, found.ratio_ci95) == (GPU, 1.5, (1.5, 1.5))
    assert found.build_spread == pytest.approx(0.25)
    # Latencies stay those of the host.
    assert (found.sparse.p50_ms, found.sparse.host_ms) == (1000.0, 1000.0)
    assert (found.sparse.gpu_ms, found.sparse.copies_ms) == (4.0, 0.75)


def test_one_engine_without_gpu_times_makes_all_use_the_host_clock() -> None:
    clock = Clock()
    dense, sparse = classifiers(clock, 6.0, None)
    (found,) = time_engines(dense, sparse, None, ONCE, clock=clock).batches
    assert (found.by, found.speedup) == (HOST, 1.0)
    assert (found.dense.gpu_ms, found.sparse.gpu_ms, found.sparse.copies_ms) == (6.0, None, None)


def test_the_times_of_a_split_batch_are_added() -> None:
    (engine,) = classifiers(Clock(), 3.0, profiles=(Profile(1, 1, 2),))
    engine.logits(np.zeros((5, 3, 4, 4), np.float32))
    assert engine.last_timing == CallTiming(9.0, 0.75, 1.5, 3000.0)


@pytest.mark.parametrize(("profile", "batch"), [(Profile(1, 1, 1), 2), (Profile(4, 8, 8), 2)])
def test_a_batch_that_needs_several_calls_is_not_timed(profile: Profile, batch: int) -> None:
    engines = classifiers(Clock(), 3.0, 4.0, profiles=(profile,))
    with pytest.raises(InputError, match=f"do not accept batches of {batch}") as caught:
        run_interleaved(engines, batch, ONCE, Clock())
    assert f"3.0 accepts {profile.min} to {profile.max}; 4.0 accepts" in str(caught.value).replace(", 4.0", "; 4.0")


def test_three_way_uses_gpu_times() -> None:
    clock = Clock()
    kinds = {"dense": (6.0, 6.0, 6.0), "pruned": (6.0, 6.0, 6.0), "sparse": (4.0, 4.0, 4.0)}
    (found,) = time_three_way({k: classifiers(clock, *ms) for k, ms in kinds.items()}, ONCE, clock)
    assert found.by == GPU
    assert found.p50_ms["sparse"] == pytest.approx((4.0, 4.0, 4.0))
    assert found.gain == pytest.approx(0.5)
    assert found.is_faster
