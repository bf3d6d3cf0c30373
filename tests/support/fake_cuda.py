"""A stand-in for pycuda and cuda-python: memory on the host, and streams that do nothing until they are waited for.

So a result that is read before its stream was synchronized is stale here too, a copy without a current context fails, and
memory that is gone cannot be reached.
"""

from __future__ import annotations

import itertools
import sys
import types
import weakref
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
        refused: Calls that fail: of cuda-python `begin`, `end`, `instantiate`, `launch`; of pycuda `push`, `stream`,
            `event`, `record`, `elapsed`, `copy_in`, `copy_out`.
        misplaced: How many objects of TensorRT or pycuda were freed in another context than they were made in.
        alive: How many of them there are.
        bus_id: The GPU's address, as CUDA writes it.
        broken: Streams report an error.
        clock_ms: The GPU's time: an event takes one of it, and work what it adds here.
    """

    def __init__(self) -> None:
        self.name, self.capability, self.free_bytes = "Fake GPU", (8, 0), 1 << 30
        self.current: list[Context] = []
        self.retained = self.launches = self.graphs = self.captures = self.misplaced = self.alive = 0
        self.bus_id = "0000:C1:00.0"
        self.refused: set[str] = set()
        self.initialized = False
        self.broken = False
        self.memory: dict[int, np.ndarray[Any, Any]] = {}
        self.streams: weakref.WeakValueDictionary[int, Stream] = weakref.WeakValueDictionary()
        self.handles = itertools.count(1)
        self.clock_ms = 0.0
        self.addresses = itertools.count(1 << 20, 1 << 12)
        self.devices = 1

    def require_context(self) -> None:
        if not self.current:
            raise Error("no context is current")

    def heed(self, call: str) -> None:
        """Fail where it was told so."""
        if call in self.refused:
            raise Error(f"{call} failed: an illegal memory access was encountered")

    def place(self) -> int:
        """The context in which work happens now; 0 is the primary one, which is also that of who made none current."""
        return 0 if not self.current or self.current[-1].primary else id(self.current[-1])

    def at(self, address: int, nbytes: int) -> np.ndarray[Any, Any]:
        """Device memory as bytes."""
        memory = self.memory.get(address)
        if memory is None or memory.nbytes < nbytes:
            raise Error("an illegal memory access was encountered")
        return memory[:nbytes]


class Placed:
    """What belongs to the context that was current when it was made, and should be freed in it.

    pycuda would switch contexts to free it, where it can: not from another thread, and not when the context is gone.
    """

    def __init__(self, world: World) -> None:
        world.require_context()
        self._world, self._place = world, world.place()
        world.alive += 1

    def __del__(self) -> None:
        if hasattr(self, "_place"):
            self._world.alive -= 1
            self._world.misplaced += not self._world.current or self._world.place() != self._place


class Context:
    def __init__(self, world: World, *, primary: bool = False) -> None:
        self._world, self.primary = world, primary
        world.retained += 1

    def push(self) -> None:
        self._world.heed("push")
        self._world.current.append(self)

    def pop(self) -> None:
        assert self._world.current[-1] is self
        self._world.current.pop()

    def detach(self) -> None:
        """One that is not current is made so first; the release of a primary context does not undo that."""
        if not self._world.current or self._world.current[-1] is not self:
            self._world.current.append(self)
        if not self.primary:
            self._world.current.pop()
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

    def pci_bus_id(self) -> str:
        return self._world.bus_id

    def retain_primary_context(self) -> Context:
        return Context(self._world, primary=True)


class Stream(Placed):
    def __init__(self, world: World) -> None:
        world.heed("stream")
        super().__init__(world)
        self.handle = next(world.handles)
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


class Event(Placed):
    def __init__(self, world: World) -> None:
        world.heed("event")
        super().__init__(world)
        self._at: float | None = None
        self._stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        self._world.heed("record")
        self._stream = stream
        event = weakref.ref(self)

        def happen() -> None:
            """An event that is gone takes its time too."""
            found = event()
            if found is not None:
                found._at = found._world.clock_ms
            stream._world.clock_ms += 1

        stream.give(happen)

    def synchronize(self) -> None:
        assert self._stream is not None
        self._stream.synchronize()

    def time_since(self, other: Event) -> float:
        self._world.heed("elapsed")
        assert self._at is not None
        assert other._at is not None
        return self._at - other._at


class Allocation(Placed):
    def __init__(self, world: World, nbytes: int) -> None:
        if nbytes > world.free_bytes:
            raise OutOfMemoryError("cuMemAlloc failed: out of memory")
        super().__init__(world)
        self._address = next(world.addresses)
        world.free_bytes -= nbytes
        world.memory[self._address] = np.zeros(nbytes, np.uint8)

    def __int__(self) -> int:
        return self._address

    def __del__(self) -> None:
        super().__del__()
        if hasattr(self, "_address"):
            self._world.free_bytes += self._world.memory.pop(self._address).nbytes


def install(monkeypatch: pytest.MonkeyPatch, *, graphs: bool = True) -> World:
    """Put `pycuda.driver` (and `cuda.bindings.driver`) in place."""
    world = World()
    driver = types.ModuleType("pycuda.driver")

    def htod(dest: Allocation, src: np.ndarray[Any, Any], stream: Stream) -> None:
        world.heed("copy_in")
        world.require_context()
        raw = src.reshape(-1).view(np.uint8)  # read when the copy runs, not now
        stream.give(lambda: np.copyto(world.at(int(dest), raw.nbytes), raw))

    def dtoh(dest: np.ndarray[Any, Any], src: Allocation, stream: Stream) -> None:
        world.heed("copy_out")
        world.require_context()
        flat = dest.reshape(-1).view(np.uint8)
        stream.give(lambda: np.copyto(flat, world.at(int(src), flat.nbytes)))

    class CountedDevice(Device):
        def __init__(self, number: int) -> None:
            if not world.initialized:
                raise Error("cuDeviceGet failed: initialization error")
            assert number < world.devices
            super().__init__(world)

        @staticmethod
        def count() -> int:
            if not world.initialized:
                raise Error("cuDeviceGetCount failed: initialization error")
            return world.devices

    def init() -> None:
        world.initialized = True

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
