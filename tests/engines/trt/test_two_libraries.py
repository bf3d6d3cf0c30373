"""Builds on the stand-in for TensorRT and on the real TensorRT-RTX: records, profiles, refused graphs, progress."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from plan_builds import PROFILES, build
from small_net import small_net
from tensorrt_hosts import STAND_IN_ONLY

from maskplan.engines.sidecar import read_engine
from maskplan.engines.trt import progress
from maskplan.engines.trt.log_capture import TrtLogCapture
from maskplan.engines.trt.parse import ParseError
from maskplan.engines.trt.versions import LIBRARIES, import_library
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.core.artifacts import Profile
from maskplan.pipeline.core.choices import Backend
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.files import sha256_of
from maskplan.pipeline.core.interrupts import INTERRUPTS, handle_signals


def left(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_every_file_of_tests_runs_on_both_or_is_listed_with_the_reason() -> None:
    texts = {p.name: p.read_text() for p in Path(__file__).parent.glob("test_*.py")}
    both = {name for name, text in texts.items() if "compiler: Backend" in text}
    assert both >= {"test_two_libraries.py", "test_log_capture.py"}
    on_stand_in = {name for name, text in texts.items() if "trt: Control" in text or "install_host" in text}
    assert on_stand_in - both <= set(STAND_IN_ONLY)
    assert set(STAND_IN_ONLY) <= set(texts) - both
    assert all(STAND_IN_ONLY.values())


def test_a_plan_and_its_record(compiler: Backend, source: Path) -> None:
    record = build(source, backend=compiler)
    assert record == read_engine(source.with_name("engine.plan"))
    assert (record.backend, record.typing, record.precision) == (compiler, "strong", "fp16")
    assert record.runtime_version == import_library(compiler).__version__
    assert record.profiles == PROFILES
    assert record.sparse_weights
    assert record.onnx_sha256 == sha256_of(source)
    assert record.bytes == record.path.stat().st_size
    assert [(s.name, s.shape) for s in (*record.inputs, *record.outputs)] == [
        ("input", (None, 3, 8, 8)),
        ("logits", (None, 5)),
    ]


@pytest.mark.parametrize("sparse", [True, False])
def test_the_same_inputs_give_the_same_bytes(compiler: Backend, source: Path, sparse: bool) -> None:
    first = build(source, backend=compiler, sparse=sparse)
    assert build(source, backend=compiler, sparse=sparse).sha256 == first.sha256


def test_profiles_and_options_reach_the_library(
    compiler: Backend, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = import_library(compiler)
    made: list[Any] = []
    create = trt.Builder.create_builder_config
    monkeypatch.setattr(trt.Builder, "create_builder_config", lambda self: made.append(create(self)) or made[-1])
    plan = build(source, backend=compiler, sparse=False, workspace_bytes=1 << 24).path.read_bytes()
    config = made[0]
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 24
    assert config.profiling_verbosity.name == "DETAILED"
    assert not any(config.get_flag(f) for f in (trt.BuilderFlag.TF32, trt.BuilderFlag.SPARSE_WEIGHTS))
    build(source, backend=compiler, tf32=True)
    assert all(made[1].get_flag(f) for f in (trt.BuilderFlag.TF32, trt.BuilderFlag.SPARSE_WEIGHTS))
    build(source, backend=compiler, profiles=PROFILES[:1], sparse=False)
    assert source.with_name("engine.plan").read_bytes() != plan


def with_operators(path: Path, *nodes: tuple[str, str, str]) -> Path:
    """A chain of operators (name, type, domain) in front of an Identity."""
    made = [
        helper.make_node(op, [f"x{i}"], [f"x{i + 1}"], name, domain=domain)
        for i, (name, op, domain) in enumerate(nodes)
    ]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["input"], ["x0"], "start"), *made],
        "net",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info(f"x{len(nodes)}", TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("theirs", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def test_operators_that_the_parser_does_not_know_are_named_with_a_way_out(compiler: Backend, tmp_path: Path) -> None:
    path = with_operators(tmp_path / "net.onnx", ("a", "Det", ""), ("b", "Strange", ""), ("", "Theirs", "theirs"))
    with pytest.raises(ParseError, match=f"^{LIBRARIES[compiler].name} cannot parse the model: 3 problems") as caught:
        build(path, backend=compiler)
    assert [(p.node, p.op) for p in caught.value.problems] == [
        ("a", "Det"),
        ("b", "Strange"),
        ("with the output 'x3'", "Theirs"),
    ]
    told = str(caught.value)
    assert "node a (Det): the operator is not supported" in told
    assert "node b (Strange): " in told
    assert "export" in told.rpartition("fix:")[2]
    assert left(tmp_path) == {"net.onnx"}


def test_a_file_that_is_no_longer_a_model_is_told_without_a_node(compiler: Backend, source: Path) -> None:
    from maskplan.engines.build import BuildOptions, build_engine

    described, out = describe_onnx(source), source.with_name("engine.plan")
    source.write_bytes(b"no model any more")
    with pytest.raises(InputError, match="not an ONNX file"):
        build_engine(described, BuildOptions(compiler, PROFILES), out)
    source.unlink()
    with pytest.raises(InputError, match="file not found"):
        build_engine(described, BuildOptions(compiler, PROFILES), out)
    assert left(source.parent) == set()


@pytest.mark.parametrize(
    ("batch", "size", "profile", "found"),
    [
        ("batch", "size", Profile(1, 1, 1), "only the batch may be dynamic"),
        (4, 8, Profile(1, 4, 4), "has a fixed batch of 4, not 1:4:4"),
        (4, 8, Profile(8, 8, 8), "has a fixed batch of 4, not 8:8:8"),
        ("batch", 8, Profile(4, 2, 8), "MIN<=OPT<=MAX"),
    ],
)
def test_shapes_that_do_not_go_together_are_one_message_and_leave_nothing(
    compiler: Backend, tmp_path: Path, batch: int | str, size: int | str, profile: Profile, found: str
) -> None:
    path = small_net(tmp_path / "net.onnx", "float16", batch=batch, size=size)
    with pytest.raises(InputError) as caught:
        build(path, backend=compiler, profiles=(profile,))
    assert found in str(caught.value)
    assert "cudaError" not in str(caught.value)
    assert left(tmp_path) == {"net.onnx"}


@contextlib.contextmanager
def drawing(calls: list[tuple[int, int | None]], what: object) -> Iterator[Any]:
    yield lambda done, total: calls.append((done, total))


def test_a_build_draws_its_progress_to_the_end_and_never_back(
    compiler: Backend, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, int | None]] = []
    monkeypatch.setattr(progress, "bar", lambda what: drawing(drawn, what))
    build(source, backend=compiler, sparse=False)
    shares = [done for done, total in drawn if total == 100]
    assert len(shares) == len(drawn) >= 5
    assert shares == sorted(shares)
    assert shares[-1] == 100
    assert len(set(shares)) > 2


def test_ctrl_c_ends_a_build_between_two_steps_and_leaves_nothing(
    compiler: Backend, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(INTERRUPTS, "pending", None)

    @contextlib.contextmanager
    def interrupting(what: str) -> Iterator[Any]:
        yield lambda done, total: INTERRUPTS.pending is None and os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(progress, "bar", interrupting)
    with handle_signals(), pytest.raises(KeyboardInterrupt):
        build(source, backend=compiler)
    assert left(source.parent) == {"net.onnx"}


def test_every_name_of_a_library_in_the_sources_is_in_both(compiler: Backend) -> None:
    """TensorRT-RTX 1.7.1 has the API of TensorRT 11."""
    trt = importlib.import_module(LIBRARIES[compiler].package)
    assert {"STRONGLY_TYPED"} <= set(trt.NetworkDefinitionCreationFlag.__members__)
    for name in ("SPARSE_WEIGHTS", "TF32", "VERSION_COMPATIBLE", "REFIT", "STRIP_PLAN", "REFIT_IDENTICAL"):
        assert name in trt.BuilderFlag.__members__
    assert trt.ProfilingVerbosity.DETAILED.name == "DETAILED"


def test_a_logger_outlives_a_build_and_hears_only_its_own_library(compiler: Backend, source: Path) -> None:
    trt = import_library(compiler)
    heard = TrtLogCapture(trt)
    with pytest.raises(ParseError):
        build(with_operators(source.with_name("odd.onnx"), ("b", "Strange", "")), backend=compiler)
    assert any("Plugin not found" in message for message in heard.errors)
    assert heard.reason() != f"{LIBRARIES[compiler].name} gave no reason"
    assert heard.logger is TrtLogCapture(trt).logger
