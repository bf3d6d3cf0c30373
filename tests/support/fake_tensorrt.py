"""A stand-in for the parts of TensorRT that we use, of a version: it runs the ONNX with ONNX Runtime, and fails as told.

Each class here has only members that the real package of that version has, under the same names and argument names;
`test_fake_is_like_the_real_bindings` holds it against them.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_cuda import World
from google.protobuf.message import DecodeError

VERSIONS = ("10.3.0", "10.13.3.9", "10.16.1.11", "11.4.0.106")

_MAGIC = b"FAKEPLAN"
# Names that people quoted (NVIDIA/TensorRT issue 4020).
_SPARSE = "sm80_xmma_fprop_avdt_sparse_int8int8_tilesize64x64x64_tapsperload3_threadspercta128_r3s3_u1v1_scalebias_relu"
_DENSE = "sm70_xmma_fprop_conv1x1_i8f32_f32_f32_nchw_vect_c_4kcrs_vect_c_4_nchw_simt_small_batch_bias_relu"


@dataclass
class Control:
    """What goes wrong, and what was asked for.

    Attributes:
        gpu: Where it runs.
        failures: Of `builder`, `network`, `config`, `parser`, `parse`, `profile`, `build`, `out_of_memory`, `runtime`,
            `deserialize`, `inspector`, `context`, `select`, `input_shape`, `address`, `execute`, `capture`, `cache`,
            `calibration_profile`.
        says: Severity and message that failures of `builder`, `build`, `runtime`, `deserialize` and `context` log; by
            default an error as TensorRT words it.
        sparsity: Lines that a build logs of it.
        calibrated: The batches that an implicit INT8 build was fed.
        flags: Of the last configuration.
        config: The last configuration itself.
        builds: How many plans were made.
        during_build: Called once within a build.
        dense: Names of layers that run dense, whatever their weights.
    """

    gpu: World
    failures: set[str] = field(default_factory=set)
    flags: set[str] = field(default_factory=set)
    config: Any = None
    builds: int = 0
    during_build: Callable[[], None] = lambda: None
    dense: set[str] = field(default_factory=set)
    says: tuple[str, str] | None = None
    sparsity: tuple[str, ...] = ()
    calibrated: list[Any] = field(default_factory=list)


def install(version: str, world: World, monkeypatch: pytest.MonkeyPatch) -> Control:
    """Put `tensorrt` in place."""
    control = Control(world)
    monkeypatch.setitem(sys.modules, "tensorrt", make(version, world, control))
    return control


def make(version: str, world: World, control: Control) -> types.ModuleType:
    """The module. Classes are made anew for each, so that versions differ as the real ones do."""
    newer = int(version.partition(".")[0]) >= 11

    def flags(*names: str) -> type[IntEnum]:
        return IntEnum("BuilderFlag", {name: i for i, name in enumerate(names)})

    older_only = () if newer else ("FP16", "BF16", "INT8", "FP8", "OBEY_PRECISION_CONSTRAINTS")
    builder_flags = flags(
        *older_only,
        "REFIT",
        "DISABLE_TIMING_CACHE",
        "TF32",
        "SPARSE_WEIGHTS",
        "VERSION_COMPATIBLE",
        "STRIP_PLAN",
        "REFIT_IDENTICAL",
    )
    network_flags = IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 0 if newer else 1})
    verbosity = IntEnum("ProfilingVerbosity", {"LAYER_NAMES_ONLY": 0, "NONE": 1, "DETAILED": 2})
    levels = IntEnum("HardwareCompatibilityLevel", {"NONE": 0, "AMPERE_PLUS": 1})
    pools = IntEnum("MemoryPoolType", {"WORKSPACE": 0})
    formats = IntEnum("LayerInformationFormat", {"ONELINE": 0, "JSON": 1})
    modes = IntEnum("TensorIOMode", {"NONE": 0, "INPUT": 1, "OUTPUT": 2})
    types_ = IntEnum("DataType", ["FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8", "INT64", "BF16"])
    registered: list[Any] = []

    def global_logger(logger: Any) -> Any:
        """TensorRT keeps the first logger that it is given, and has it say so when it is given another (issue 1475)."""
        _made(logger, ILogger)
        if not registered:
            registered.append(logger)
        elif registered[0] is not logger:
            registered[0].log(severities.WARNING, "The logger passed in differs from one already provided")
        return registered[0]

    def fail(logger: Any, message: str) -> None:
        severity, message = control.says or ("ERROR", message)
        logger.log(severities[severity], message)

    severities = IntEnum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4})

    class ILogger:
        Severity = severities
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = severities

        def __init__(self) -> None:
            self._made = True

        def log(self, severity: Any, msg: str) -> None:
            _pure_virtual("ILogger", "log")

    class IProgressMonitor:
        def __init__(self) -> None:
            self._made = True

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            _pure_virtual("IProgressMonitor", "phase_start")

        def step_complete(self, phase_name: str, step: int) -> bool:
            _pure_virtual("IProgressMonitor", "step_complete")
            return False

        def phase_finish(self, phase_name: str) -> None:
            _pure_virtual("IProgressMonitor", "phase_finish")

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
            shapes = [tuple(min), tuple(opt), tuple(max)]
            if any(not isinstance(size, int) for size in (*min, *opt, *max)):
                raise ValueError("cannot be converted to Dims")
            for name, lower, higher in (("opt", min, opt), ("max", opt, max)):
                if not all(a <= b for a, b in zip(lower, higher, strict=True)):
                    raise RuntimeError(f"Shape provided for {name} is inconsistent with other shapes.")
            self._shapes[input] = shapes

    class IInt8EntropyCalibrator2:
        def __init__(self) -> None:
            self._made = True

        def get_batch_size(self) -> int:
            _pure_virtual("IInt8EntropyCalibrator2", "get_batch_size")
            return 0

        def get_batch(self, names: list[str]) -> list[int] | None:
            _pure_virtual("IInt8EntropyCalibrator2", "get_batch")
            return None

        def read_calibration_cache(self) -> bytes | None:
            _pure_virtual("IInt8EntropyCalibrator2", "read_calibration_cache")
            return None

        def write_calibration_cache(self, cache: Any) -> None:
            _pure_virtual("IInt8EntropyCalibrator2", "write_calibration_cache")

    class INetworkDefinition:
        def __init__(self, logger: Any, strong: bool) -> None:
            self._logger, self._strong = logger, strong
            self._model: onnx.ModelProto | None = None

    class IBuilderConfig:
        def __init__(self) -> None:
            # TensorRT's own default.
            self._flags = {builder_flags["TF32"]}
            self._profiles: list[IOptimizationProfile] = []
            self._cache: ITimingCache | None = None
            self._pools: dict[Any, int] = {}
            self._level, self._verbosity = 3, verbosity["LAYER_NAMES_ONLY"]
            self._hardware, self._monitor = levels["NONE"], None
            self._calibrator: Any = None
            self._calibration_profile: IOptimizationProfile | None = None

        def set_flag(self, flag: Any) -> None:
            self._flags.add(builder_flags(flag))

        def clear_flag(self, flag: Any) -> None:
            self._flags.discard(builder_flags(flag))

        def get_flag(self, flag: Any) -> bool:
            return flag in self._flags

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            self._pools[pool] = pool_size

        def get_memory_pool_limit(self, pool: Any) -> int:
            return self._pools[pool]

        def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
            if "profile" in control.failures:
                return -1
            self._profiles.append(profile)
            return len(self._profiles) - 1

        def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
            made = ITimingCache(bytes(serialized_timing_cache))
            is_one = all(line.startswith(b"TensorRT ") for line in made._lines)
            return made if is_one and "cache" not in control.failures else None

        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
            if not (ignore_mismatch or cache._is_ours()):
                return False
            self._cache = cache
            return True

        def get_timing_cache(self) -> ITimingCache | None:
            return self._cache

        @property
        def builder_optimization_level(self) -> int:
            return self._level

        @builder_optimization_level.setter
        def builder_optimization_level(self, value: int) -> None:
            self._level = value

        @property
        def profiling_verbosity(self) -> Any:
            return self._verbosity

        @profiling_verbosity.setter
        def profiling_verbosity(self, value: Any) -> None:
            self._verbosity = verbosity(value)

        @property
        def hardware_compatibility_level(self) -> Any:
            return self._hardware

        @hardware_compatibility_level.setter
        def hardware_compatibility_level(self, value: Any) -> None:
            self._hardware = levels(value)

        @property
        def progress_monitor(self) -> Any:
            return self._monitor

        @progress_monitor.setter
        def progress_monitor(self, value: Any) -> None:
            self._monitor = _made(value, IProgressMonitor)

    if not newer:

        def set_calibration_profile(self: IBuilderConfig, profile: IOptimizationProfile) -> bool:
            if "calibration_profile" in control.failures:
                return False
            self._calibration_profile = profile
            return True

        def set_calibrator(self: IBuilderConfig, value: Any) -> None:
            self._calibrator = _made(value, IInt8EntropyCalibrator2)

        IBuilderConfig.set_calibration_profile = set_calibration_profile  # type: ignore[attr-defined]
        calibrator = property(lambda self: self._calibrator, set_calibrator)
        IBuilderConfig.int8_calibrator = calibrator  # type: ignore[attr-defined]

    def calibrate(network: INetworkDefinition, config: IBuilderConfig) -> str:
        """Ask the calibrator as TensorRT does: for a cache, else for batches; what stands in the way, or nothing."""
        if network._strong:
            return "INT8 is not allowed in a strongly typed network"
        (name,) = (value.name for value in network._model.graph.input)  # type: ignore[union-attr]
        if config._calibrator is None or config._calibration_profile is None:
            return "Calibration failure occurred with no scaling factors detected"
        if config._calibrator.read_calibration_cache():
            return ""
        (shape, *_) = config._calibration_profile._shapes[name]
        assert shape[0] == config._calibrator.get_batch_size()
        while (pointers := config._calibrator.get_batch([name])) is not None:
            count = int(np.prod(shape))
            control.calibrated.append(world.at(pointers[0], 4 * count).view(np.float32).reshape(shape).copy())
        if not control.calibrated:
            return "Calibration failure occurred with no scaling factors detected"
        config._calibrator.write_calibration_cache(memoryview(b"TRT-100000-EntropyCalibration2\ninput: 3c010a14\n"))
        return ""

    class Builder:
        def __init__(self, logger: ILogger) -> None:
            self._logger = global_logger(logger)
            if "builder" in control.failures:
                fail(self._logger, "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")

        def create_network(self, flags: int = 0) -> INetworkDefinition | None:
            if "network" in control.failures:
                return None
            strong = newer or bool(flags & (1 << network_flags["STRONGLY_TYPED"]))
            return INetworkDefinition(self._logger, strong)

        def create_builder_config(self) -> IBuilderConfig | None:
            if "config" in control.failures:
                return None
            control.config = IBuilderConfig()
            return control.config

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
            control.flags = {flag.name for flag in config._flags}
            for failure, message in (
                ("build", "Could not find any implementation for node conv1."),
                ("out_of_memory", "Requested amount of GPU memory (123 bytes) could not be allocated: out of memory"),
            ):
                if failure in control.failures:
                    fail(self._logger, message)
                    return None
            for line in control.sparsity:
                self._logger.log(severities.VERBOSE, line)
            assert network._model is not None
            for value in network._model.graph.input:
                told = _static_mismatch(value, [p._shapes[value.name] for p in config._profiles])
                if told:
                    self._logger.log(severities.ERROR, told)
                    return None
            if "INT8" in control.flags and (told := calibrate(network, config)):
                self._logger.log(severities.ERROR, told)
                return None
            monitor = config._monitor
            if monitor is not None:
                monitor.phase_start("Building Engine", None, 2)
                for step in range(2):
                    control.during_build()
                    if not monitor.step_complete("Building Engine", step):
                        return None
                monitor.phase_finish("Building Engine")
            if config._cache is not None:
                config._cache._lines.add(f"TensorRT {version} tactic {control.builds}".encode())
            control.builds += 1
            header = {
                "version": version,
                "capability": world.capability,
                "profiles": [p._shapes for p in config._profiles],
                "layers": _layers(
                    network._model, builder_flags["SPARSE_WEIGHTS"] in config._flags, newer, control.dense
                ),
                "inputs": [v.name for v in network._model.graph.input],
                "version_compatible": builder_flags["VERSION_COMPATIBLE"] in config._flags,
                "detailed": config._verbosity == verbosity["DETAILED"],
            }
            text = json.dumps(header).encode()
            return IHostMemory(_MAGIC + len(text).to_bytes(8, "little") + text + network._model.SerializeToString())

    class ParserError:
        def __init__(self, desc: str, node: int = -1, node_name: str = "", node_operator: str = "") -> None:
            self._desc, self._node, self._name, self._operator = desc, node, node_name, node_operator

        def desc(self) -> str:
            return self._desc

        def node(self) -> int:
            return self._node

        def node_name(self) -> str:
            return self._name

        def node_operator(self) -> str:
            return self._operator

    class OnnxParser:
        def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
            self._network, self._logger = network, global_logger(logger)
            if "parser" in control.failures:
                raise TypeError("pybind11::init(): factory function returned nullptr")
            self._errors: list[ParserError] = []

        def parse_from_file(self, model: str) -> bool:
            if "parse" in control.failures:
                self._errors = [ParserError("no importer registered", i, f"strange_{i}", "Strange") for i in range(3)]
            elif not Path(model).is_file():
                self._logger.log(severities.ERROR, f"Could not open file {model}")
                return False
            else:
                try:
                    self._network._model = onnx.load(model)
                except DecodeError:
                    self._errors = [ParserError("Failed to parse the ONNX model.")]
            return not self._errors

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> ParserError:
            return self._errors[index]

    class EngineInspector:
        def __init__(self, header: dict[str, Any]) -> None:
            self._header = header

        def get_engine_information(self, format: Any) -> str:
            assert format == formats["JSON"]
            layers = self._header["layers"]
            tensors = {"I/O Tensors": []} if newer else {"Bindings": []}
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
            batch = next(iter(self._shapes.values()))[0]
            value = next(o for o in self._engine._model.graph.output if o.name == name)
            dims = [d.dim_value or -1 for d in value.type.tensor_type.shape.dim]
            return (batch, *dims[1:])

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
        def __init__(self, logger: ILogger) -> None:
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
            start = len(_MAGIC) + 8
            length = int.from_bytes(data[len(_MAGIC) : start], "little")
            return ICudaEngine(data[start + length :], header, self._logger)

    module = types.ModuleType("tensorrt")
    module.__version__ = version  # type: ignore[attr-defined]
    for cls in (
        ILogger,
        IProgressMonitor,
        IHostMemory,
        ITimingCache,
        IOptimizationProfile,
        INetworkDefinition,
        IBuilderConfig,
        Builder,
        ParserError,
        OnnxParser,
        EngineInspector,
        IExecutionContext,
        ICudaEngine,
        Runtime,
        builder_flags,
        network_flags,
        verbosity,
        levels,
        pools,
        formats,
        modes,
        types_,
    ):
        setattr(module, cls.__name__, cls)
    if not newer:
        module.IInt8EntropyCalibrator2 = IInt8EntropyCalibrator2  # type: ignore[attr-defined]
    return module


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


def _static_mismatch(value: onnx.ValueInfoProto, profiles: list[list[tuple[int, ...]]]) -> str:
    """What a builder says of a profile for dimensions that the network fixes (NVIDIA/TensorRT issue 939); else nothing."""
    fixed = [d.dim_value or None for d in value.type.tensor_type.shape.dim]
    for number, shapes in enumerate(profiles):
        for axis, (size, *sizes) in enumerate(zip(fixed, *shapes, strict=True)):
            if size is not None and set(sizes) != {size}:
                return (
                    f"{value.name}: for dimension number {axis} in profile {number} does not match network definition"
                )
    return ""


def _pure_virtual(cls: str, method: str) -> None:
    """What the bindings of 10.3 and 11.4 make of a method that a subclass did not override: a line, and no exception."""
    print(
        f'[ERROR] Exception caught in {method}(): Tried to call pure virtual function "{cls}::{method}"',
        file=sys.stderr,
    )


def _made(value: Any, cls: type) -> Any:
    """An object whose own constructor called that of the class; the bindings insist on it."""
    assert isinstance(value, cls)
    if not hasattr(value, "_made"):
        raise TypeError(f"{cls.__name__}.__init__() must be called when overriding __init__")
    return value


def _header(data: bytes) -> dict[str, Any] | None:
    start = len(_MAGIC) + 8
    if not data.startswith(_MAGIC) or len(data) < start:
        return None
    length = int.from_bytes(data[len(_MAGIC) : start], "little")
    try:
        found: dict[str, Any] = json.loads(data[start : start + length])
        onnx.load_from_string(data[start + length :])
    except Exception:
        return None
    return found


def _layers(model: onnx.ModelProto, sparse: bool, newer: bool, dense: set[str]) -> list[dict[str, Any]]:
    """What an inspector would tell, in the documented keys: convolutions of half precision run sparse where they are 2:4."""
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    layers = []
    for node in model.graph.node:
        if node.op_type != "Conv" or node.input[1] not in weights:
            continue
        weight = weights[node.input[1]]
        k, c = weight.shape[:2]
        grouped = weight.reshape(k, c // 4, 4, -1) if c % 4 == 0 else None
        conforms = grouped is not None and int((grouped != 0).sum(axis=2).max()) <= 2
        chosen = sparse and conforms and weight.dtype == np.float16 and node.name not in dense
        layer = {
            "Name": node.name,
            "LayerType": "CaskConvolution",
            "Groups": next((a.i for a in node.attribute if a.name == "group"), 1),
            "OutMaps": k,
            "Weights": {"Type": "Half" if weight.dtype == np.float16 else "Float", "Count": int(weight.size)},
            "HasSparseWeights": int(conforms),
            "TacticName": _SPARSE if chosen else _DENSE,
            "Metadata": f"[ONNX Layer: {node.name}]",
        }
        tensor = {"Name": node.input[0], "Dimensions": [1, c, 8, 8]}
        tensor |= {"Format": "Channel major", "Datatype": "Half"} if newer else {"Format/Datatype": "Half NHWC"}
        layers.append(layer | {"Inputs": [tensor], "Outputs": []})
    return layers
