"""Run reports by hand, from a plain one to one with everything that a run can find."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from maskplan.pipeline.core.artifacts import (
    Checkpoint,
    DenseLayer,
    EngineFile,
    ImageSet,
    Learning,
    MaskedLayer,
    MaskSet,
    Pattern,
    Preprocessing,
    Profile,
    Provenance,
)
from maskplan.pipeline.core.compilation import (
    CompiledLayer,
    CompiledProfile,
    CompileProblem,
    CompileReport,
    CompileResult,
    CompileWarning,
    TensorFormat,
)
from maskplan.pipeline.core.reports import (
    BatchTiming,
    Check,
    ClassDrop,
    ConformanceReport,
    DepthReport,
    Fidelity,
    Flips,
    Latency,
    LayerDifference,
    MethodRow,
    ParityReport,
    TimingReport,
    WeightVerdict,
)
from maskplan.pipeline.masking.statistics import GroupStatistics, LayerStatistics, MaskStatistics, PatternCount
from maskplan.pipeline.permutation.record import ChannelGroup, Permutation, Permuted
from maskplan.pipeline.recipe import Recipe
from maskplan.pipeline.report.record import RunReport

HOW = Preprocessing(3, 8, 8, 0, "bilinear", (0.0,) * 3, (1.0,) * 3)
MADE = Provenance("net", True, "weights.pth", "d" * 64, 5, (), HOW, ("a.weight",), "2:4", "channel", "learned", 640)
SHAPE = "\N{MULTIPLICATION SIGN}".join("8433")
DENSE_ROW, SPARSE_ROW = (
    MethodRow("dense", 91.0, 99.0, 0.0, (-0.1, 0.1)),
    MethodRow("ours", 90.25, 98.5, 0.75, (0.2, 1.3)),
)
PARITY = ParityReport(
    "pass", None, 400, 91.0, 99.0, 90.25, 98.5, 0.75, (0.2, 1.3), 97.75, 0.5, 0.99, 1.0, (DENSE_ROW, SPARSE_ROW)
)
UNTRAINED = ParityReport(
    "not_applicable", "the weights are random", 0, None, None, None, None, None, None, None, 0.5, 0.99, 1.0
)
FAILED = replace(PARITY, verdict="fail", reason="top-1 drops by 12.50 points; the limit is 1", top1_drop=12.5)
NOT_FINITE = replace(UNTRAINED, verdict="fail", reason="the outputs are not finite", max_abs_diff=None, cosine_min=None)


def engine(folder: Path, **changed: Any) -> EngineFile:
    known: dict[str, Any] = {
        "path": folder / "engine.onnx",
        "sha256": "e" * 64,
        "bytes": 1234567,
        "backend": "onnxruntime",
        "precision": "fp32",
        "runtime_version": "9.9",
        "device": "CPU",
        "compute_capability": None,
        "device_memory_bytes": None,
        "sparse_weights": False,
        "typing": "strong",
        "profiles": (Profile(1, 1, 1),),
        "inputs": (),
        "outputs": (),
        "onnx_sha256": "f" * 64,
        "build_s": 0.5,
        "provenance": MADE,
    }
    return EngineFile(**known | changed)


def weight(name: str, verdict: str, reason: str | None = None) -> WeightVerdict:
    node, axis = name.removesuffix(".weight"), None if verdict == "ineligible" else 1
    return WeightVerdict(name, node, "Conv", (8, 4, 3, 3), axis, "float", verdict, reason, 72, 0, 0, None, False)


def report_of(folder: Path, **changed: Any) -> RunReport:
    one = Latency(4.0, 5.0, 6.0, 250.0, None, None, 4.5, 4.25)
    timed = BatchTiming(8, 50, one, one, replace(one, p50_ms=2.0), "host", 2.0, (1.9, 2.1), 0.013)
    masks = MaskSet(
        folder / "masks.safetensors",
        "a" * 64,
        "net",
        Pattern(2, 4),
        "channel",
        "learned",
        "d" * 64,
        (MaskedLayer("a.weight", (8, 4, 3, 3), 72, 1000, 0.7125, 0.7531),),
        (
            DenseLayer("b.weight", (8, 3, 3, 3), 500, "channels_not_multiple_of_4"),
            DenseLayer("c", (2, 8), 16, "linear"),
        ),
        Learning("maskplan", 3, 30, 100, 1.5, 0.31, 0.2, 0.1, 80.0, 90.0),
    )
    verdicts = (weight("b.weight", "ineligible", "channels_not_multiple_of_4"), weight("a.weight", "conforming"))
    known: dict[str, Any] = {
        "model": MADE,
        "precision": "fp32",
        "backend_reason": "no accelerator",
        "seed": 7,
        "recipe": Recipe(),
        "masks": masks,
        "conformance": ConformanceReport("pass", None, "2:4", 2, 1, 0, 1, 1, verdicts),
        "engine": engine(folder),
        "dense_engine": engine(folder),
        "fidelity": Fidelity(32, 1e-6, 1.0, 100.0),
        "parity": PARITY,
        "timing": TimingReport("a device", 2, "a note", (timed,)),
    }
    return RunReport(**known | changed)


def compiled_result(name: str = "sparse", **changed: Any) -> CompileResult:
    """A file of two layers that was accepted."""
    half, single = TensorFormat("Half", "NHWC"), TensorFormat("Float", "Linear")
    layers = (
        CompiledLayer("__myl_Cast_myl0_0", "kgen", "cast", "Float", (single,), (half,), ("Cast",), ("to_fp16",)),
        CompiledLayer("a_myl0_1", "correlation", "product", "Half", (half,), (half,), (), ("a", "relu")),
    )
    counts = ({"correlation": 1, "kgen": 1}, {"cast": 1, "product": 1}, {"Half": 1})
    known: dict[str, Any] = {
        "onnx": f"{name}.fp16.onnx",
        "onnx_sha256": "4" * 64,
        "precision": "fp16",
        "compiler": "TensorRT-RTX",
        "version": "1.7.1.116",
        "accepted": True,
        "problems": (),
        "profiles": (CompiledProfile("1:8:8", layers, *counts),),
        "warnings": (CompileWarning("converting scales", 18),),
        "unread_lines": (),
        "path": None,
        "sha256": "5" * 64,
        "size_bytes": 7654321,
        "build_s": 1.25,
    }
    return CompileResult(**known | changed)


def refused_result(name: str = "sparse") -> CompileResult:
    """A file that was refused."""
    problem = CompileProblem("layer.unique", "Unique", "the operator is not supported", "write it with others")
    nothing: dict[str, Any] = {"profiles": (), "warnings": (), "sha256": None, "size_bytes": None}
    return compiled_result(name, accepted=False, problems=(problem,), **nothing)


def full(folder: Path) -> RunReport:
    """Everything that a run can find."""
    plain = report_of(folder)
    groups = (
        ChannelGroup("a", 8, "moved", None, 4, ("a.weight",), 1.0, 1.5, 80.0),
        ChannelGroup("b", 16, "fixed", "they reach an output"),
        ChannelGroup("c", 16, "fixed", "they reach an output"),
    )
    made = Checkpoint(folder / "permuted.safetensors", "1" * 64, 10, MADE)
    layers = (LayerDifference("b", "Conv", "t", 0.004, 0.999), LayerDifference("a", "Conv", "u", 0.5, 0.81, 2.25))
    counts = GroupStatistics(72, (0, 2, 70, 0, 0), 18, (PatternCount("1100", 50, 30), PatternCount("0011", 22, 42)), 0)
    parity = replace(
        PARITY,
        flips=Flips(9, 5, 3, 1),
        flip_rate=2.25,
        flip_rate_ci95=(1.03, 4.23),
        mcnemar_p=0.73,
        classes=(ClassDrop("cat", 50, 90.0, 80.0, 10.0), ClassDrop("dog", 50, 90.0, 92.0, -2.0)),
        checks=(
            Check("max_top1_drop", 1.0, 0.75, 0.75, True, "fine"),
            Check("min_agreement", 99.0, 97.75, 97.75, False, "too low"),
            Check("max_top5_drop", 1.0, None, None, None, "no labels"),
        ),
        notes=("few images",),
    )
    return replace(
        plain,
        model=replace(MADE, image_sets=(ImageSet("train", 900, "4" * 64), ImageSet("select", 100, "5" * 64))),
        parity=parity,
        depth=DepthReport(32, 0.01, layers, "a", ("x", "y")),
        mask_statistics=MaskStatistics("2:4", (LayerStatistics("a.weight", counts),), counts),
        permutation=Permuted(
            made, Permutation(folder / "p.safetensors", "2" * 64, "net", "2:4", "3" * 64, groups), 200.0, 230.0, 260.0
        ),
        command="maskplan engine net --permute",
        compile=CompileReport(
            compiled_result("dense"), compiled_result(path=folder / "sparse.rtx.plan", unread_lines=("Name: ?",))
        ),
    )


CASES: dict[str, dict[str, Any]] = {
    "passed": {},
    "untrained": {"model": replace(MADE, trained=False, origin="random, seed 7"), "parity": UNTRAINED},
    "failed": {"parity": FAILED},
    "not finite": {"parity": NOT_FINITE, "fidelity": Fidelity(32, None, None, 0.0)},
    "refused": {"compile": CompileReport(compiled_result("dense"), refused_result())},
    "not compiled": {"compile_reason": "TensorRT-RTX is not installed"},
    "not timed": {"timing": TimingReport("a device", 2, "", ())},
    "not conforming": {
        "conformance": ConformanceReport(
            "fail", "1 weight violates 2:4", "2:4", 1, 0, 1, 0, 0, (weight("a", "violating"),)
        )
    },
}
