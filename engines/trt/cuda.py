"""GPU access through pycuda, in the device's primary context, which other libraries in the process share."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.errors import HostError

DEVICE = 0


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, compute capability ("9.0") and memory."""

    name: str
    compute_capability: str
    memory_bytes: int


def has_driver() -> bool:
    """Whether this host has an NVIDIA driver; the second path exists under the Windows Subsystem for Linux."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/dxg").exists()


def import_pycuda() -> Any:
    """The driver module of pycuda, initialized.

    Raises:
        HostError: pycuda is not installed, or there is no driver or GPU.
    """
    try:
        import pycuda.driver as cuda
    except ModuleNotFoundError as error:
        raise HostError(
            "pycuda is not installed",
            found=str(error),
            fix="on a GPU host with a CUDA toolkit: pip install 'maskplan[tensorrt]'",
        ) from error
    except Exception as error:  # the driver's library is missing, or pycuda was built for another version
        raise _no_gpu(error) from error
    try:
        cuda.init()
        if cuda.Device.count() == 0:
            raise RuntimeError("no CUDA device")
    except Exception as error:  # pycuda's exception classes exist only if it can be imported
        raise _no_gpu(error) from error
    return cuda


def gpu() -> Gpu:
    """The GPU on which engines are built and run.

    Raises:
        HostError: There is no GPU.
    """
    device = import_pycuda().Device(DEVICE)
    return Gpu(str(device.name()), "{}.{}".format(*device.compute_capability()), int(device.total_memory()))


def pci_bus_id() -> str:
    """That GPU's PCI bus id, such as 0000:19:00.0; nvidia-smi and CUDA number GPUs differently.

    Raises:
        HostError: There is no GPU.
    """
    return str(import_pycuda().Device(DEVICE).pci_bus_id())


class Context:
    """The GPU's primary context with its own stream; current only within `active`.

    The primary context is retained until the process ends: to release it, pycuda would make it current and leave it so,
    in place of another library's context.

    Raises:
        HostError: There is no GPU, or too little memory for a context.
    """

    def __init__(self) -> None:
        self._cuda = import_pycuda()
        self._context = self._checked(_primary_context, self._cuda)
        with self.active():
            self.stream = self._checked(self._cuda.Stream)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this the thread's current context; restore the previous one afterwards."""
        self._checked(self._context.push)
        try:
            yield
        finally:
            self._context.pop()

    @property
    def stream_handle(self) -> int:
        """The stream's handle, for TensorRT."""
        return int(self.stream.handle)

    def allocate(self, size_bytes: int) -> Any:
        """Allocate device memory; it is freed with the object. `int(object)` is its address.

        Raises:
            HostError: Out of memory.
        """
        return self._checked(self._cuda.mem_alloc, max(size_bytes, 1))

    def pinned(self, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
        """Allocate page-locked host memory, which copies do not have to stage."""
        array: npt.NDArray[Any] = self._checked(self._cuda.pagelocked_empty, shape, np.dtype(dtype))
        return array

    def copy_in(self, memory: Any, array: npt.NDArray[Any]) -> None:
        """Copy from host to device on the stream.

        Raises:
            HostError: The GPU reports an error.
        """
        self._checked(self._cuda.memcpy_htod_async, memory, array, self.stream)

    def copy_out(self, array: npt.NDArray[Any], memory: Any) -> None:
        """Copy from device to host on the stream.

        Raises:
            HostError: The GPU reports an error.
        """
        self._checked(self._cuda.memcpy_dtoh_async, array, memory, self.stream)

    def record_event(self) -> Any:
        """Record an event on the stream.

        Raises:
            HostError: The GPU reports an error.
        """
        event = self._checked(self._cuda.Event)
        self._checked(event.record, self.stream)
        return event

    def elapsed_ms(self, first: Any, second: Any) -> float:
        """Wait for two events and return the GPU time between them in milliseconds.

        Raises:
            HostError: The GPU reports an error.
        """
        self._checked(second.synchronize)
        return float(self._checked(second.time_since, first))

    def synchronize(self) -> None:
        """Wait for the stream.

        Raises:
            HostError: The GPU reports an error.
        """
        self._checked(self.stream.synchronize)

    def close(self) -> None:
        """Release the stream; the object cannot be used afterwards."""
        with self.active():
            self.stream = None

    def _checked(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of pycuda and turn its errors into HostError."""
        try:
            return work(*arguments)
        except self._cuda.MemoryError as error:
            raise HostError(
                "insufficient GPU memory",
                found=str(error),
                fix="free GPU memory (nvidia-smi lists the processes), or reduce the batch sizes",
            ) from error
        except self._cuda.Error as error:
            raise HostError("the GPU reported an error", found=str(error), fix="see nvidia-smi and dmesg") from error


@functools.cache
def _primary_context(cuda: Any) -> Any:
    """Retain the primary context once per process (cached by driver module)."""
    context = cuda.Device(DEVICE).retain_primary_context()
    # An extra reference, never dropped: pycuda's destructor would destroy the context instead of releasing it.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(context))
    return context


def _no_gpu(error: Exception) -> HostError:
    return HostError(
        "no usable GPU",
        found=f"{type(error).__name__}: {error}",
        fix="check that nvidia-smi lists the GPU, and that pycuda was built for this driver's CUDA version",
    )
