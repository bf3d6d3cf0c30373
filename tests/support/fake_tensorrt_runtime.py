"""The part of the fake TensorRT that loads and runs plans: runtime, engine, execution context and inspector."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from fake_cuda import World

MAGIC = b"FAKEPLAN"


def runtime_classes(
    version: str,
    world: World,
    control: Any,
    global_logger: Callable[[Any], Any],
    fail: Callable[[Any, str], None],
    severities: Any,
    formats: Any,
    modes: Any,
    types_: Any,
) -> tuple[Any, Any, Any, Any]:
    """The classes of one version; `control` is a `fake_tensorrt.Control`, the last four are the version's enumerations."""

    class EngineInspector:
        def __init__(self, header: dict[str, Any]) -> None:
            self._header = header

        def get_engine_information(self, format: Any) -> str:
            assert format == formats["JSON"]
            layers = self._header["layers"]
            tensors = {"I/O Tensors": []} if version.startswith("11.") else {"Bindings": []}
            shown = layers if self._header["detailed"] else [layer["Name"] for layer in layers]
            return json.dumps({"Layers": shown} | tensors)

    class IExecutionContext:
        def __init__(self, engine: ICudaEngine) -> None:
            self._held = Owned(world)
            self._engine = engine
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._profile: int | None = None

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            if "select" in control.failures or profile_index >= len(self._engine._header["profiles"]):
                raise RuntimeError("Error in set optimization profile async.")
            self._profile, self._shapes = profile_index, {}
            return True

        def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
            assert self._profile is not None
            low, _, high = self._engine._header["profiles"][self._profile][name]
            if "input_shape" in control.failures or not all(
                a <= b <= c for a, b, c in zip(low, shape, high, strict=True)
            ):
                self._engine._logger.log(severities.ERROR, "IExecutionContext::setInputShape: Error Code 3")
                return False
            self._shapes[name] = tuple(shape)
            return True

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            graph = self._engine._model.graph
            # The batch is of the input that names it, or of the first.
            given = [(v.type.tensor_type.shape.dim, self._shapes[v.name]) for v in reversed(graph.input)]
            batches = {dims[0].dim_param: shape[0] for dims, shape in given if shape}
            value = next(o for o in graph.output if o.name == name)
            batch = batches.get(value.type.tensor_type.shape.dim[0].dim_param, next(reversed(batches.values())))
            return (batch, *(d.dim_value or -1 for d in value.type.tensor_type.shape.dim[1:]))

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self._addresses[name] = memory
            return "address" not in control.failures

        def execute_async_v3(self, stream_handle: int) -> bool:
            if "execute" in control.failures:
                self._engine._logger.log(severities.ERROR, "enqueueV3 failed")
                return False
            if "capture" in control.failures and world.streams[stream_handle].captured is not None:
                return False
            world.require_context()
            if world.place() != self._engine._held.place:
                self._engine._logger.log(severities.ERROR, "invalid resource handle")
                return False
            shapes, addresses = dict(self._shapes), dict(self._addresses)
            world.streams[stream_handle].give(lambda: self._engine._run(shapes, addresses))
            return True

    class ICudaEngine:
        def __init__(self, data: bytes, header: dict[str, Any], logger: Any) -> None:
            import onnxruntime

            self._header, self._logger, self._held = header, logger, Owned(world)
            self._model = onnx.load_from_string(data)
            self._session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

        def create_engine_inspector(self) -> EngineInspector | None:
            if "inspector" in control.failures:
                return None
            return EngineInspector(self._header)

        def create_execution_context(self) -> IExecutionContext | None:
            if "context" in control.failures:
                fail(self._logger, "createExecutionContext: out of memory")
                return None
            return IExecutionContext(self)

        @property
        def device_memory_size_v2(self) -> int:
            return 4096

        @property
        def num_io_tensors(self) -> int:
            return len(self._tensors())

        @property
        def num_optimization_profiles(self) -> int:
            return len(self._header["profiles"])

        def get_tensor_name(self, index: int) -> str:
            return list(self._tensors())[index]

        def get_tensor_mode(self, name: str) -> Any:
            return modes["INPUT" if name in self._header["inputs"] else "OUTPUT"]

        def get_tensor_dtype(self, name: str) -> Any:
            return _data_type(types_, self._tensors()[name])

        def _tensors(self) -> dict[str, int]:
            return {v.name: v.type.tensor_type.elem_type for v in (*self._model.graph.input, *self._model.graph.output)}

        def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
            feeds = {}
            for value in self._session.get_inputs():
                dtype = np.dtype({"tensor(float)": "float32", "tensor(float16)": "float16"}[value.type])
                nbytes = int(np.prod(shapes[value.name])) * dtype.itemsize
                raw = world.at(addresses[value.name], nbytes)
                feeds[value.name] = raw.view(dtype).reshape(shapes[value.name])
            names = [o.name for o in self._session.get_outputs()]
            for name, array in zip(names, self._session.run(names, feeds), strict=True):
                raw = np.frombuffer(array.tobytes(), np.uint8)
                np.copyto(world.at(addresses[name], raw.nbytes), raw)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._logger, self._host_code = global_logger(logger), False
            if "runtime" in control.failures:
                fail(self._logger, "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")
            self._held = Owned(world)

        @property
        def engine_host_code_allowed(self) -> bool:
            return self._host_code

        @engine_host_code_allowed.setter
        def engine_host_code_allowed(self, value: bool) -> None:
            self._host_code = value

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
            data = bytes(serialized_engine)
            header = _header(data)
            if "deserialize" in control.failures or header is None:
                fail(self._logger, "Serialization assertion magicTagRead == kMAGIC_TAG failed.")
                return None
            if header["version_compatible"] and not self._host_code:
                # Of any version, the one that built it included: such a plan carries code of its own.
                self._logger.log(severities.ERROR, "The engine has host code, which setEngineHostCodeAllowed forbids")
                return None
            if header["version"] != version and not header["version_compatible"]:
                self._logger.log(severities.ERROR, "The engine plan file is not compatible with this version")
                return None
            start = len(MAGIC) + 8
            length = int.from_bytes(data[len(MAGIC) : start], "little")
            return ICudaEngine(data[start + length :], header, self._logger)

    return EngineInspector, IExecutionContext, ICudaEngine, Runtime


class Owned:
    """A part of each object of TensorRT's: it takes memory in the context that is current, and is to be freed there."""

    def __init__(self, world: World) -> None:
        self._world, self.place = world, world.place()
        world.alive += 1

    def __del__(self) -> None:
        self._world.alive -= 1
        self._world.misplaced += self._world.place() != self.place


def _data_type(types_: Any, elem_type: int) -> Any:
    names = {
        onnx.TensorProto.FLOAT: "FLOAT",
        onnx.TensorProto.FLOAT16: "HALF",
        onnx.TensorProto.BFLOAT16: "BF16",
        onnx.TensorProto.INT8: "INT8",
        onnx.TensorProto.UINT8: "UINT8",
        onnx.TensorProto.INT32: "INT32",
        onnx.TensorProto.INT64: "INT64",
        onnx.TensorProto.BOOL: "BOOL",
    }
    return types_[names[elem_type]]


def _header(data: bytes) -> dict[str, Any] | None:
    start = len(MAGIC) + 8
    if not data.startswith(MAGIC) or len(data) < start:
        return None
    length = int.from_bytes(data[len(MAGIC) : start], "little")
    try:
        found: dict[str, Any] = json.loads(data[start : start + length])
        onnx.load_from_string(data[start + length :])
    except Exception:
        return None
    return found
