"""Run a plan behind the Engine protocol: buffers and stream in the primary context, GPU time from events."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maskplan.engines.base import Arrays, CallTiming
from maskplan.engines.trt.cuda import Context
from maskplan.engines.trt.graph import Graph, capture
from maskplan.engines.trt.host import require_compatible_host
from maskplan.engines.trt.log_capture import TrtLogCapture
from maskplan.engines.trt.record import plan_mismatches
from maskplan.engines.trt.versions import LIBRARIES, construct, import_library
from maskplan.pipeline.core.artifacts import EngineFile, Profile, TensorSpec
from maskplan.pipeline.core.errors import HostError, InputError, PipelineError, listed
from maskplan.pipeline.core.files import read_bytes

_NUMPY_TYPES = {"float64", "float32", "float16", "int8", "uint8", "int32", "int64", "bool"}


@dataclass
class _Batch:
    """Device and page-locked host buffers for one batch size, and its CUDA graph."""

    profile: int
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    host_inputs: dict[str, npt.NDArray[Any]]
    host_outputs: dict[str, npt.NDArray[Any]]
    graph: Graph | None = None
    runs: int = 0


class TrtEngine:
    """A plan, deserialized after its library's version and its GPU were compared with this host.

    Args:
        engine: The record in the sidecar; the caller has verified the digest.
        graphs: Use CUDA graphs if cuda-python is installed.

    Raises:
        HostError: The library is not installed, there is no GPU, or its memory is insufficient.
        InputError: The plan was built with another version or for another GPU, has no weights, has tensors
            unsupported by NumPy, is damaged, or does not match its sidecar.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __init__(self, engine: EngineFile, *, graphs: bool = True) -> None:
        _require_runnable(engine)
        require_compatible_host(engine)
        trt = import_library(engine.backend)
        self._record, self._graphs = engine, graphs
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self._log_capture = TrtLogCapture(trt)
        self._library = LIBRARIES[engine.backend]
        self._batches: dict[int, _Batch] = {}
        self._current: int | None = None
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self.last_timing: CallTiming | None = None
        self._cuda = Context()
        try:
            with self._cuda.active():
                self._load(trt)
        except BaseException:
            self.close()
            raise

    def _load(self, trt: Any) -> None:
        self._runtime = construct(trt.Runtime, self._log_capture)
        if self._record.version_compatible:
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(read_bytes(self._record.path))
        if self._engine is None:
            raise self._failed(
                InputError(
                    f"{self._library.name} cannot load the plan",
                    where=self._record.path,
                    found=self._log_capture.reason(),
                    fix="rebuild it on this host's GPU",
                )
            )
        # Raised here, where only `self` refers to the plan: an error keeps the locals of its frames alive.
        problems = plan_mismatches(trt, self._engine, self._record)
        if problems:
            raise InputError(
                "the plan does not match its sidecar",
                where=self._record.path,
                found=listed(problems),
                fix="rebuild it, or import it with the ONNX file and profile of the trtexec build",
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise self._failed(
                HostError(
                    f"{self._library.name} failed to create an execution context for the plan",
                    where=self._record.path,
                    found=self._log_capture.reason(),
                    fix="see nvidia-smi",
                )
            )

    def _failed(self, otherwise: PipelineError) -> PipelineError:
        """The error to raise when TensorRT returned nothing: out of memory, or `otherwise`."""
        if not self._log_capture.is_out_of_memory():
            return otherwise
        return HostError(
            "insufficient GPU memory for the engine",
            where=self._record.path,
            found=self._log_capture.reason(),
            fix="free GPU memory, or rebuild with smaller batches",
        )

    def infer(self, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run once, in the profile tuned closest to the batch; sets `last_timing`.

        Raises:
            InputError: The feeds do not match the plan's inputs, or no profile contains the batch.
            HostError: The GPU reports an error.
        """
        started = time.perf_counter()
        batch = _batch_of(feeds, self.inputs, self._record.path)
        with self._cuda.active():
            memory = self._batches.get(batch) or self._allocate(batch)
            self._select(batch, memory)
            for name, array in feeds.items():
                np.copyto(memory.host_inputs[name], array, casting="no")
            copied_in, ran, copied_out = self._run(memory)
            outputs = {name: array.copy() for name, array in memory.host_outputs.items()}
        self.last_timing = CallTiming(ran, copied_in, copied_out, 1000 * (time.perf_counter() - started))
        return outputs

    def _run(self, memory: _Batch) -> tuple[float, ...]:
        """Copy in, launch, copy out; returns their durations in ms. The events are freed while the context is current."""
        events = [self._cuda.record_event()]
        for name, array in memory.host_inputs.items():
            self._cuda.copy_in(memory.inputs[name], array)
        events.append(self._cuda.record_event())
        self._launch(memory)
        events.append(self._cuda.record_event())
        for name, array in memory.host_outputs.items():
            self._cuda.copy_out(array, memory.outputs[name])
        events.append(self._cuda.record_event())
        self._cuda.synchronize()
        return tuple(self._cuda.elapsed_ms(a, b) for a, b in pairwise(events))

    def close(self) -> None:
        """Release the engine and its memory."""
        with self._cuda.active():
            self._drop_graphs()
            self._batches.clear()
            self._context = None
            self._engine = None
            self._runtime = None
        self._cuda.close()

    def _allocate(self, batch: int) -> _Batch:
        profile = _closest(self._record.profiles, batch)
        self._set_shapes(batch, profile)
        shapes = {}
        for spec in self.outputs:
            shapes[spec.name] = tuple(self._context.get_tensor_shape(spec.name))
            if any(d < 0 for d in shapes[spec.name]):
                raise InputError(
                    "an output's shape depends on the data",
                    where=f"{self._record.path}: {spec.name}",
                    found=shapes[spec.name],
                    fix="export a graph whose output shapes depend only on the batch",
                )
        memory = _Batch(
            profile,
            inputs={s.name: self._cuda.allocate(_bytes((batch, *_rest(s)), s.dtype)) for s in self.inputs},
            outputs={s.name: self._cuda.allocate(_bytes(shapes[s.name], s.dtype)) for s in self.outputs},
            host_inputs={s.name: self._cuda.pinned((batch, *_rest(s)), s.dtype) for s in self.inputs},
            host_outputs={s.name: self._cuda.pinned(shapes[s.name], s.dtype) for s in self.outputs},
        )
        self._batches[batch] = memory
        return memory

    def _select(self, batch: int, memory: _Batch) -> None:
        """Set this batch's shapes and addresses in the context, unless they are current."""
        if self._current == batch:
            return
        self._set_shapes(batch, memory.profile)
        for name, address in (memory.inputs | memory.outputs).items():
            if not self._context.set_tensor_address(name, int(address)):
                raise HostError(
                    f"{self._library.name} rejects a tensor address",
                    where=f"{self._record.path}: {name}",
                    found=self._log_capture.reason(),
                    fix="see nvidia-smi",
                )
        self._current = batch

    def _set_shapes(self, batch: int, profile: int) -> None:
        try:
            self._context.set_optimization_profile_async(profile, self._cuda.stream_handle)
        except RuntimeError as error:  # the bindings never return False
            raise HostError(
                f"{self._library.name} failed to change the profile",
                where=self._record.path,
                found=f"{error} {self._log_capture.reason()}",
                fix="see nvidia-smi",
            ) from error
        self._current = None
        self._drop_graphs()
        for spec in self.inputs:
            shape = (batch, *_rest(spec))
            if not self._context.set_input_shape(spec.name, shape):
                raise InputError(
                    f"{self._library.name} rejects an input shape",
                    where=f"{self._record.path}: {spec.name}",
                    found=f"{shape}; {self._log_capture.reason()}",
                    fix=f"the engine accepts batches of {', '.join(map(str, self._record.profiles))}",
                )

    def _drop_graphs(self) -> None:
        """Destroy captured graphs: launching one after the context has changed is undefined."""
        for memory in self._batches.values():
            if memory.graph is not None:
                memory.graph.close()
            memory.graph, memory.runs = None, 0

    def _launch(self, memory: _Batch) -> None:
        """Run on the stream: without a graph the first time, as TensorRT requires before a capture, then with one."""
        if self._graphs and memory.runs == 1:
            memory.graph = capture(self._cuda.stream_handle, self._enqueue)
        memory.runs += 1
        if memory.graph is not None and memory.graph.launch():
            return
        if not self._enqueue():
            raise HostError(
                f"{self._library.name} failed to run the engine",
                where=self._record.path,
                found=self._log_capture.reason(),
                fix="see nvidia-smi",
            )

    def _enqueue(self) -> bool:
        return bool(self._context.execute_async_v3(self._cuda.stream_handle))


def _require_runnable(engine: EngineFile) -> None:
    if engine.strip_plan:
        raise InputError(
            "the plan contains no weights",
            where=engine.path,
            found="a stripped plan",
            fix="refit it with the weights of its ONNX file, or build it without --strip",
        )
    unsupported = [f"{s.name} {s.dtype}" for s in (*engine.inputs, *engine.outputs) if s.dtype not in _NUMPY_TYPES]
    if unsupported:
        raise InputError(
            "NumPy does not support the type of an input or output",
            where=engine.path,
            found=listed(unsupported),
            fix="export a graph with float32 or float16 inputs and outputs; inner tensors may have any type",
        )


def _batch_of(feeds: Arrays, inputs: tuple[TensorSpec, ...], where: Path) -> int:
    """The batch size of the feeds.

    Raises:
        InputError: The feeds do not match the inputs, or differ in batch size; the message lists every difference.
    """
    problems = [f"{name}, which is not an input" for name in feeds if name not in {s.name for s in inputs}]
    for spec in inputs:
        array, rest = feeds.get(spec.name), _rest(spec)
        expected = f"{spec.dtype} (batch, {', '.join(map(str, rest))})"
        if array is None:
            problems.append(f"no {spec.name}, expected {expected}")
        elif array.dtype != spec.dtype or (array.ndim, *array.shape[1:]) != (1 + len(rest), *rest):
            problems.append(f"{spec.name} {array.dtype} {array.shape}, expected {expected}")
    batches = sorted({int(array.shape[0]) for array in feeds.values() if array.ndim})
    if len(batches) > 1:
        problems.append(f"batch sizes {' and '.join(map(str, batches))} in one call")
    if problems:
        raise InputError(
            "the feeds do not match the engine's inputs",
            where=where,
            found=listed(problems),
            fix="pass one array per input, all with the same batch size",
        )
    return batches[0]


def _closest(profiles: tuple[Profile, ...], batch: int) -> int:
    fitting = [i for i, p in enumerate(profiles) if p.min <= batch <= p.max]
    if not fitting:
        raise InputError(
            "no profile contains the batch size",
            found=f"{batch}; profiles {', '.join(map(str, profiles))}",
            fix="rebuild with a --profile that contains it",
        )
    return min(fitting, key=lambda i: abs(profiles[i].opt - batch))


def _rest(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(d or 1 for d in spec.shape[1:])


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize
