"""Load on a server by perf_analyzer's conventions: windows, stability, failures."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.triton.serve_latency import LoadOptions, Window, is_stable, run_load

STEADY = Window((0.010,) * 100, 1.0)
QUICK = LoadOptions(window_s=0.02, max_windows=4)


@pytest.mark.parametrize(
    ("windows", "stable"),
    [
        ([STEADY] * 3, True),
        ([STEADY] * 2, False),
        ([Window((9.0,), 1.0)] * 5 + [STEADY] * 3, True),
        ([STEADY, STEADY, Window((0.0115,) * 100, 1.0)], True),
        ([STEADY, STEADY, Window((0.0125,) * 100, 1.0)], False),
        ([STEADY, STEADY, Window((0.010,) * 115, 1.0)], True),
        ([STEADY, STEADY, Window((0.010,) * 130, 1.0)], False),
        ([STEADY, STEADY, Window((0.010,) * 200, 2.0)], True),
        ([STEADY, STEADY, Window((), 1.0)], False),
        ([Window((), 1.0)] * 3, False),
    ],
)
def test_three_windows_within_a_tenth_of_their_mean_are_stable(windows: list[Window], stable: bool) -> None:
    assert is_stable(windows) is stable


def test_every_client_sends_its_next_request_after_the_response_to_the_last() -> None:
    flying: Counter[int] = Counter()
    lock, most = threading.Lock(), []

    def sender(number: int) -> None:
        with lock:
            flying[number] += 1
            most.append((flying[number], sum(flying.values())))
        time.sleep(0.002)
        with lock:
            flying[number] -= 1

    load = run_load([lambda n=n: sender(n) for n in range(3)], 8, QUICK)  # type: ignore[misc]
    assert max(own for own, _ in most) == 1
    assert max(total for _, total in most) == 3
    assert (load.batch, load.concurrency, load.failed) == (8, 3, 0)
    assert 2 <= load.p50_ms <= load.p99_ms
    # Eight images a request, at most three requests in two milliseconds.
    assert 0 < load.images_per_s <= 8 * 3 / 0.002


def test_requests_without_a_response_are_counted_and_not_timed() -> None:
    sent: list[int] = []

    def send() -> None:
        sent.append(1)
        if len(sent) % 2:
            raise InputError("the server refuses the request", found="503 not ready")
        time.sleep(0.001)

    load = run_load([send], 1, QUICK)
    assert load.failed == (len(sent) + 1) // 2
    assert load.first_failure == "the server refuses the request: 503 not ready"
    assert load.requests > 0


def test_a_server_that_refuses_everything_ends_the_measurement() -> None:
    def send() -> None:
        raise InputError("the server refuses the request", found="503")

    load = run_load([send] * 2, 1, LoadOptions(window_s=0.01, max_windows=3))
    assert (load.requests, load.stable, load.p99_ms, load.images_per_s) == (0, False, 0, 0)
    assert load.failed > 0


def test_a_slow_model_gets_longer_windows() -> None:
    load = run_load([lambda: time.sleep(0.05)], 1, LoadOptions(window_s=0.01, max_windows=3))
    assert load.requests >= 3
    assert load.p50_ms >= 50


def test_options_are_judged() -> None:
    for wrong in ({"batches": (0,)}, {"concurrency": (0,)}, {"window_s": 0}, {"max_windows": 2}):
        with pytest.raises(InputError):
            LoadOptions(**wrong)  # type: ignore[arg-type]
