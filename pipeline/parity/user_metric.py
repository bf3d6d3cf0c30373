"""The user's own metric: a function in a Python file, called with outputs and targets, judged by a paired bootstrap."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.bootstrap import paired_interval, ratio_interval
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.output_reports import MetricParity
from maskplan.pipeline.core.user_code import create_module, execute, imports_from
from maskplan.pipeline.parity.by_output import OutputRows

Metric = Callable[[Mapping[str, Any], Mapping[str, Any]], Any]

# A metric of a set, such as mAP, is computed again for every resample; of a slow one there are fewer.
_RESAMPLES, _RESAMPLES_IF_SLOW, _SLOW_S = 1000, 100, 0.1
_FIX = "give --metric FILE.py:FUNCTION"


def load_metric(spec: str) -> Metric:
    """The function of `file.py:function`.

    It is called as `function(outputs, targets)`: outputs by name with one row for each sample (an array, or a list of arrays
    where sizes differ), targets likewise. It returns one number for each sample, whose mean is the metric, or one number for
    all. Higher is better.

    Raises:
        InputError: There is no such file or function, or it cannot be imported.
    """
    file, _, name = spec.rpartition(":")
    function = getattr(load_metric_module(spec), name, None)
    if not callable(function):
        raise InputError(f"no function {name!r} in the metric's file", where=file, fix=_FIX)
    found_metric: Metric = function
    return found_metric


def load_metric_module(spec: str) -> ModuleType:
    """Run the file of `file.py:function`, as `load_metric` does."""
    file, colon, _ = spec.rpartition(":")
    path = Path(file)
    if not colon or path.suffix != ".py":
        raise InputError("not a metric", found=repr(spec), fix=_FIX)
    if not path.is_file():
        raise InputError("the metric's file does not exist", where=path, fix=_FIX)
    module = create_module(path, f"maskplan_metric_{path.stem}")
    assert module is not None  # by its suffix
    try:
        with imports_from(path.parent):
            execute(module)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        found = f"{type(error).__name__}: {error}"
        raise InputError(
            "the metric's file cannot be imported", where=path, found=found, fix="run it by itself"
        ) from error
    return module


def measure(
    metric: Metric,
    name: str,
    dense: OutputRows,
    sparse: OutputRows,
    targets: Mapping[str, npt.NDArray[Any]],
    samples: int,
) -> MetricParity:
    """The metric of both models on the same samples, and the drop with its interval.

    Raises:
        InputError: The function fails, or returns no number.
    """

    def value(outputs: OutputRows, positions: npt.NDArray[np.int64], *, finite: bool = True) -> npt.NDArray[np.float64]:
        try:
            found = np.asarray(
                metric(outputs.stacked(positions), {n: a[positions] for n, a in targets.items()}), np.float64
            )
        except InputError:
            raise
        except Exception as error:  # the user's code may raise anything
            text = f"{type(error).__name__}: {error}"
            given = f"outputs ({', '.join(outputs.rows)}) and targets ({', '.join(targets) or 'none'})"
            fix = f"it is called with {given}, by name"
            raise InputError("the metric failed", where=name, found=text, fix=fix) from error
        if found.shape not in ((), (len(positions),)) or (finite and not np.isfinite(found).all()):
            fix = "return one finite number for each sample, or one for all"
            text = (
                f"shape {found.shape}"
                if np.isfinite(found).all()
                else f"{found.ravel()[~np.isfinite(found.ravel())][0]}"
            )
            raise InputError("the metric returned no numbers", where=name, found=text, fix=fix)
        return found

    everything = np.arange(samples)
    started = time.monotonic()
    first, second = value(dense, everything), value(sparse, everything)
    seconds = time.monotonic() - started
    if first.shape:
        interval = ratio_interval(first - second, np.ones(samples))
    else:
        resamples = _RESAMPLES if seconds < _SLOW_S else _RESAMPLES_IF_SLOW

        def difference(positions: npt.NDArray[np.int64]) -> float:
            # Of a resample without a class, say, a metric may be undefined: there is no interval then.
            return float(value(dense, positions, finite=False) - value(sparse, positions, finite=False))

        interval = paired_interval(difference, samples, resamples)
    a, b = math.fsum(first.ravel()) / first.size, math.fsum(second.ravel()) / second.size
    return MetricParity(name, samples, a, b, a - b, interval)
