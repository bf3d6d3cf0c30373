"""report.html: one page that fetches nothing, shows foreign names as text, and says what was found."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from pipeline import plots
from pipeline.artifacts import (
    DenseLayer,
    EngineFile,
    LayerSparsity,
    Learning,
    MaskedLayer,
    MaskSet,
    Pattern,
    Preprocessing,
    Profile,
    Provenance,
)
from pipeline.recipe import Recipe
from pipeline.report import RunReport, report_values
from pipeline.report_html import layer_rows, render
from pipeline.reports import (
    BatchTiming,
    ConformanceReport,
    Fidelity,
    GpuClocks,
    Latency,
    MethodRow,
    ParityReport,
    TimingReport,
    WeightVerdict,
)

HOW = Preprocessing(3, 8, 8, 0, "bilinear", (0.0,) * 3, (1.0,) * 3)
MADE = Provenance("net", True, "weights.pth", "d" * 64, 5, (), HOW, ("a.weight",), "2:4", "channel", "learned", 640)
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
FAILED = replace(PARITY, verdict="fail", reason="top-1 drops by 12.50 points; 1 are allowed", top1_drop=12.5)
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


def page_of(report: RunReport) -> str:
    return render(report, report_values(report))


class Page(HTMLParser):
    """Every tag with its attributes, the text, and tags that are not closed in order."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input", "base", "source", "embed"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.crossed: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.crossed.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def fetched(self) -> Iterator[str]:
        """What a browser would ask for or run beyond the page itself."""
        for tag, attributes in self.tags:
            if tag in ("script", "iframe", "object", "embed", "base", "form"):
                yield tag
            for name, value in attributes.items():
                if name.startswith("on"):
                    yield f"{tag} {name}"
                if name in ("src", "href", "xlink:href", "srcset", "data", "poster", "action", "background"):
                    yield from () if (value or "").startswith(("#", "data:")) else (f"{tag} {name}={value}",)
                yield from outside(value or "")
        yield from outside(" ".join(self.texts))


def outside(style: str) -> Iterator[str]:
    yield from re.findall(r"@import|expression\s*\(", style)
    yield from (u for u in re.findall(r"url\(\s*['\"]?([^)'\"]*)", style) if not u.startswith(("#", "data:")))


CASES: dict[str, dict[str, Any]] = {
    "passed": {},
    "untrained": {"model": replace(MADE, trained=False, origin="random, seed 7"), "parity": UNTRAINED},
    "failed": {"parity": FAILED},
    "not finite": {"parity": NOT_FINITE, "fidelity": Fidelity(32, None, None, 0.0)},
    "not timed": {"timing": TimingReport("a device", 2, "", ())},
    "not conforming": {
        "conformance": ConformanceReport(
            "fail", "1 weight violates 2:4", "2:4", 1, 0, 1, 0, 0, (weight("a", "violating"),)
        )
    },
}


@pytest.mark.parametrize("case", CASES)
def test_the_page_fetches_nothing_and_is_whole(case: str, tmp_path: Path) -> None:
    page = page_of(report_of(tmp_path, **CASES[case]))
    read = Page(page)
    assert list(read.fetched()) == []
    assert (read.open, read.crossed) == ([], [])
    assert page.startswith("<!doctype html>")
    assert ("meta", {"charset": "utf-8"}) in read.tags
    # No record or missing value of Python's shows through.
    assert not re.search(r"\bNone\b|\bnan\b|\w+\(\w+=|&lt;svg|\{\{|\{%", page)


def test_the_finished_page_fetches_nothing(finished_digits: Path) -> None:
    page = (finished_digits / "report.html").read_text("utf-8")
    read = Page(page)
    assert list(read.fetched()) == []
    assert (read.open, read.crossed) == ([], [])
    # Accuracy, latency and magnitude.
    assert sum(tag == "svg" for tag, _ in read.tags) == 3
    assert str(finished_digits.parent) not in page


def test_the_search_for_what_is_fetched_finds_it() -> None:
    bad = (
        '<script src="x.js"></script><img src="//host/a.png"><link rel="x" href="http://host/a.css"><p onclick="x()">'
        "<style>@import 'a'; p { background: url(http://host/b) }</style><p style=\"background: url('c.png')\"></p>"
    )
    assert len(list(Page(bad).fetched())) == 8


HOSTILE = "<img src=x onerror=alert(1)>\"&'</title><script>"


def test_names_from_outside_are_text(tmp_path: Path) -> None:
    plain = report_of(tmp_path)
    layer = MaskedLayer(HOSTILE, (8, 4, 3, 3), 72, 1000, 0.7, 0.75)
    report = report_of(
        tmp_path,
        model=replace(MADE, model=HOSTILE, origin=HOSTILE),
        backend_reason=HOSTILE,
        masks=replace(plain.masks, model=HOSTILE, method=HOSTILE, masked=(layer,)),
        conformance=replace(plain.conformance, weights=(weight(HOSTILE, "conforming"),)),
        engine=engine(tmp_path, runtime_version=HOSTILE, layers=(LayerSparsity(HOSTILE, HOSTILE, "sparse", 4, 8),)),
        parity=replace(PARITY, methods=(DENSE_ROW, replace(SPARSE_ROW, name=HOSTILE))),
        timing=replace(plain.timing, device=HOSTILE, note=HOSTILE),
    )
    read, usual = Page(page_of(report)), Page(page_of(plain))
    assert list(read.fetched()) == []
    assert {tag for tag, _ in read.tags} == {tag for tag, _ in usual.tags}
    # Title, heading, weights' origin twice, reason, version, layer, method thrice, device, note.
    assert sum(text.count(HOSTILE) for text in read.texts) >= 12


@pytest.mark.parametrize("name", ["cost $5 to $9", "$\\frac{$", "_private", "Lösung", "a\nb"])
def test_names_that_plots_would_take_for_markup_are_drawn_as_they_are(name: str, tmp_path: Path) -> None:
    masks = replace(report_of(tmp_path).masks, method=name)
    rows = (DENSE_ROW, replace(SPARSE_ROW, name=name))
    for svg in (plots.kept_magnitude(masks), plots.accuracy(rows)):
        drawn = "".join(ElementTree.fromstring(svg).itertext())
        assert "".join(name.split()) in "".join(drawn.split())


def test_methods_of_one_name_have_a_bar_each() -> None:
    # A model without BatchNorm under magnitude masks is its own baseline.
    svg = ElementTree.fromstring(plots.accuracy((DENSE_ROW, SPARSE_ROW, SPARSE_ROW)))
    assert [text for text in svg.itertext() if text.strip() in ("dense", "ours")].count("ours") == 2


@pytest.mark.parametrize(
    ("changed", "colour", "says"),
    [
        ({}, "good", "loses 0.75 points of top-1 (91.00% dense, 90.25% sparse, 400 images)"),
        ({"parity": replace(PARITY, top1_drop=-0.5)}, "good", "gains 0.50 points of top-1"),
        ({"parity": replace(PARITY, top1_drop=0.0)}, "good", "The sparse engine keeps top-1"),
        (CASES["untrained"], "neutral", "accuracy was not judged: the weights are random."),
        ({"parity": FAILED}, "bad", "accuracy is not kept: top-1 drops by 12.50 points; 1 are allowed."),
        (CASES["not finite"], "bad", "accuracy is not kept: the outputs are not finite."),
        (CASES["not conforming"], "bad", "Not deployable: 1 weight violates 2:4."),
    ],
)
def test_the_headline_says_what_was_found(changed: dict[str, Any], colour: str, says: str, tmp_path: Path) -> None:
    read = Page(page_of(report_of(tmp_path, **changed)))
    assert says in read.text
    verdicts = [a["class"] for tag, a in read.tags if tag == "div" and (a.get("class") or "").startswith("verdict")]
    assert verdicts == [f"verdict {colour}"]
    assert ("(untrained)" in read.text) == ("random" in says)


def test_figures_stand_in_the_page(tmp_path: Path) -> None:
    text = Page(page_of(report_of(tmp_path))).text
    assert "net: 2:4 fp32 engine on onnxruntime" in text
    assert "1 of 2 eligible weights are 2:4" in text
    # 1000 of 1516 multiply-accumulates, and the one layer's magnitude.
    assert "66% of multiply-accumulates" in text
    assert "71.2% of the masked weights' magnitude" in text
    assert "97.75% of images get the same first choice" in text
    assert "2.00x dense over sparse latency at batch 8" in text
    assert "1,234,567 bytes" in text
    assert "8 x 4 x 3 x 3 conforming 71.2 75.3" in text
    assert "b.weight Conv 8 x 4 x 3 x 3 ineligible channels not multiple of 4" in text
    assert "31.0% of groups differ from magnitude masks" in text
    assert "BatchNorm recalibrated on 640 training images" in text
    assert "ran" not in text.partition("best %")[2].split()[0]


@pytest.mark.parametrize("nodes", [(), ("relu", "a")])
def test_layers_that_the_engine_told_of_are_matched_by_their_nodes_or_name(
    tmp_path: Path, nodes: tuple[str, ...]
) -> None:
    told = (LayerSparsity("a" if not nodes else "a + relu", "sparse_kernel", "sparse", 4, 8, nodes),)
    text = Page(page_of(report_of(tmp_path, engine=engine(tmp_path, backend="tensorrt", layers=told)))).text
    assert "conforming 71.2 75.3 sparse" in text
    assert re.search(r"b\.weight Conv 8 x 4 x 3 x 3 ineligible channels not multiple of 4 unknown", text)


def test_why_a_layer_ran_dense_is_told(tmp_path: Path) -> None:
    told = (LayerSparsity("a", "dense_kernel", "dense", 4, 8, ("a",), "likely_few_channels"),)
    text = Page(page_of(report_of(tmp_path, engine=engine(tmp_path, backend="tensorrt", layers=told)))).text
    assert "conforming 71.2 75.3 dense: likely few channels" in text


@pytest.mark.parametrize(
    ("states", "ran"),
    [
        (("sparse", "dense"), "sparse"),
        (("dense", "sparse"), "sparse"),
        (("sparse", "unknown"), "sparse"),
        (("unknown", "dense"), "unknown"),
        (("dense", "unknown"), "unknown"),
        (("dense", "dense"), "dense: likely few channels"),
    ],
)
@pytest.mark.parametrize("names", [("a", "a [profile 1]"), ("a", "a copy of a")])
def test_a_layer_is_sparse_if_it_is_in_any_profile_and_dense_if_it_is_in_all(
    states: tuple[str, str], ran: str, names: tuple[str, str], tmp_path: Path
) -> None:
    told = tuple(
        LayerSparsity(name, "kernel", state, 4, 8, ("a",), "likely_few_channels" if state == "dense" else None)
        for name, state in zip(names, states, strict=True)
    )
    report = report_of(tmp_path, engine=engine(tmp_path, backend="tensorrt", layers=told))
    assert [row["ran"] for row in layer_rows(report)] == ["unknown", ran]


def test_plots_do_not_change_from_run_to_run_and_refer_to_themselves_only(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    assert page_of(report) == page_of(report)
    read = Page(page_of(report))
    known = {attributes["id"] for _, attributes in read.tags if "id" in attributes}
    used = {v[1:] for _, a in read.tags for k, v in a.items() if k.endswith("href") and v and v.startswith("#")}
    used |= {u for _, a in read.tags for v in a.values() for u in re.findall(r"url\(#([^)]*)\)", v or "")}
    assert used
    assert used <= known


def test_each_layer_has_its_mark_in_the_plot_of_magnitudes(tmp_path: Path) -> None:
    masks = report_of(tmp_path).masks
    layers = tuple(MaskedLayer(f"layer {i}", (4, 4), 4, 10, 0.6 + i / 100, 0.8) for i in range(7))
    svg = ElementTree.fromstring(plots.kept_magnitude(replace(masks, masked=layers, pattern=Pattern(1, 4))))
    assert "most that 1:4 allows" in "".join(svg.itertext())
    space = {"s": "http://www.w3.org/2000/svg"}
    lines = [g for g in svg.iterfind(".//s:g", space) if re.fullmatch(r"line2d_\d+", g.get("id", ""))]
    assert sum(len(g.findall("s:g/s:use", space)) == 7 for g in lines) == 2


def test_gpu_times_and_what_held_the_clocks_down_are_told(tmp_path: Path) -> None:
    timing = report_of(tmp_path).timing
    (timed,) = timing.batches
    assert "on the GPU" not in page_of(report_of(tmp_path))
    clocks = GpuClocks(9, 1755.0, 1200.0, 2619.0, ("power cap",), 70.0, 690.0)
    dense, sparse = (replace(timed.dense, gpu_ms=ms, copies_ms=0.5) for ms in (3.25, 1.5))
    on_gpu = replace(timed, dense=dense, sparse=sparse, by="gpu", clocks=clocks)
    told = page_of(report_of(tmp_path, timing=replace(timing, batches=(on_gpu,))))
    assert "Batch 8: on the GPU dense 3.25 ms, sparse 1.5 ms at 1755 MHz, held down by power cap" in told
