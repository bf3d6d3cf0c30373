"""TensorRT or pycuda that is missing, broken or too old."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from fake_cuda import World
from fake_tensorrt import Control
from plan_builds import build

from maskplan.engines.trt.versions import import_library, network_flags
from maskplan.pipeline.core.errors import HostError, PipelineError


def test_a_version_in_which_every_network_is_strongly_typed_needs_no_flag() -> None:
    trt = SimpleNamespace(
        NetworkDefinitionCreationFlag=SimpleNamespace(), __name__="tensorrt", __version__="11.0.0.114"
    )
    assert network_flags(trt) == 0


def test_an_older_one_without_the_flag_is_refused() -> None:
    """Its networks would be weakly typed, and run in FP32."""
    trt = SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace(), __name__="tensorrt", __version__="10.13.3.9")
    with pytest.raises(HostError, match=r"TensorRT 10.13.3.9 without the flag STRONGLY_TYPED"):
        network_flags(trt)


@pytest.mark.parametrize("version", ["8.6.1", "9.3.0.post12.dev1", "10.2.0", "10.0.1"])
def test_a_tensorrt_that_is_too_old_is_told_with_what_is_needed(
    source: Path, another: Callable[[str], Control], version: str
) -> None:
    another(version)
    with pytest.raises(HostError, match="too old") as caught:
        build(source)
    assert f"TensorRT {version}, required is 10.3 or newer" in str(caught.value)


def test_a_folder_that_is_called_tensorrt_is_not_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    with pytest.raises(HostError, match="TensorRT is not installed"):
        import_library("tensorrt")


def test_without_a_gpu_nothing_is_built(trt: Control, gpu: World, source: Path) -> None:
    gpu.devices = 0
    with pytest.raises(HostError, match="no usable GPU"):
        build(source)


@pytest.mark.parametrize(
    "error", ["ImportError('no bindings')", "OSError('libnvinfer.so.10: cannot open')", "RuntimeError('no wheel')"]
)
def test_a_tensorrt_that_does_not_load_is_told(
    source: Path, tmp_path: Path, error: str, gpu: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its package looks for the shared libraries when it is imported."""
    package = tmp_path / "packages" / "tensorrt"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"raise {error}\n")
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.syspath_prepend(package.parent)
    with pytest.raises(HostError, match="TensorRT is not installed completely") as caught:
        build(source)
    assert error.partition("(")[0] in str(caught.value)


def test_missing_pycuda_is_told_apart_from_a_missing_gpu(
    trt: Control, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    monkeypatch.setitem(sys.modules, "pycuda", None)
    with pytest.raises(HostError, match=r"pycuda is not installed(.|\n)*pip install 'maskplan\[tensorrt\]'"):
        build(source)
    package = tmp_path / "packages" / "pycuda"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "driver.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')\n")
    for name in ("pycuda.driver", "pycuda"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(package.parent)
    with pytest.raises(HostError, match=r"no usable GPU(.|\n)*libcuda.so.1"):
        build(source)


def test_missing_tensorrt_is_told_with_what_to_install(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(PipelineError, match=r"pip install 'maskplan\[tensorrt\]'"):
        build(source)
