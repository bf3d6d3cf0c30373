"""A stand-in for the parts of TensorRT that we use, of a version: it runs the ONNX with ONNX Runtime, and fails as told.

Each class here has only members that the real package of that version has, under the same names and argument names;
`test_fake_is_like_the_real_bindings` holds it against them.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_cuda import World
from fake_tensorrt_answers import NO_PLUGIN, PARSER_CODES, phases, static_mismatch, unsupported
from fake_tensorrt_runtime import MAGIC, runtime_classes
from fake_tensorrt_values import made, pure_virtual, value_classes
from google.protobuf.message import DecodeError

VERSIONS = ("10.3.0", "10.13.3.9", "10.16.1.11", "11.4.0.106")

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
        made(logger, ILogger)
        if not registered:
            registered.append(logger)
        elif registered[0] is not logger:
            registered[0].log(severities.WARNING, "The logger passed in differs from one already provided")
        return registered[0]

    def fail(logger: Any, message: str) -> None:
        severity, message = control.says or ("ERROR", message)
        logger.log(severities[severity], message)

    severities = IntEnum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4})

    codes = IntEnum("ErrorCode", PARSER_CODES)

    class ILogger:
        Severity = severities
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = severities

        def __init__(self) -> None:
            self._made = True

        def log(self, severity: Any, msg: str) -> None:
            pure_virtual("ILogger", "log")

    IProgressMonitor, IHostMemory, ITimingCache, IOptimizationProfile, IInt8EntropyCalibrator2, ParserError = (
        value_classes(version)
    )

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
            if told := profile._invalid():
                registered[0].log(severities.ERROR, told)
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
            self._monitor = made(value, IProgressMonitor)

    if not newer:

        def set_calibration_profile(self: IBuilderConfig, profile: IOptimizationProfile) -> bool:
            if "calibration_profile" in control.failures:
                return False
            self._calibration_profile = profile
            return True

        def set_calibrator(self: IBuilderConfig, value: Any) -> None:
            self._calibrator = made(value, IInt8EntropyCalibrator2)

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
                told = static_mismatch(value, [p._shapes[value.name] for p in config._profiles])
                if told:
                    self._logger.log(severities.ERROR, told)
                    return None
            if "INT8" in control.flags and (told := calibrate(network, config)):
                self._logger.log(severities.ERROR, told)
                return None
            if config._monitor is not None and not phases(config._monitor, lambda: control.during_build()):
                return None
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
            return IHostMemory(MAGIC + len(text).to_bytes(8, "little") + text + network._model.SerializeToString())

    class OnnxParser:
        def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
            self._network, self._logger = network, global_logger(logger)
            if "parser" in control.failures:
                raise TypeError("pybind11::init(): factory function returned nullptr")
            self._errors: list[ParserError] = []

        def parse_from_file(self, model: str) -> bool:
            path = Path(model)
            if "parse" in control.failures:
                self._errors = [
                    ParserError(codes.INVALID_NODE, NO_PLUGIN, i, f"strange_{i}", "Strange") for i in range(3)
                ]
            elif not path.is_file():
                told = f"Input file cannot be found, or is not a regular file: {model}"
                self._errors = [ParserError(codes.INVALID_VALUE, f"Assertion failed: stat(model, &sb) == 0: {told}")]
            else:
                try:
                    self._network._model = onnx.load(model)
                except DecodeError:
                    told = "Assertion failed: model->ParseFromCodedStream(&codedInput): Failed to parse the ONNX model."
                    self._errors = [ParserError(codes.MODEL_DESERIALIZE_FAILED, told)]
                else:
                    self._errors = [
                        ParserError(codes[code], *told) for code, *told in unsupported(self._network._model)
                    ]
            for error in self._errors:
                self._logger.log(severities.ERROR, f"ModelImporter.cpp:151: ERROR: {error.desc()}")
            return not self._errors

        def parse(self, model: bytes, path: str | None = None) -> bool:
            self._network._model = onnx.load_from_string(model)
            return True

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> ParserError:
            return self._errors[index]

    EngineInspector, IExecutionContext, ICudaEngine, Runtime = runtime_classes(
        version, world, control, global_logger, fail, severities, formats, modes, types_
    )

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
        codes,
    ):
        setattr(module, cls.__name__, cls)
    if not newer:
        module.IInt8EntropyCalibrator2 = IInt8EntropyCalibrator2  # type: ignore[attr-defined]
    return module


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
