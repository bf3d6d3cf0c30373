"""The engine contract, the same for every backend, and the choice among them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_net import small_net
from tensorrt_hosts import HAS_GPU, HAS_TENSORRT, HOSTS, install_host

from maskplan.engines.build import (
    BACKENDS,
    DEFAULT_PROFILES,
    SUFFIX,
    BuildOptions,
    build_engine,
    choose_backend,
    open_engine,
    parse_profile,
)
from maskplan.engines.sidecar import read_engine, sidecar_path
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.core.artifacts import Preprocessing, Profile, Provenance
from maskplan.pipeline.core.errors import HostError, InputError

Array = npt.NDArray[Any]

HOW = Preprocessing(3, 8, 8, 0, "bilinear", (0.0,) * 3, (1.0,) * 3)
MADE = Provenance("net", False, "random, seed 0", "0" * 64, 5, (), HOW, ("mix",), "2:4", "channel", "magnitude")
EVERY_BACKEND = ("onnxruntime", *HOSTS)


@pytest.fixture(params=EVERY_BACKEND)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend, TensorRT's stand-ins among them."""
    if request.param == "onnxruntime":
        return "onnxruntime"
    install_host(request.param, monkeypatch)
    return "tensorrt"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An ONNX file of ours, with a masked convolution."""
    return small_net(tmp_path / "net.onnx", provenance=MADE)


def images(batch: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(batch).normal(size=(batch, 3, 8, 8)).astype(np.float32)


def expected(source: Path, x: Array) -> Array:
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    return session.run(None, {"input": x})[0]


def test_every_backend_has_a_suffix_and_is_held_to_the_contract() -> None:
    assert set(SUFFIX) == set(BACKENDS) == {"onnxruntime", "tensorrt", "tensorrt-rtx"}


def test_an_engine_computes_what_its_onnx_file_does_at_every_batch(backend: str, source: Path, tmp_path: Path) -> None:
    record = build_engine(describe_onnx(source), BuildOptions(backend), tmp_path / f"engine{SUFFIX[backend]}")
    engine = open_engine(record)
    assert [(t.name, t.dtype, t.shape[1:]) for t in engine.inputs] == [("input", "float32", (3, 8, 8))]
    assert [(t.name, t.dtype, t.shape[1:]) for t in engine.outputs] == [("logits", "float32", (5,))]
    for batch in (1, 2, 8, 1):
        found = engine.infer({"input": images(batch)})
        assert set(found) == {"logits"}
        assert found["logits"].shape == (batch, 5)
        assert np.allclose(found["logits"], expected(source, images(batch)), atol=1e-2)
    engine.close()


@pytest.mark.parametrize("sparse_weights", [True, False])
def test_the_record_says_what_was_built_from_what(
    backend: str, sparse_weights: bool, source: Path, tmp_path: Path
) -> None:
    profiles = (Profile(1, 2, 4),)
    described = describe_onnx(source)
    out = tmp_path / "deep" / "er" / f"engine{SUFFIX[backend]}"
    record = build_engine(described, BuildOptions(backend, profiles, sparse_weights), out)
    assert (record.path, record.backend, record.profiles) == (out, backend, profiles)
    assert (record.onnx_sha256, record.provenance) == (described.sha256, MADE)
    assert (record.precision, record.typing) == ("fp32", "strong")
    assert record.bytes == out.stat().st_size
    assert record.sparse_weights == (sparse_weights and backend == "tensorrt")
    assert bool(record.notes) == sparse_weights
    assert read_engine(out) == record
    assert sorted(p.name for p in out.parent.iterdir()) == sorted([out.name, sidecar_path(out).name])


def test_an_engine_opens_from_its_path_alone(backend: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / f"engine{SUFFIX[backend]}"
    build_engine(describe_onnx(source), BuildOptions(backend), out)
    engine = open_engine(out)
    assert engine.infer({"input": images(1)})["logits"].shape == (1, 5)
    engine.close()


def test_two_engines_of_one_file_run_side_by_side(backend: str, source: Path, tmp_path: Path) -> None:
    records = [
        build_engine(describe_onnx(source), BuildOptions(backend), tmp_path / f"{name}{SUFFIX[backend]}")
        for name in ("a", "b")
    ]
    first, second = (open_engine(record) for record in records)
    outputs = [engine.infer({"input": images(2)})["logits"] for engine in (first, second, first)]
    assert np.array_equal(outputs[0], outputs[2])
    assert np.allclose(outputs[0], outputs[1], atol=1e-2)
    first.close()
    assert np.array_equal(second.infer({"input": images(2)})["logits"], outputs[1])
    second.close()


def test_a_model_that_the_backend_does_not_accept_leaves_nothing(backend: str, source: Path, tmp_path: Path) -> None:
    described = describe_onnx(source)
    source.write_bytes(b"no model any more")
    out = tmp_path / "built" / f"engine{SUFFIX[backend]}"
    with pytest.raises(InputError):
        build_engine(described, BuildOptions(backend), out)
    assert not out.parent.exists()


def test_what_was_asked_for_is_taken() -> None:
    for name in BACKENDS:
        assert choose_backend(name) == (name, "requested")


@pytest.mark.parametrize(
    ("installed", "why"),
    [
        ((), "TensorRT is not installed"),
        (("pycuda",), "TensorRT is not installed"),
        (("tensorrt",), "TensorRT is installed, but pycuda, which is required to run its engines, is not"),
        (
            ("tensorrt", "pycuda"),
            "TensorRT, pycuda and an NVIDIA driver are installed"
            if HAS_GPU
            else "TensorRT and pycuda are installed, but the NVIDIA driver is not",
        ),
    ],
)
def test_auto_takes_tensorrt_only_where_all_it_needs_is_and_says_what_is_missing(
    installed: tuple[str, ...], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorrt", "pycuda"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module if name in installed else None)
    assert choose_backend("auto") == ("tensorrt" if HAS_GPU and len(installed) == 2 else "onnxruntime", why)


def test_an_unknown_backend_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(InputError) as caught:
        choose_backend("tensorflow")
    for name in ("auto", *BACKENDS):
        assert name in str(caught.value)


def test_auto_looks_for_tensorrt_without_loading_it(tmp_path: Path) -> None:
    """A package of that name that would tell if it were imported; pycuda likewise."""
    for package in ("tensorrt", "pycuda"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f"open({str(tmp_path / 'loaded')!r}, 'a').write({package!r})\n")
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1])\n"
        "from engines.build import choose_backend\n"
        "import pipeline.run\n"
        "print(json.dumps([*choose_backend('auto'), 'tensorrt' in sys.modules, 'pycuda' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    chosen, why, *loaded = json.loads(done.stdout)
    assert loaded == [False, False]
    assert not (tmp_path / "loaded").exists()
    assert chosen == ("tensorrt" if HAS_GPU else "onnxruntime")
    assert HAS_GPU or "driver" in why


@pytest.mark.skipif(HAS_TENSORRT, reason="TensorRT is installed here")
def test_asking_for_tensorrt_where_there_is_none_says_so_and_leaves_nothing(
    source: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(HostError, match="TensorRT is not installed"):
        build_engine(describe_onnx(source), BuildOptions("tensorrt"), tmp_path / "engine.plan")
    ran = cli("build", source, "--backend", "tensorrt", "-o", tmp_path / "engine.plan")
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.startswith("error: TensorRT is not installed")
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 512), min_size=3, max_size=3).map(sorted))
def test_a_profile_reads_as_it_prints(sizes: list[int]) -> None:
    profile = parse_profile(":".join(map(str, sizes)))
    assert (profile.min, profile.opt, profile.max) == tuple(sizes)
    assert parse_profile(str(profile)) == profile
    assert parse_profile(str(sizes[0])) == Profile(sizes[0], sizes[0], sizes[0])


@pytest.mark.parametrize(
    "text", ["", "0", "2:1:4", "1:8:4", "1:2", "1:2:3:4", "a:b:c", "-1:1:1", "1.5", "1: 2:3", "0:1:2"]
)
def test_what_is_no_profile_is_refused(text: str, source: Path, cli: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="invalid profile"):
        parse_profile(text)
    ran = cli("build", source, "--backend", "onnxruntime", f"--profile={text}")
    assert ran.code == 3
    assert [p.name for p in source.parent.iterdir()] == ["net.onnx"]


def test_the_command_builds_with_the_profiles_and_flags_given(
    source: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    ran = cli("build", source, "--backend", "onnxruntime", "--profile", "1:2:4", "--profile", "8", "--no-sparse")
    assert ran.code == 0, ran.err
    record = read_engine(tmp_path / "net.engine.onnx")
    assert record.profiles == (Profile(1, 2, 4), Profile(8, 8, 8))
    assert (record.sparse_weights, record.notes) == (False, ())
    ran = cli("build", source, "--backend", "onnxruntime", "-o", tmp_path / "other.onnx")
    assert "no sparse kernels" in ran.out
    assert read_engine(tmp_path / "other.onnx").profiles == DEFAULT_PROFILES


def test_the_command_refuses_an_unknown_backend(source: Path, cli: Callable[..., Any]) -> None:
    ran = cli("build", source, "--backend", "openvino")
    assert ran.code == 3
    assert "onnxruntime" in ran.err
