"""The part of the fake TensorRT that holds values and callbacks: profiles, caches, monitors, calibrators and errors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


def value_classes(version: str) -> tuple[Any, ...]:
    """New classes for each call, so that a test may patch them."""

    class IProgressMonitor:
        def __init__(self) -> None:
            self._made = True

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            pure_virtual("IProgressMonitor", "phase_start")

        def step_complete(self, phase_name: str, step: int) -> bool:
            pure_virtual("IProgressMonitor", "step_complete")
            return False

        def phase_finish(self, phase_name: str) -> None:
            pure_virtual("IProgressMonitor", "phase_finish")

    class IHostMemory:
        def __init__(self, data: bytes) -> None:
            self._data = data

        def __bytes__(self) -> bytes:
            return self._data

        @property
        def nbytes(self) -> int:
            return len(self._data)

    class ITimingCache:
        def __init__(self, data: bytes) -> None:
            self._lines = set(data.split(b"\n")) - {b""}

        def _is_ours(self) -> bool:
            return all(line.startswith(f"TensorRT {version} ".encode()) for line in self._lines)

        def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool:
            if not (ignore_mismatch or input_cache._is_ours()):
                return False
            self._lines |= input_cache._lines
            return True

        def serialize(self) -> IHostMemory:
            return IHostMemory(b"\n".join(sorted(self._lines)))

    class IOptimizationProfile:
        def __init__(self) -> None:
            self._shapes: dict[str, list[tuple[int, ...]]] = {}

        def set_shape(self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]) -> None:
            if any(not isinstance(size, int) for size in (*min, *opt, *max)):
                raise ValueError("cannot be converted to Dims")
            self._shapes[input] = [tuple(min), tuple(opt), tuple(max)]

        def _invalid(self) -> str:
            """What a configuration says of sizes that are not in order; `set_shape` itself takes them."""
            for name, (low, best, high) in self._shapes.items():
                if not all(a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
                    return (
                        "IOptimizationProfile::isValid: Error Code 4: API Usage Error (Invalid optimization profiles for"
                        f" input tensors {name}, please ensure that the optimization profiles satisfy MIN<=OPT<=MAX.)"
                    )
            return ""

    class IInt8EntropyCalibrator2:
        def __init__(self) -> None:
            self._made = True

        def get_batch_size(self) -> int:
            pure_virtual("IInt8EntropyCalibrator2", "get_batch_size")
            return 0

        def get_batch(self, names: list[str]) -> list[int] | None:
            pure_virtual("IInt8EntropyCalibrator2", "get_batch")
            return None

        def read_calibration_cache(self) -> bytes | None:
            pure_virtual("IInt8EntropyCalibrator2", "read_calibration_cache")
            return None

        def write_calibration_cache(self, cache: Any) -> None:
            pure_virtual("IInt8EntropyCalibrator2", "write_calibration_cache")

    class ParserError:
        def __init__(self, code: Any, desc: str, node: int = -1, node_name: str = "", node_operator: str = "") -> None:
            self._code, self._desc, self._node, self._name, self._operator = code, desc, node, node_name, node_operator

        def code(self) -> Any:
            return self._code

        def desc(self) -> str:
            return self._desc

        def node(self) -> int:
            return self._node

        def node_name(self) -> str:
            return self._name

        def node_operator(self) -> str:
            return self._operator

    return IProgressMonitor, IHostMemory, ITimingCache, IOptimizationProfile, IInt8EntropyCalibrator2, ParserError


def pure_virtual(cls: str, method: str) -> None:
    """What the bindings of 10.3 and 11.4 make of a method that a subclass did not override: a line, and no exception."""
    print(
        f'[ERROR] Exception caught in {method}(): Tried to call pure virtual function "{cls}::{method}"',
        file=sys.stderr,
    )


def made(value: Any, cls: type) -> Any:
    """An object whose own constructor called that of the class; the bindings insist on it."""
    assert isinstance(value, cls)
    if not hasattr(value, "_made"):
        raise TypeError(f"{cls.__name__}.__init__() must be called when overriding __init__")
    return value
