"""Profiles with shapes: graphs of which more than the batch is dynamic, as they are parsed, printed, built and run."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from fake_tensorrt import Control
from onnx import helper
from plan_builds import build
from served_models import graph
from small_net import small_net
from tensorrt_hosts import NEEDS_RTX

from maskplan.engines.build import parse_profile
from maskplan.engines.sidecar import read_engine
from maskplan.engines.trt.options import TrtOptions
from maskplan.engines.trt.run import TrtEngine
from maskplan.engines.trt.shapes import require_compatible_shapes
from maskplan.engines.trt.trtexec import trtexec_lines
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.core.artifacts import Profile, ShapeRange
from maskplan.pipeline.core.choices import Backend
from maskplan.pipeline.core.errors import InputError

Cli = Callable[..., Any]

KINDS = ("min", "opt", "max")
SMALL = "input:1x3x8x8:2x3x8x8:4x3x16x16"
LARGE = "input:1x3x16x16:2x3x32x32:4x3x64x48"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Images of any size."""
    return small_net(tmp_path / "net.onnx", "float16", size="size")


def two_inputs(path: Path, *, table_first: bool = False) -> Path:
    """Images of any size, and a table whose first axis is no batch."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["m", "table"], ["y"]),
    ]
    inputs = [("x", ["N", 3, "H", "W"]), ("table", [3, 5])][:: -1 if table_first else 1]
    return graph(path, nodes, inputs, [("y", ["N", 5])])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (SMALL, Profile(1, 2, 4, (ShapeRange("input", (1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 16, 16)),))),
        ("x:1x3x8x8", Profile(1, 1, 1, (ShapeRange("x", *[(1, 3, 8, 8)] * 3),))),
        # Names of TensorFlow contain a colon.
        ("x:0:2x8", Profile(2, 2, 2, (ShapeRange("x:0", *[(2, 8)] * 3),))),
        ("x:0:1x8:2x8:4x8", Profile(1, 2, 4, (ShapeRange("x:0", (1, 8), (2, 8), (4, 8)),))),
        (
            "a:1x4:2x4:8x4,b:1x9",
            Profile(1, 2, 8, (ShapeRange("a", (1, 4), (2, 4), (8, 4)), ShapeRange("b", *[(1, 9)] * 3))),
        ),
    ],
)
def test_shapes_of_inputs_are_read_as_they_print(text: str, wanted: Profile) -> None:
    assert parse_profile(text) == wanted
    assert parse_profile(str(wanted)) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "1x3x8x8",
        "x:1x3x8x8:1x3x8x8",
        "x:1x3x8x8:1x3x8:1x3x8x8",
        "x:2x3x8x8:1x3x8x8:4x3x8x8",
        "x:1x3x8x8:1x3x32x32:1x3x16x16",
        "x:0x3x8x8",
        "x:1x3xWx8",
        "x:1x-1",
        ":1x3",
        "x:1x3,",
        "x:1x3,8",
        "x:1x3,x:1x4",
    ],
)
def test_shapes_that_are_none_are_refused(text: str, source: Path, cli: Cli) -> None:
    with pytest.raises(InputError, match="invalid profile"):
        parse_profile(text)
    ran = cli("build", source, "--backend", "onnxruntime", f"--profile={text}")
    assert (ran.code, repr(text) in ran.err) == (3, True)


def printed(cli: Cli, source: Path, *options: object) -> list[list[str]]:
    ran = cli("build", source, *options)
    assert ran.code == 0, ran.err
    return [shlex.split(line) for line in ran.out.splitlines() if not line.startswith("#")]


def test_trtexec_gets_the_shapes_and_a_plan_for_each_profile(source: Path, cli: Cli) -> None:
    options = ("--backend", "tensorrt", "--print-trtexec", 10, "--profile", SMALL, "--profile", LARGE)
    first, second = printed(cli, source, *options)
    assert {"--minShapes=input:1x3x8x8", "--optShapes=input:2x3x8x8", "--maxShapes=input:4x3x16x16"} <= set(first)
    assert {"--minShapes=input:1x3x16x16", "--optShapes=input:2x3x32x32", "--maxShapes=input:4x3x64x48"} <= set(second)
    plans = [next(word for word in line if word.startswith("--saveEngine=")) for line in (first, second)]
    # Both are tuned for one batch.
    assert plans[0] != plans[1]


def test_trtexec_gets_the_batch_of_inputs_without_shapes_and_none_of_fixed_ones(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "gain"], ["a"]), helper.make_node("Mul", ["a", "scale"], ["y"])]
    inputs = [("x", ["N", 3, "H"]), ("gain", ["N", 3, 1]), ("scale", [3, 1])]
    source = graph(tmp_path / "m.onnx", nodes, inputs, [("y", ["N", 3, "H"])])
    profile = parse_profile("x:1x3x8:2x3x8:4x3x16")
    (line,) = trtexec_lines(describe_onnx(source), (profile,), False, TrtOptions(), tmp_path / "e.plan", 11)
    shapes = [word for word in shlex.split(line) if "Shapes=" in word]
    assert shapes == [
        "--minShapes=x:1x3x8,gain:1x3x1",
        "--optShapes=x:2x3x8,gain:2x3x1",
        "--maxShapes=x:4x3x16,gain:4x3x1",
    ]


def test_polygraphy_gets_the_shapes_of_every_profile(source: Path, cli: Cli) -> None:
    options = ("--backend", "tensorrt-rtx", "--print-polygraphy", "--profile", SMALL, "--profile", LARGE)
    (line,) = printed(cli, source, *options)
    shapes = {kind: [line[i + 1] for i, word in enumerate(line) if word == f"--trt-{kind}-shapes"] for kind in KINDS}
    assert shapes == {
        "min": ["input:[1,3,8,8]", "input:[1,3,16,16]"],
        "opt": ["input:[2,3,8,8]", "input:[2,3,32,32]"],
        "max": ["input:[4,3,16,16]", "input:[4,3,64,48]"],
    }


@pytest.mark.parametrize(
    ("profiles", "told"),
    [
        (["1:2:4"], "only the batch may be dynamic where no profile has its shapes"),
        ([SMALL, "1:2:4"], "only the batch may be dynamic where no profile has its shapes"),
        (["image:1x3x8x8"], "no input is called 'image'"),
        (["input:1x4x8x8"], "input:1x4x8x8:1x4x8x8:1x4x8x8 does not fit"),
        (["input:1x3x8"], "does not fit"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(profiles: list[str], told: str, source: Path) -> None:
    with pytest.raises(InputError) as caught:
        require_compatible_shapes(describe_onnx(source), [parse_profile(text) for text in profiles])
    assert told in str(caught.value)


def test_the_command_asks_for_shapes_with_an_example(compiler: Backend, source: Path, cli: Cli) -> None:
    ran = cli("build", source, "--backend", compiler, "--profile", "1:2:4")
    assert (ran.code, ran.out) == (3, "")
    assert "--profile input:1x3x224x224:1x3x224x224:1x3x224x224" in ran.err
    assert [path.name for path in source.parent.iterdir()] == ["net.onnx"]


def test_plans_are_built_for_the_shapes_and_their_record_keeps_them(compiler: Backend, source: Path) -> None:
    profiles = (parse_profile(SMALL), parse_profile(LARGE))
    record = build(source, backend=compiler, sparse=False, profiles=profiles)
    assert read_engine(record.path) == record
    assert record.profiles == profiles
    assert record.inputs[0].shape == (None, 3, None, None)
    other = build(source, backend=compiler, sparse=False, profiles=profiles[:1])
    assert other.sha256 != record.sha256


@pytest.mark.slow
@NEEDS_RTX
def test_polygraphys_plan_of_the_printed_command_is_the_same(source: Path, cli: Cli, tmp_path: Path) -> None:
    """Builds of a graph with dynamic sizes now and then differ in the compiler's own numbers, a few bytes of a megabyte."""
    ours, theirs = tmp_path / "ours.plan", tmp_path / "theirs.plan"
    options = ("build", source, "--backend", "tensorrt-rtx", "--tf32", "--profile", SMALL, "--profile", LARGE)
    printed = cli(*options, "-o", theirs, "--print-polygraphy").out
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    built: dict[Path, set[bytes]] = {ours: set(), theirs: set()}
    for _ in range(8):
        assert cli(*options, "-o", ours).code == 0
        done = subprocess.run(["bash", "-c", printed], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        for path, plans in built.items():
            plans.add(path.read_bytes())
        if built[ours] & built[theirs]:
            return
    pytest.fail(f"no plan in common: {[len(plans) for plans in built.values()]} different ones")


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def test_images_run_in_the_profile_tuned_closest_to_their_size(
    trt: Control, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [SMALL, LARGE, "input:1x3x8x8:1x3x8x8:1x3x64x64", "input:1x3x8x8:2x3x16x16:4x3x32x32"]
    plan = build(source, profiles=tuple(map(parse_profile, texts)))
    context = sys.modules["tensorrt"].IExecutionContext
    select, selected = context.set_optimization_profile_async, list[int]()
    monkeypatch.setattr(
        context, "set_optimization_profile_async", lambda self, i, stream: selected.append(i) or select(self, i, stream)
    )
    engine = TrtEngine(plan)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    # By the batch first, then by height and width; a profile that does not contain the size is none.
    for shape, profile in (
        ((1, 3, 8, 8), 2), ((1, 3, 64, 64), 2), ((2, 3, 8, 8), 0), ((2, 3, 16, 16), 3), ((4, 3, 28, 28), 1),
        ((4, 3, 9, 9), 0), ((3, 3, 64, 48), 1), ((2, 3, 16, 12), 3),
    ):  # fmt: skip
        selected.clear()
        found = engine.infer({"input": images(*shape)})["logits"]
        assert set(selected) == {profile}, shape
        np.testing.assert_allclose(found, session.run(None, {"input": images(*shape)})[0], atol=1e-2)
    for shape in ((4, 3, 64, 64), (5, 3, 8, 8), (1, 3, 7, 8)):
        with pytest.raises(InputError, match="no profile contains the shapes"):
            engine.infer({"input": images(*shape)})
    engine.close()


@pytest.mark.parametrize("table_first", [False, True])
def test_the_batch_is_that_of_the_input_that_has_one(table_first: bool, trt: Control, tmp_path: Path) -> None:
    source = two_inputs(tmp_path / "m.onnx", table_first=table_first)
    plan = build(source, profiles=(parse_profile("x:1x3x8x8:1x3x8x8:2x3x16x16"), parse_profile("x:4x3x8x8")))
    engine = TrtEngine(plan)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 4):
        feeds = {"x": images(batch, 3, 8, 8), "table": images(3, 5)}
        np.testing.assert_allclose(engine.infer(feeds)["y"], session.run(None, feeds)[0], rtol=1e-4, atol=1e-5)
    engine.close()
