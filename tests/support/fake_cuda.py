"""A stand-in for pycuda and cuda-python: memory on the host, and streams that do nothing until they are waited for.

So a result that is read before its stream was synchronised is stale here too, a copy without a current context fails, and
memory that is gone cannot be reached.
"""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
import pytest

Work = Callable[[], None]


class Error(Exception):
    """As pycuda.driver.Error."""


class OutOfMemoryError(Error):
    """As pycuda.driver.MemoryError."""


class World:
    """The GPU and what goes on in it.

    Attributes:
        name: Of the GPU.
        capability: Its compute capability.
        free_bytes: Device memory left.
        current: Contexts that were pushed, the last one on top.
        retained: How often the primary context is held.
        launches: How many graphs were launched.
        graphs: How many there are to launch.
        captures: How many were captured and not yet destroyed.
        refused: Calls of cuda-python that fail: `begin`, `end`, `instantiate`, `launch`.
        misplaced: How many of TensorRT's objects were freed in another context than they were made in.
        broken: Streams report an error.
        clock_ms: The GPU's time: an event takes one of it, and work what it adds here.
    """

    def __init__(self) -> None:
        self.name, self.capability, self.free_bytes = "Fake GPU", (8, 0), 1 << 30
        self.current: list[Context] = []
        self.retained = self.launches = self.graphs = self.captures = self.misplaced = 0
        self.refused: set[str] = set()
        self.initialised = False
        self.broken = False
        self.memory: dict[int, np.ndarray[Any, Any]] = {}
        self.streams: dict[int, Stream] = {}
        self.clock_ms = 0.0
        self.addresses = itertools.count(1 << 20, 1 << 12)
        self.devices = 1

    def require_context(self) -> None:
        if not self.current:
            raise Error("no context is current")

    def place(self) -> int:
        """The context in which work happens now; 0 is the primary one, which is also that of who made none current."""
        return 0 if not self.current or self.current[-1].primary else id(self.current[-1])

    def at(self, address: int, nbytes: int) -> np.ndarray[Any, Any]:
        """Device memory as bytes."""
        memory = self.memory.get(address)
        if memory is None or memory.nbytes < nbytes:
            raise Error("an illegal memory access was encountered")
        return memory[:nbytes]


class Context:
    def __init__(self, world: World, *, primary: bool = False) -> None:
        self._world, self.primary = world, primary
        world.retained += 1

    def push(self) -> None:
        self._world.current.append(self)

    def pop(self) -> None:
        assert self._world.current[-1] is self
        self._world.current.pop()

    def detach(self) -> None:
        self._world.retained -= 1


class Device:
    def __init__(self, world: World) -> None:
        self._world = world

    def name(self) -> str:
        return self._world.name

    def compute_capability(self) -> tuple[int, int]:
        return self._world.capability

    def total_memory(self) -> int:
        return 1 << 30

    def retain_primary_context(self) -> Context:
        return Context(self._world, primary=True)


class Stream:
    def __init__(self, world: World) -> None:
        world.require_context()
        self._world, self.handle = world, len(world.streams) + 1
        world.streams[self.handle] = self
        self.waiting: list[Work] = []
        self.captured: list[Work] | None = None

    def give(self, work: Work) -> None:
        (self.waiting if self.captured is None else self.captured).append(work)

    def synchronize(self) -> None:
        if self._world.broken:
            raise Error("an illegal memory access was encountered")
        while self.waiting:
            self.waiting.pop(0)()


class Event:
    def __init__(self, world: World) -> None:
        self._world = world
        self._at: float | None = None
        self._stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        self._stream = stream
        stream.give(self._pass)

    def _pass(self) -> None:
        self._at = self._world.clock_ms
        self._world.clock_ms += 1

    def synchronize(self) -> None:
        assert self._stream is not None
        self._stream.synchronize()

    def time_since(self, other: Event) -> float:
        assert self._at is not None
        assert other._at is not None
        return self._at - other._at


class Allocation:
    def __init__(self, world: World, nbytes: int) -> None:
        self._world = world
        world.require_context()
        if nbytes > world.free_bytes:
            raise OutOfMemoryError("cuMemAlloc failed: out of memory")
        self._address = next(world.addresses)
        world.free_bytes -= nbytes
        world.memory[self._address] = np.zeros(nbytes, np.uint8)

    def __int__(self) -> int:
        return self._address

    def __del__(self) -> None:
        memory = self._world.memory.pop(self._address, None) if hasattr(self, "_address") else None
        self._world.free_bytes += 0 if memory is None else memory.nbytes


def install(monkeypatch: pytest.MonkeyPatch, *, graphs: bool = True) -> World:
    """Put `pycuda.driver` (and `cuda.bindings.driver`) in place."""
    world = World()
    driver = types.ModuleType("pycuda.driver")

    def htod(dest: Allocation, src: np.ndarray[Any, Any], stream: Stream) -> None:
        world.require_context()
        raw = src.reshape(-1).view(np.uint8)  # read when the copy runs, not now
        stream.give(lambda: np.copyto(world.at(int(dest), raw.nbytes), raw))

    def dtoh(dest: np.ndarray[Any, Any], src: Allocation, stream: Stream) -> None:
        world.require_context()
        flat = dest.reshape(-1).view(np.uint8)
        stream.give(lambda: np.copyto(flat, world.at(int(src), flat.nbytes)))

    class CountedDevice(Device):
        def __init__(self, number: int) -> None:
            if not world.initialised:
                raise Error("cuDeviceGet failed: initialization error")
            assert number < world.devices
            super().__init__(world)

        @staticmethod
        def count() -> int:
            if not world.initialised:
                raise Error("cuDeviceGetCount failed: initialization error")
            return world.devices

    def init() -> None:
        world.initialised = True

    members = {
        "init": init,
        "Device": CountedDevice,
        "Stream": lambda: Stream(world),
        "Event": lambda: Event(world),
        "mem_alloc": lambda nbytes: Allocation(world, nbytes),
        "pagelocked_empty": lambda shape, dtype: np.zeros(shape, dtype),
        "memcpy_htod_async": htod,
        "memcpy_dtoh_async": dtoh,
        "Error": Error,
        "MemoryError": OutOfMemoryError,
    }
    for name, value in members.items():
        setattr(driver, name, value)
    package = types.ModuleType("pycuda")
    package.driver = driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    bindings = types.ModuleType("cuda.bindings")
    if graphs:
        bindings.driver = _graphs(world)  # type: ignore[attr-defined]
    parent = types.ModuleType("cuda")
    parent.bindings = bindings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", parent)
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    return world


class _Result(Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1


class _Mode(Enum):
    CU_STREAM_CAPTURE_MODE_RELAXED = 2


def _graphs(world: World) -> types.ModuleType:
    def begin(stream: int, mode: _Mode) -> tuple[_Result]:
        assert isinstance(mode, _Mode)
        if "begin" in world.refused:
            return (_Result.CUDA_ERROR_INVALID_VALUE,)
        world.streams[stream].captured = []
        return (_Result.CUDA_SUCCESS,)

    def end(stream: int) -> tuple[_Result, list[Work] | None]:
        captured, world.streams[stream].captured = world.streams[stream].captured, None
        if "end" in world.refused:
            return _Result.CUDA_ERROR_INVALID_VALUE, None
        world.captures += 1
        return _Result.CUDA_SUCCESS, captured

    def drop(graph: list[Work]) -> tuple[_Result]:
        world.captures -= 1
        return (_Result.CUDA_SUCCESS,)

    def instantiate(graph: list[Work], flags: int) -> tuple[_Result, list[Work] | None]:
        if "instantiate" in world.refused:
            return _Result.CUDA_ERROR_INVALID_VALUE, None
        world.graphs += 1
        return _Result.CUDA_SUCCESS, graph

    def destroy(graph: list[Work]) -> tuple[_Result]:
        world.graphs -= 1
        return (_Result.CUDA_SUCCESS,)

    def launch(graph: list[Work], stream: int) -> tuple[_Result]:
        if "launch" in world.refused:
            return (_Result.CUDA_ERROR_INVALID_VALUE,)
        world.launches += 1
        for work in graph:
            world.streams[stream].give(work)
        return (_Result.CUDA_SUCCESS,)

    driver = types.ModuleType("cuda.bindings.driver")
    members = {
        "CUresult": _Result,
        "CUstreamCaptureMode": _Mode,
        "cuStreamBeginCapture": begin,
        "cuStreamEndCapture": end,
        "cuGraphInstantiate": instantiate,
        "cuGraphDestroy": drop,
        "cuGraphLaunch": launch,
        "cuGraphExecDestroy": destroy,
    }
    for name, value in members.items():
        setattr(driver, name, value)
    return driver
