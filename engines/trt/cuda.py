"""The GPU through pycuda, in the device's primary context, which other libraries of the process share."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


def import_pycuda() -> Any:
    """The driver module of pycuda, initialized.

    Raises:
        HostError: It is not installed, or there is no driver or GPU.
    """
    try:
        import pycuda.driver as cuda
    except ModuleNotFoundError as error:
        raise HostError(
            "pycuda is not installed",
            found=str(error),
            fix="on a GPU host with a CUDA toolkit: pip install 'maskplan[tensorrt]'",
        ) from error
    except Exception as error:  # the driver's library is missing, or of another version than pycuda was built for
        raise _no_gpu(error) from error
    try:
        cuda.init()
        if cuda.Device.count() == 0:
            raise RuntimeError("no CUDA device")
    except Exception as error:  # pycuda's errors are of classes that exist only where it loads
        raise _no_gpu(error) from error
    return cuda


def gpu() -> Gpu:
    """The GPU that engines are built and run on.

    Raises:
        HostError: There is none.
    """
    device = import_pycuda().Device(DEVICE)
    return Gpu(str(device.name()), "{}.{}".format(*device.compute_capability()), int(device.total_memory()))


def pci_bus_id() -> str:
    """Where that GPU sits, as in 0000:19:00.0; nvidia-smi numbers GPUs otherwise than CUDA does.

    Raises:
        HostError: There is none.
    """
    return str(import_pycuda().Device(DEVICE).pci_bus_id())


class Context:
    """The primary context of the GPU, with one stream of its own; current only within `active`.

    The primary context stays with the process. To give it back, pycuda would make it current, and it would stay so in place
    of another library's.

    Raises:
        HostError: There is no GPU, or it has no memory left for a context.
    """

    def __init__(self) -> None:
        self._cuda = import_pycuda()
        self._context = self._told(_primary_context, self._cuda)
        with self.active():
            self.stream = self._told(self._cuda.Stream)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make the context the thread's current one; what was current before is so again afterwards."""
        self._told(self._context.push)
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
        """Host to device, on the stream.

        Raises:
            HostError: The GPU reports an error.
        """
        self._told(self._cuda.memcpy_htod_async, memory, array, self.stream)

    def copy_out(self, array: npt.NDArray[Any], memory: Any) -> None:
        """Device to host, on the stream.

        Raises:
            HostError: The GPU reports an error.
        """
        self._told(self._cuda.memcpy_dtoh_async, array, memory, self.stream)

    def mark(self) -> Any:
        """An event on the stream.

        Raises:
            HostError: The GPU reports an error.
        """
        event = self._told(self._cuda.Event)
        self._told(event.record, self.stream)
        return event

    def milliseconds(self, first: Any, second: Any) -> float:
        """GPU time between two marks, once both are through.

        Raises:
            HostError: The GPU reports an error.
        """
        self._told(second.synchronize)
        return float(self._told(second.time_since, first))

    def synchronize(self) -> None:
        """Wait for the stream.

        Raises:
            HostError: The GPU reports an error.
        """
        self._told(self.stream.synchronize)

    def close(self) -> None:
        """Free the stream; the context cannot be used afterwards."""
        with self.active():
            self.stream = None

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


@functools.cache
def _primary_context(cuda: Any) -> Any:
    """Retained once for the process, by the loaded driver module."""
    context = cuda.Device(DEVICE).retain_primary_context()
    # One reference too many: pycuda's destructor would destroy the context rather than release it. It ends with the process.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(context))
    return context


def _no_gpu(error: Exception) -> HostError:
    return HostError(
        "no GPU can be used",
        found=f"{type(error).__name__}: {error}",
        fix="check that nvidia-smi sees the GPU here, and that pycuda was built for this driver's CUDA",
    )
