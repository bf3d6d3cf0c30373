"""`maskplan engine --refine`: the second pass of the whole line, on the stand-in for TensorRT."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import fake_cuda
import fake_tensorrt
import numpy as np
import onnx
import pytest
import torch
from fake_tensorrt import Control
from safetensors.numpy import load_file
from small_line import RECIPE, STAGES, digests, read_json, stages_of

from maskplan.engines.sidecar import read_engine
from maskplan.exporters.conformance import check_2to4
from maskplan.pipeline.cli.app import main
from maskplan.pipeline.stages.workspace import STATE

MODEL = """
import torch
from torch import nn

PREPROCESSING = {"height": 16, "width": 16, "resize": 0, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.a, self.norm = nn.Conv2d(8, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.b, self.c = nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.a(torch.relu(self.stem(x)))))
        return self.head(self.c(torch.relu(self.b(x))).mean((2, 3)))


def net():
    return Three()
"""

PLAN_FILES = (
    "masks.safetensors", "sparse.safetensors", "sparse.onnx", "sparse.fp16.onnx", "dense_engine.plan",
    "dense_engine.plan.json", "dense.onnx",
)  # fmt: skip
SECOND = (
    "refined-mask", "refined-bake-sparse", "refined-recalibrate-sparse", "refined-export-sparse", "refined-check",
    "refined-baseline-mask", "refined-bake-magnitude", "refined-export-magnitude", "refined-build-candidate",
    "refined-build-pruned", "compare-select", "refined-compare-select", "refined-time",
)  # fmt: skip
LAST = ("keep-engine", "refined-compare", "depth", "statistics", "report")


@dataclass(frozen=True)
class Plain:
    """A finished run without a second pass, and its options."""

    out: Path
    options: tuple[str, ...]


def trained() -> torch.nn.Module:
    """Tells the classes of the toy data, which are colors, so that spoilt outputs show as a loss of accuracy."""
    namespace: dict[str, Any] = {}
    exec(MODEL, namespace)
    torch.manual_seed(5)
    net: torch.nn.Module = namespace["net"]()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(40):
        labels = torch.randint(3, (32,))
        pixels = 120 * torch.rand(32, 3, 16, 16)
        pixels[torch.arange(32), 2 - labels] += 120
        loss = torch.nn.functional.cross_entropy(net((pixels / 255 - 0.5) / 0.25), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def install(monkeypatch: pytest.MonkeyPatch, *dense: str) -> Control:
    control = fake_tensorrt.install("10.13.3.9", fake_cuda.install(monkeypatch), monkeypatch)
    # PyTorch's exporter looks which packages are there.
    sys.modules["tensorrt"].__spec__ = ModuleSpec("tensorrt", None)
    control.dense.update(dense)
    return control


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, toy_data: Path) -> Plain:
    """Run once with the stand-in, whose layers `a` and `b` run dense; do not write to it."""
    folder = tmp_path_factory.mktemp("three")
    (folder / "three.py").write_text(MODEL)
    (folder / "recipe.toml").write_text(RECIPE)
    torch.save(trained().state_dict(), folder / "w.pth")
    options = (
        f"{folder}/three.py:net",
        "--weights",
        f"{folder}/w.pth",
        "--data",
        str(toy_data),
        "--masks",
        "magnitude",
    )
    options += ("--recipe", f"{folder}/recipe.toml")
    with pytest.MonkeyPatch.context() as monkeypatch:
        install(monkeypatch, "a", "b")
        assert main(["engine", *options, "--backend", "tensorrt", "--out", str(folder / "out")]) == 0
    return Plain(folder / "out", options)


@pytest.fixture(scope="module")
def finished_refined(finished: Plain, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """The finished run continued with a second pass; do not write to it."""
    out = Path(shutil.copytree(finished.out, tmp_path_factory.mktemp("refined") / "out"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        trt = install(monkeypatch, "a", "b")
        slow(monkeypatch, trt, {3: 8, 1: 2, 0: 2})
        assert main(["engine", *finished.options, "--backend", "tensorrt", "--refine", "--out", str(out)]) == 0
    return Plain(out, finished.options)


@pytest.fixture
def refined(finished_refined: Plain, tmp_path: Path) -> Plain:
    """A copy of the run with a second pass, to go on with."""
    return Plain(Path(shutil.copytree(finished_refined.out, tmp_path / "refined")), finished_refined.options)


@pytest.fixture
def refine_again(refined: Plain, trt: Control, cli: Callable[..., Any]) -> Callable[..., Any]:
    """Run the refined folder again."""
    return lambda: cli("engine", *refined.options, "--backend", "tensorrt", "--refine", "--out", refined.out)


@pytest.fixture
def plain(finished: Plain, tmp_path: Path) -> Plain:
    """A copy, to go on with."""
    return Plain(Path(shutil.copytree(finished.out, tmp_path / "out")), finished.options)


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Control:
    return install(monkeypatch, "a", "b")


@pytest.fixture
def refine(plain: Plain, cli: Callable[..., Any]) -> Callable[..., Any]:
    """Run again with a second pass."""
    return lambda *more: cli("engine", *plain.options, "--backend", "tensorrt", "--refine", *more, "--out", plain.out)


def masked_in(plan: Path) -> tuple[str, ...]:
    provenance = read_engine(plan).provenance
    assert provenance is not None
    return provenance.masked


def before_running(monkeypatch: pytest.MonkeyPatch, work: Callable[[int, Any], None]) -> None:
    """Have the stand-in's engines do something first, given how many of their convolutions are 2:4: 3, 1 or 0 of them."""
    kind = sys.modules["tensorrt"].ICudaEngine
    real = kind._run

    def run(self: Any, shapes: Any, addresses: Any) -> None:
        work(sum(layer["HasSparseWeights"] for layer in self._header["layers"]), self)
        real(self, shapes, addresses)

    monkeypatch.setattr(kind, "_run", run)


def slow(monkeypatch: pytest.MonkeyPatch, trt: Control, ms: dict[int, int]) -> None:
    """By the GPU's clock, which tells TensorRT's engines apart."""

    def spend(conforming: int, _: Any) -> None:
        trt.gpu.clock_ms += ms[conforming]

    before_running(monkeypatch, spend)


def test_the_refined_engine_is_kept_when_it_is_no_worse(
    plain: Plain, refine: Callable[..., Any], trt: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, trt, {3: 8, 1: 2, 0: 2})
    before = digests(plain.out, PLAN_FILES)
    first = read_engine(plain.out / "engine.plan")

    ran = refine()

    assert ran.code == 0, ran.err
    report = read_json(plain.out / "report.json")
    told = report["refine"]
    assert (told["restored"], told["kept"]) == (["a.weight", "b.weight"], "refined")
    assert told["refined"]["top1_drop"] <= told["first"]["top1_drop"]
    assert told["first"]["engine_sha256"] == first.sha256 != told["refined"]["engine_sha256"]
    assert [told[n]["masked_layers"] for n in ("first", "refined")] == [3, 1]
    # The first pass's files stay; its engine makes way.
    assert digests(plain.out, PLAN_FILES) == before
    kept = read_engine(plain.out / "engine.plan")
    assert kept.sha256 == report["engine"]["sha256"] == told["refined"]["engine_sha256"]
    assert [report[n]["path"] for n in ("engine", "dense_engine")] == ["engine.plan", "dense_engine.plan"]
    assert kept.onnx_sha256 == digests(plain.out, ["refined-sparse.fp16.onnx"])["refined-sparse.fp16.onnx"]
    assert kept.provenance is not None
    assert kept.provenance.masked == ("c.weight",)
    assert {m["name"]: m["verdict"] for m in report["conformance"]["weights"]}["b.weight"] == "dense_by_choice"
    assert (report["masks"]["path"], report["masks"]["masked_layers"]) == ("refined-masks.safetensors", 1)
    assert {d["name"]: d["reason"] for d in report["masks"]["dense"]}["a.weight"] == "ran_dense"
    # The choice was made on `select`, the verdict on `val`.
    assert report["parity"]["images"] == 24
    for name in ("compare-select.json", "refined-compare-select.json"):
        assert read_json(plain.out / STATE / name)["record"]["images"] == 6
    assert report["timing"]["batches"][0]["by"] == "gpu"
    assert report["timing"]["batches"][0]["sparse"]["gpu_ms"] == told["refined"]["batches"][0]["p50_ms"] < 8
    assert report["timing"]["batches"][0]["speedup"] == told["refined"]["batches"][0]["speedup"]
    assert f"refine       refined engine kept: {told['reason']}" in ran.out
    page = (plain.out / "report.html").read_text()
    assert "2 masked layers ran dense and got their dense weights back" in page
    assert "refined (kept)" in page


def test_restored_weights_are_the_dense_ones_and_the_others_stay_pruned(finished_refined: Plain) -> None:
    out = finished_refined.out
    dense, first, second = (load_file(out / f"{n}.safetensors") for n in ("dense", "sparse", "refined-sparse"))
    for name in ("a.weight", "b.weight"):
        assert np.array_equal(second[name], dense[name])
        assert not np.array_equal(first[name], dense[name])
    assert np.array_equal(second["c.weight"], first["c.weight"])
    for suffix in (".onnx", ".fp16.onnx"):
        with_masks, without, refined = (
            {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(out / (n + suffix)).graph.initializer}
            for n in ("sparse", "dense", "refined-sparse")
        )
        assert np.array_equal(refined["b.weight"], without["b.weight"])
        assert np.array_equal(refined["c.weight"], with_masks["c.weight"])
        # Recalibrated statistics are folded into the weight before them, a factor for each output channel.
        ratio = refined["a.weight"].astype(float) / without["a.weight"]
        assert np.allclose(ratio, ratio[:, :1, :1, :1], rtol=1e-2)
        verdicts = {w.name: w.verdict for w in check_2to4(out / ("refined-sparse" + suffix)).weights}
        assert verdicts["a.weight"] == verdicts["b.weight"] == "dense_by_choice"
        assert verdicts["c.weight"] == "conforming"
    assert set(load_file(out / "refined-masks.safetensors")) == {"c.weight"}


def test_a_second_pass_takes_the_first_as_it_is_and_builds_twice(
    plain: Plain, refine: Callable[..., Any], trt: Control
) -> None:
    ran = refine()

    # The engine with the flag and, for a fair comparison, without it; the dense one is not built again.
    assert trt.builds == 2
    assert stages_of(ran.err).made == ("build-candidate", *SECOND, *LAST)
    assert {"build-dense", "build-pruned", "time"} <= set(stages_of(ran.err).reused)


def test_nothing_is_done_again_when_nothing_has_changed(refined: Plain, refine_again: Callable[..., Any]) -> None:
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in refined.out.rglob("*") if p.name not in ("lock", "")}

    ran = refine_again()

    assert ran.code == 0
    assert stages_of(ran.err).made == ()
    assert set(SECOND) | set(LAST) <= set(stages_of(ran.err).reused)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in before} == before


@pytest.mark.slow
def test_a_first_run_with_a_second_pass_ends_like_one_that_came_to_it_later(
    refined: Plain, trt: Control, cli: Callable[..., Any], tmp_path: Path
) -> None:
    ran = cli("engine", *refined.options, "--backend", "tensorrt", "--refine", "--out", tmp_path / "new")

    assert ran.code == 0
    assert "build-sparse" not in stages_of(ran.err).made
    files = ("masks.safetensors", "refined-masks.safetensors", "refined-sparse.onnx", "refined-sparse.safetensors")
    assert digests(tmp_path / "new", files) == digests(refined.out, files)
    assert (tmp_path / "new" / "engine.plan").is_file()


def test_the_first_engine_is_kept_when_the_refined_one_is_slower(
    plain: Plain, refine: Callable[..., Any], trt: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, trt, {3: 2, 1: 20, 0: 4})
    first = digests(plain.out, ["engine.plan"])
    # Timed anew, at this speed.
    (plain.out / ".maskplan" / "time.json").unlink()

    ran = refine()

    told = read_json(plain.out / "report.json")["refine"]
    assert (ran.code, told["kept"]) == (0, "first")
    assert "slower beyond the noise" in told["reason"]
    assert told["refined"]["batches"][0]["p50_ms"] > 2 * told["first"]["batches"][0]["p50_ms"]
    assert digests(plain.out, ["engine.plan"]) == first
    report = read_json(plain.out / "report.json")
    assert report["masks"]["path"] == "masks.safetensors"
    assert report["timing"]["batches"][0]["sparse"]["gpu_ms"] == told["first"]["batches"][0]["p50_ms"]
    assert report["conformance"]["conforming"] == 3
    assert "refine       first engine kept: " in ran.out
    assert "first (kept)" in (plain.out / "report.html").read_text()


def test_the_first_engine_is_kept_when_the_refined_one_loses_more(
    plain: Plain, refine: Callable[..., Any], trt: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    def confuse(conforming: int, engine: Any) -> None:
        if conforming == 1 and not hasattr(engine, "confused"):
            real, engine.confused = engine._session, True
            engine._session = Confused(real)

    class Confused:
        """Ranks the classes the other way round."""

        def __init__(self, session: Any) -> None:
            self._session = session

        def __getattr__(self, name: str) -> Any:
            return getattr(self._session, name)

        def run(self, *arguments: Any) -> Any:
            return [-array for array in self._session.run(*arguments)]

    slow(monkeypatch, trt, {3: 8, 1: 2, 0: 2})
    before_running(monkeypatch, confuse)
    first = digests(plain.out, ["engine.plan"])

    assert refine().code == 0

    told = read_json(plain.out / "report.json")["refine"]
    assert told["refined"]["top1_drop"] > 50 > told["first"]["top1_drop"]
    assert told["kept"] == "first"
    assert told["reason"].startswith("the refined engine is worse: top-1 drop ")
    assert digests(plain.out, ["engine.plan"]) == first


def test_a_run_without_the_option_has_the_first_engine_again_without_a_build(
    finished: Plain,
    refined: Plain,
    refine_again: Callable[..., Any],
    trt: Control,
    cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow(monkeypatch, trt, {3: 8, 1: 2, 0: 2})
    first = digests(finished.out, ["engine.plan"])
    assert digests(refined.out, ["engine.plan"]) != first
    builds = trt.builds

    ran = cli("engine", *refined.options, "--backend", "tensorrt", "--out", refined.out)

    assert ran.code == 0
    assert stages_of(ran.err).made == ("build-sparse", "depth", "statistics", "report")
    assert trt.builds == builds
    assert digests(refined.out, ["engine.plan"]) == first
    assert masked_in(refined.out / "engine.plan") == ("a.weight", "b.weight", "c.weight")
    assert read_json(refined.out / "report.json")["refine"] is None
    # And back: the second pass is not made again either.
    assert stages_of(refine_again().err).made == ("keep-engine", "depth", "statistics", "report")


def test_a_second_pass_that_failed_goes_on_where_it_was(plain: Plain, refine: Callable[..., Any], trt: Control) -> None:
    trt.failures.add("build")
    failed = refine()
    assert failed.code == 3
    assert stages_of(failed.err).made[-1] == "refined-build-candidate"
    trt.failures.clear()

    ran = refine()

    assert ran.code == 0
    assert stages_of(ran.err).made == (*SECOND[SECOND.index("refined-build-candidate") :], *LAST)


@pytest.mark.parametrize("name", ["engine.plan", ".maskplan/candidate.plan", "refined-masks.safetensors"])
def test_a_file_of_the_second_pass_that_is_gone_is_made_again(
    refined: Plain, refine_again: Callable[..., Any], trt: Control, name: str
) -> None:
    before, builds = digests(refined.out, [name]), trt.builds
    (refined.out / name).unlink()

    ran = refine_again()

    assert ran.code == 0
    # The candidate's twin may be gone as well, and a stand-in's builds are all alike.
    assert digests(refined.out, [name]) == before
    assert trt.builds - builds <= (name == ".maskplan/candidate.plan")


def test_it_is_skipped_where_all_run_sparse(
    plain: Plain, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    # Built again, now with sparse kernels everywhere.
    for stage in ("build-sparse", "build-pruned", "build-dense"):
        (plain.out / ".maskplan" / f"{stage}.json").unlink()

    ran = cli("engine", *plain.options, "--backend", "tensorrt", "--refine", "--out", plain.out)

    assert ran.code == 0
    told = read_json(plain.out / "report.json")["refine"]
    assert (told["restored"], told["kept"], told["refined"]) == ([], "first", None)
    assert told["reason"] == "all 3 masked layers run sparse"
    assert not [name for name in stages_of(ran.err).made if name.startswith("refined")]
    assert masked_in(plain.out / "engine.plan") == ("a.weight", "b.weight", "c.weight")
    assert "refine       skipped: all 3 masked layers run sparse" in ran.out


def test_it_is_skipped_for_a_graph_of_floats_where_all_run_dense(
    plain: Plain, refine: Callable[..., Any], trt: Control
) -> None:
    assert refine("--precision", "fp32").code == 0

    told = read_json(plain.out / "report.json")["refine"]
    assert told["reason"].startswith("all 3 masked layers run dense")
    assert not (plain.out / "refined-masks.safetensors").exists()


def test_onnx_runtime_gives_no_evidence_and_skips(plain: Plain, cli: Callable[..., Any]) -> None:
    options = (*plain.options, "--backend", "onnxruntime", "--refine", "--out", plain.out)

    ran = cli("engine", *options)

    assert ran.code == 0
    report = read_json(plain.out / "report.json")
    assert report["refine"]["reason"] == "onnxruntime gives no evidence of which layers run sparse"
    assert (report["refine"]["kept"], report["refine"]["refined"]) == ("first", None)
    assert report["refine"]["first"]["engine_sha256"] == report["engine"]["sha256"]
    assert report["engine"]["path"] == "engine.onnx"
    assert "No second pass: onnxruntime gives no evidence" in (plain.out / "report.html").read_text()
    again = cli("engine", *options)
    assert stages_of(again.err).made == ()
    assert set(stages_of(again.err).reused) <= {*STAGES, "build-candidate", "keep-engine"}


def test_what_a_second_pass_wrote_names_no_place_on_the_host(finished_refined: Plain) -> None:
    out = finished_refined.out
    private = [str(out.parent), str(Path(finished_refined.options[0]).parent)]
    for path in out.rglob("*"):
        if path.is_file():
            assert not [p for p in private if p.encode() in path.read_bytes()], path.name
