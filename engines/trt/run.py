"""A TensorRT plan behind the Engine protocol: buffers and a stream in the primary context, GPU time by events."""

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
from maskplan.engines.trt.host import require_same_host
from maskplan.engines.trt.log import TrtLogCapture
from maskplan.engines.trt.record import differences
from maskplan.engines.trt.versions import construct, import_tensorrt
from maskplan.pipeline.core.artifacts import EngineFile, Profile, TensorSpec
from maskplan.pipeline.core.errors import HostError, InputError, PipelineError, listed
from maskplan.pipeline.core.files import read_bytes

_NUMPY_TYPES = {"float64", "float32", "float16", "int8", "uint8", "int32", "int64", "bool"}


@dataclass
class _Batch:
    """Device and page-locked host memory for one batch size, and the graph that runs it."""

    profile: int
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    sent: dict[str, npt.NDArray[Any]]
    received: dict[str, npt.NDArray[Any]]
    graph: Graph | None = None
    runs: int = 0


class TrtEngine:
    """A plan, deserialized after digest, TensorRT version and GPU were held against its sidecar.

    Args:
        engine: The sidecar's record; the caller has checked the digest.
        graphs: Replay CUDA graphs where cuda-python is installed.

    Raises:
        HostError: TensorRT or a GPU is not here, or memory does not suffice.
        InputError: The plan was built by another TensorRT or for another GPU, has no weights, takes or gives what NumPy
            cannot hold, is damaged, or is not what its sidecar describes.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __init__(self, engine: EngineFile, *, graphs: bool = True) -> None:
        _require_runnable(engine)
        require_same_host(engine)
        trt = import_tensorrt()
        self._record, self._graphs = engine, graphs
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self._heard = TrtLogCapture(trt)
        self._batches: dict[int, _Batch] = {}
        self._current: int | None = None
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self.spent: CallTiming | None = None
        self._cuda = Context()
        try:
            with self._cuda.active():
                self._load(trt)
        except BaseException:
            self.close()
            raise

    def _load(self, trt: Any) -> None:
        self._runtime = construct(trt.Runtime, self._heard)
        if self._record.version_compatible:
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(read_bytes(self._record.path))
        if self._engine is None:
            raise self._failed(
                InputError(
                    "TensorRT cannot load the plan",
                    where=self._record.path,
                    found=self._heard.why(),
                    fix="build it again on this host's GPU",
                )
            )
        # Raised here, where only the engine itself holds the plan: an error keeps alive what its frames hold.
        problems = differences(trt, self._engine, self._record)
        if problems:
            raise InputError(
                "the plan is not what its sidecar describes",
                where=self._record.path,
                found=listed(problems),
                fix="build it again, or import it with the ONNX file and profile that trtexec was given",
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise self._failed(
                HostError(
                    "TensorRT makes no context for the plan",
                    where=self._record.path,
                    found=self._heard.why(),
                    fix="see TensorRT's messages above, and nvidia-smi",
                )
            )

    def _failed(self, otherwise: PipelineError) -> PipelineError:
        """What to raise where TensorRT gave nothing."""
        if not self._heard.is_out_of_memory():
            return otherwise
        return HostError(
            "the GPU's memory does not suffice for the engine",
            where=self._record.path,
            found=self._heard.why(),
            fix="free the GPU, or build with smaller batches",
        )

    def infer(self, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run once, in the profile tuned closest to the batch; `spent` then says where the time went.

        Raises:
            InputError: The feeds are not what the plan takes, or the batch is outside every profile.
            HostError: The GPU fails.
        """
        started = time.perf_counter()
        batch = _batch_of(feeds, self.inputs, self._record.path)
        with self._cuda.active():
            memory = self._batches.get(batch) or self._allocate(batch)
            self._select(batch, memory)
            for name, array in feeds.items():
                np.copyto(memory.sent[name], array, casting="no")
            copied_in, ran, copied_out = self._run(memory)
            found = {name: array.copy() for name, array in memory.received.items()}
        self.spent = CallTiming(ran, copied_in, copied_out, 1000 * (time.perf_counter() - started))
        return found

    def _run(self, memory: _Batch) -> tuple[float, ...]:
        """Milliseconds of the copies in, the work and the copies out; the events are gone before the context is left."""
        marks = [self._cuda.mark()]
        for name, array in memory.sent.items():
            self._cuda.copy_in(memory.inputs[name], array)
        marks.append(self._cuda.mark())
        self._launch(memory)
        marks.append(self._cuda.mark())
        for name, array in memory.received.items():
            self._cuda.copy_out(array, memory.outputs[name])
        marks.append(self._cuda.mark())
        self._cuda.synchronize()
        return tuple(self._cuda.milliseconds(a, b) for a, b in pairwise(marks))

    def close(self) -> None:
        """Free the engine and its memory."""
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
                    fix="export a graph whose output shapes follow from the batch",
                )
        memory = _Batch(
            profile,
            inputs={s.name: self._cuda.allocate(_bytes((batch, *_rest(s)), s.dtype)) for s in self.inputs},
            outputs={s.name: self._cuda.allocate(_bytes(shapes[s.name], s.dtype)) for s in self.outputs},
            sent={s.name: self._cuda.pinned((batch, *_rest(s)), s.dtype) for s in self.inputs},
            received={s.name: self._cuda.pinned(shapes[s.name], s.dtype) for s in self.outputs},
        )
        self._batches[batch] = memory
        return memory

    def _select(self, batch: int, memory: _Batch) -> None:
        """Give the context this batch's shapes and addresses, unless it has them."""
        if self._current == batch:
            return
        self._set_shapes(batch, memory.profile)
        for name, address in (memory.inputs | memory.outputs).items():
            if not self._context.set_tensor_address(name, int(address)):
                raise HostError(
                    "TensorRT refuses an address",
                    where=f"{self._record.path}: {name}",
                    found=self._heard.why(),
                    fix="see TensorRT's messages above, and nvidia-smi",
                )
        self._current = batch

    def _set_shapes(self, batch: int, profile: int) -> None:
        try:
            self._context.set_optimization_profile_async(profile, self._cuda.stream_handle)
        except RuntimeError as error:  # the bindings never return False
            raise HostError(
                "TensorRT refuses to change the profile",
                where=self._record.path,
                found=f"{error} {self._heard.why()}",
                fix="see TensorRT's messages above, and nvidia-smi",
            ) from error
        self._current = None
        self._drop_graphs()
        for spec in self.inputs:
            shape = (batch, *_rest(spec))
            if not self._context.set_input_shape(spec.name, shape):
                raise InputError(
                    "TensorRT refuses a shape",
                    where=f"{self._record.path}: {spec.name}",
                    found=f"{shape}; {self._heard.why()}",
                    fix=f"the engine takes batches of {', '.join(map(str, self._record.profiles))}",
                )

    def _drop_graphs(self) -> None:
        """A graph is of the context as it was; after a change its launch is undefined."""
        for memory in self._batches.values():
            if memory.graph is not None:
                memory.graph.close()
            memory.graph, memory.runs = None, 0

    def _launch(self, memory: _Batch) -> None:
        """Run on the stream: the first time by layers, as TensorRT asks before a capture, then by a graph."""
        if self._graphs and memory.runs == 1:
            memory.graph = capture(self._cuda.stream_handle, self._enqueue)
        memory.runs += 1
        if memory.graph is not None and memory.graph.launch():
            return
        if not self._enqueue():
            raise HostError(
                "TensorRT cannot run the engine",
                where=self._record.path,
                found=self._heard.why(),
                fix="see TensorRT's messages above, and nvidia-smi",
            )

    def _enqueue(self) -> bool:
        return bool(self._context.execute_async_v3(self._cuda.stream_handle))


def _require_runnable(engine: EngineFile) -> None:
    if engine.strip_plan:
        raise InputError(
            "the plan has no weights",
            where=engine.path,
            found="a stripped plan",
            fix="refit it with the weights of its ONNX file, or build it without stripping",
        )
    unfit = [f"{s.name} {s.dtype}" for s in (*engine.inputs, *engine.outputs) if s.dtype not in _NUMPY_TYPES]
    if unfit:
        raise InputError(
            "NumPy has no such type",
            where=engine.path,
            found=listed(unfit),
            fix="export a graph whose inputs and outputs are float32 or float16; within it any type will do",
        )


def _batch_of(feeds: Arrays, inputs: tuple[TensorSpec, ...], where: Path) -> int:
    """The batch of feeds that are what the plan takes, which is the same in all of them.

    Raises:
        InputError: They are not; all that differs is told.
    """
    problems = [f"{name}, which is no input" for name in feeds if name not in {s.name for s in inputs}]
    for spec in inputs:
        array, rest = feeds.get(spec.name), _rest(spec)
        taken = f"{spec.dtype} (batch, {', '.join(map(str, rest))})"
        if array is None:
            problems.append(f"no {spec.name}, expected {taken}")
        elif array.dtype != spec.dtype or (array.ndim, *array.shape[1:]) != (1 + len(rest), *rest):
            problems.append(f"{spec.name} {array.dtype} {array.shape}, expected {taken}")
    batches = sorted({int(array.shape[0]) for array in feeds.values() if array.ndim})
    if len(batches) > 1:
        problems.append(f"batches of {' and '.join(map(str, batches))} in one call")
    if problems:
        raise InputError(
            "these are not the engine's inputs",
            where=where,
            found=listed(problems),
            fix="give one array for each input, all of one batch",
        )
    return batches[0]


def _closest(profiles: tuple[Profile, ...], batch: int) -> int:
    fitting = [i for i, p in enumerate(profiles) if p.min <= batch <= p.max]
    if not fitting:
        raise InputError(
            "the batch is outside every profile",
            found=f"{batch}; profiles {', '.join(map(str, profiles))}",
            fix="build with a --profile that holds it",
        )
    return min(fitting, key=lambda i: abs(profiles[i].opt - batch))


def _rest(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(d or 1 for d in spec.shape[1:])


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize
