"""The stand-in for TensorRT is like the real bindings of each version, and so is every name that we look up."""

from __future__ import annotations

import ast
import enum
import functools
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_cuda
import fake_tensorrt
import pytest
from real_bindings import described

ROOT = Path(__file__).parents[3]
BINDINGS = ROOT / ".venv" / "bindings"
SOURCES = sorted((ROOT / "engines" / "trt").glob("*.py"))
LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")
# What the bindings link against beside the builder; never called, for the tests read signatures.
FUNCTIONS = (
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getPluginRegistry",
    "getNvOnnxParserVersion",
    "initLibNvInferPlugins",
)

# A builder that says why there is none, through the logger's `log`; its place in the class differs by major version.
SPEAKING = """
typedef void (*log_function)(void *, int, const char *);
void *createInferBuilder_INTERNAL(void *logger, int version) {
  (*(log_function **)logger)[SLOT](logger, 1, "CUDA initialization failure with error: 35");
  return 0;
}
"""
LOG_SLOT = {"10": 0, "11": 4}
# What becomes of it in our code, and what the bindings make of a logger without `log`.
ASKING = """
import sys
sys.path.insert(0, sys.argv[1])
import tensorrt_bindings as tensorrt
from maskplan.engines.trt.log_capture import TrtLogCapture
from maskplan.engines.trt.versions import construct
from maskplan.pipeline.core.errors import HostError

try:
    construct(tensorrt.Runtime, TrtLogCapture(tensorrt))
except HostError as error:
    print(error.found)
log_capture = TrtLogCapture(tensorrt)
try:
    construct(tensorrt.Builder, log_capture)
except HostError as error:
    print(error.found, log_capture.errors)

class Mute(tensorrt.ILogger):
    def __init__(self):
        tensorrt.ILogger.__init__(self)

class Unmade(tensorrt.ILogger):
    def __init__(self):
        pass

for kind in (Mute, Unmade):
    try:
        tensorrt.Builder(kind())
    except TypeError as error:
        print(error)
"""

Classes = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Empty shared objects under the names that the bindings ask for; the builder's says why it makes none."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the empty libraries that the bindings load")
    folder = tmp_path_factory.mktemp("libraries")
    source = folder / "empty.c"
    empty = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS)
    for major, slot in LOG_SLOT.items():
        source.write_text(empty + SPEAKING.replace("SLOT", str(slot)))
        for name in LIBRARIES:
            out = f"lib{name}.so.{major}"
            subprocess.run(
                [compiler, "-shared", "-fPIC", str(source), f"-Wl,-soname,{out}", "-o", str(folder / out)], check=True
            )
    return folder


@pytest.fixture(scope="session", params=fake_tensorrt.VERSIONS)
def real(request: pytest.FixtureRequest, libraries: Path) -> tuple[str, Classes]:
    """A version and its classes, read in a process of their own."""
    if not (BINDINGS / request.param).is_dir():
        pytest.skip(f"no bindings of TensorRT {request.param}: make .venv/.bindings")
    return request.param, read(request.param, libraries)


@functools.cache
def read(version: str, libraries: Path) -> Classes:
    script = Path(fake_tensorrt.__file__).with_name("real_bindings.py")
    environment = os.environ | {"LD_LIBRARY_PATH": str(libraries)}
    command = [sys.executable, str(script), str(BINDINGS / version)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["version"] == version
    classes: Classes = found["classes"]
    return classes


def fake(version: str) -> ModuleType:
    gpu = fake_cuda.World()
    return fake_tensorrt.make(version, gpu, fake_tensorrt.Control(gpu))


def public(cls: type) -> Iterator[tuple[str, Any]]:
    for name, value in vars(cls).items():
        if not name.startswith("_"):
            yield name, value


def differences(module: ModuleType, classes: Classes) -> list[str]:
    """What the stand-in offers and the real package has not."""
    found = []
    for name, cls in vars(module).items():
        if not isinstance(cls, type):
            continue
        if name not in classes:
            found.append(f"no class {name}")
            continue
        theirs = classes[name]
        if issubclass(cls, enum.Enum):
            found += [f"{name}.{m}" for m in cls.__members__ if m not in theirs.get("members", {})]
            continue
        constructor = theirs["methods"].get("__init__", [])
        taken = list(inspect.signature(cls).parameters)
        if constructor and taken not in constructor:
            found.append(f"{name}{taken} where the constructor takes {constructor}")
        for member, value in public(cls):
            if isinstance(value, property):
                if member not in theirs["properties"]:
                    found.append(f"no property {name}.{member}")
                elif value.fset is not None and not theirs["properties"][member]:
                    found.append(f"{name}.{member} cannot be set")
            elif inspect.isfunction(value):
                ours = list(inspect.signature(value).parameters)[1:]
                overloads = theirs["methods"].get(member)
                if overloads is None:
                    found.append(f"no method {name}.{member}")
                elif not any(ours == o[: len(ours)] for o in overloads):
                    found.append(f"{name}.{member}{ours} where the arguments are {overloads}")
            elif member not in theirs["constants"]:
                found.append(f"no constant {name}.{member}")
    return found


def test_the_fake_is_like_the_real_bindings(real: tuple[str, Classes]) -> None:
    version, classes = real
    assert differences(fake(version), classes) == []


def test_our_logger_hears_the_real_bindings_and_a_missing_builder_is_told(
    real: tuple[str, Classes], libraries: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And the stand-in does as they do with loggers that are not whole."""
    version, _ = real
    environment = os.environ | {"LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ASKING, str(BINDINGS / version)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    silent, log_capture, null, unmade = done.stdout.splitlines()
    assert silent == "pybind11::init(): factory function returned nullptr"
    said = "CUDA initialization failure with error: 35"
    assert log_capture == f"{said} {[said]}"
    fake_tensorrt.install(version, fake_cuda.World(), monkeypatch).failures |= {"builder", "runtime", "parser"}
    tensorrt: Any = sys.modules["tensorrt"]
    for make in (lambda: tensorrt.Runtime(tensorrt.ILogger()), lambda: tensorrt.OnnxParser(None, tensorrt.ILogger())):
        with pytest.raises(TypeError) as caught:
            make()
        assert silent == str(caught.value)

    class Unmade(tensorrt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None: ...

    for logger, told in ((tensorrt.ILogger(), null), (Unmade(), unmade)):
        with pytest.raises(TypeError) as caught:
            tensorrt.Builder(logger)
        assert told.endswith(str(caught.value))
    mute = 'Tried to call pure virtual function "ILogger::log"'
    assert mute in done.stderr
    assert mute in capfd.readouterr().err


def test_what_differs_is_seen(real: tuple[str, Classes]) -> None:
    version, classes = real
    module = fake(version)

    class Runtime(module.Runtime):  # type: ignore[name-defined, misc]
        def deserialize_cuda_engine(self, data: bytes) -> None: ...

        def invented(self) -> None: ...

        @property
        def logger(self) -> None: ...

        @logger.setter
        def logger(self, value: None) -> None: ...

    module.Runtime = Runtime  # type: ignore[attr-defined]
    module.Invented = type("Invented", (), {})  # type: ignore[attr-defined]
    module.ProfilingVerbosity = enum.IntEnum("ProfilingVerbosity", {"CHATTY": 0})  # type: ignore[attr-defined]
    told = "\n".join(differences(module, classes))
    for part in (
        "deserialize_cuda_engine['data']",
        "no method Runtime.invented",
        "logger cannot be set",
        "no class Invented",
        "CHATTY",
    ):
        assert part in told


def test_what_only_older_versions_have_is_not_in_the_fake_of_11() -> None:
    older, newer = fake("10.16.1.11"), fake("11.4.0.106")
    assert {"FP16", "INT8"} <= set(older.BuilderFlag.__members__)
    assert not {"FP16", "INT8"} & set(newer.BuilderFlag.__members__)
    for module in (older, newer):
        assert not hasattr(module, "IInt8EntropyCalibrator2") or module is older


def rtx_classes() -> Classes:
    """The real TensorRT-RTX, where it is installed."""
    tensorrt_rtx = pytest.importorskip(
        "tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'maskplan[rtx]'"
    )
    return {name: described(value) for name, value in vars(tensorrt_rtx).items() if isinstance(value, type)}


def test_the_fake_of_11_is_like_tensorrt_rtx() -> None:
    """One API, so one body of code: all that the stand-in of TensorRT 11.4 has, TensorRT-RTX 1.7 has as well."""
    assert differences(fake("11.4.0.106"), rtx_classes()) == []
    assert "no class IInt8EntropyCalibrator2" in differences(fake("10.16.1.11"), rtx_classes())


def chain(node: ast.AST) -> list[str] | None:
    """`trt.A.B` as its names, for what starts at a variable called `trt`."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return names if isinstance(node, ast.Name) and node.id == "trt" and names else None


def test_every_name_of_tensorrt_in_the_sources_is_in_the_fake() -> None:
    used = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = chain(node)
            if names:
                used[".".join(names)] = path.name
    assert len(used) > 15
    for version in fake_tensorrt.VERSIONS:
        for name in used:
            value: Any = fake(version)
            for part in name.split("."):
                assert hasattr(value, part), f"{used[name]}: trt.{name} on {version}"
                value = getattr(value, part)


def test_names_looked_up_at_run_time_are_literals_that_some_version_has(libraries: Path) -> None:
    """`versions.member` is the only way to do so."""
    looked_up = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id == "member":
                assert isinstance(node.args[1], ast.Constant), f"{path.name}: {ast.unparse(node)}"
                looked_up.append(node.args[1].value)
            assert node.func.id not in ("getattr", "hasattr") or path.name == "versions.py", path.name
    assert looked_up
    here = [version for version in fake_tensorrt.VERSIONS if (BINDINGS / version).is_dir()]
    if not here:
        pytest.skip("no bindings of TensorRT: make .venv/.bindings")
    known = set()
    for classes in [*(read(version, libraries) for version in here), rtx_classes()]:
        known |= {m for c in classes.values() for part in c.values() for m in part} | set(classes)
    assert set(looked_up) <= known
