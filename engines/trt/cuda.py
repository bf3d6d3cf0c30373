"""The GPU through pycuda, in the device's primary context, which other libraries of the process share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import HostError

DEVICE = 0


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, compute capability ("9.0") and memory."""

    name: str
    compute_capability: str
    memory_bytes: int


def import_pycuda() -> Any:
    """The driver module of pycuda, initialised.

    Raises:
        HostError: It is not installed, or there is no driver or GPU.
    """
    try:
        import pycuda.driver as cuda

        cuda.init()
        if cuda.Device.count() == 0:
            raise RuntimeError("no CUDA device")
    except Exception as error:  # pycuda's errors are of classes that exist only where it loads
        raise HostError(
            "no GPU can be used",
            found=f"{type(error).__name__}: {error}",
            fix="on a GPU host: pip install 'maskplan[tensorrt]', and check that nvidia-smi sees the GPU",
        ) from error
    return cuda


def gpu() -> Gpu:
    """The GPU that engines are built and run on.

    Raises:
        HostError: There is none.
    """
    device = import_pycuda().Device(DEVICE)
    return Gpu(str(device.name()), "{}.{}".format(*device.compute_capability()), int(device.total_memory()))


class Context:
    """The primary context of the GPU, with one stream; current only within `active`.

    Raises:
        HostError: There is no GPU, or it has no memory left for a context.
    """

    def __init__(self) -> None:
        self._cuda = import_pycuda()
        self._context = self._told(self._cuda.Device(DEVICE).retain_primary_context)
        with self.active():
            self.stream = self._told(self._cuda.Stream)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make the context the thread's current one; what was current before is so again afterwards."""
        self._context.push()
        try:
            yield
        finally:
            self._context.pop()

    @property
    def stream_handle(self) -> int:
        """For TensorRT."""
        return int(self.stream.handle)

    def allocate(self, size_bytes: int) -> Any:
        """Device memory; it lives as long as the object, whose integer is its address.

        Raises:
            HostError: There is not enough.
        """
        return self._told(self._cuda.mem_alloc, max(size_bytes, 1))

    def pinned(self, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
        """Host memory that copies need not stage."""
        array: npt.NDArray[Any] = self._told(self._cuda.pagelocked_empty, shape, np.dtype(dtype))
        return array

    def copy_in(self, memory: Any, array: npt.NDArray[Any]) -> None:
        """Host to device, on the stream."""
        self._cuda.memcpy_htod_async(memory, array, self.stream)

    def copy_out(self, array: npt.NDArray[Any], memory: Any) -> None:
        """Device to host, on the stream."""
        self._cuda.memcpy_dtoh_async(array, memory, self.stream)

    def mark(self) -> Any:
        """An event on the stream."""
        event = self._cuda.Event()
        event.record(self.stream)
        return event

    def synchronise(self) -> None:
        """Wait for the stream.

        Raises:
            HostError: The GPU reports an error.
        """
        self._told(self.stream.synchronize)

    def close(self) -> None:
        """Give the context back; others of the process may go on with it."""
        self._context.detach()

    def _told(self, work: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return work(*arguments)
        except self._cuda.MemoryError as error:
            raise HostError(
                "the GPU's memory does not suffice",
                found=str(error),
                fix="free the GPU (nvidia-smi lists who uses it), or give smaller batches",
            ) from error
        except self._cuda.Error as error:
            raise HostError("the GPU reports an error", found=str(error), fix="see nvidia-smi and dmesg") from error


def milliseconds(first: Any, second: Any) -> float:
    """GPU time between two events of one stream, once both are through."""
    second.synchronize()
    return float(second.time_since(first))
