"""report.html: one page that fetches nothing, shows foreign names as text, and says what was found.

What it looks like is looked at in a browser; the pictures are in `docs/`.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from html_page import Page, drawn
from report_schema import validate_values
from run_reports import CASES, DENSE_ROW, FAILED, MADE, PARITY, SHAPE, SPARSE_ROW, engine, full, report_of, weight

from maskplan.pipeline.core.artifacts import (
    LayerSparsity,
    MaskedLayer,
)
from maskplan.pipeline.core.reports import (
    Flips,
    GpuClocks,
)
from maskplan.pipeline.recipe import Recipe
from maskplan.pipeline.report import plots
from maskplan.pipeline.report.html import FASTER, NO_DIFFERENCE, SLOWER, changed_options, gain, layer_rows, render
from maskplan.pipeline.report.record import RunReport
from maskplan.pipeline.report.write import report_values


def page_of(report: RunReport) -> str:
    return render(report, report_values(report))


PLOTS = {
    name: cache(getattr(plots, name))
    for name in (
        "accuracy",
        "class_drops",
        "error_by_depth",
        "latency",
        "throughput",
        "kept_magnitude",
        "pattern_histogram",
    )
}


@pytest.fixture
def folder() -> Path:
    """A run's folder by name only: nothing is written."""
    return Path("build/net")


@pytest.fixture(autouse=True)
def plots_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most pages of this module differ in their text only."""
    for name, cached in PLOTS.items():
        monkeypatch.setattr(plots, name, cached)


@pytest.mark.parametrize("case", [*CASES, "full"])
def test_the_page_fetches_nothing_and_is_whole(case: str, folder: Path) -> None:
    report = full(folder) if case == "full" else report_of(folder, **CASES[case])
    validate_values(json.loads(json.dumps(report_values(report))))
    page = page_of(report)
    read = Page(page)
    assert list(read.fetched()) == []
    assert (read.open, read.crossed) == ([], [])
    assert page.startswith("<!doctype html>")
    assert ("meta", {"charset": "utf-8"}) in read.tags
    # The only addresses are names of XML's.
    assert set(re.findall(r"https?://[^\s\"'<>]*", page)) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    # No record or missing value of Python's shows through.
    assert not re.search(r"\bNone\b|\bnan\b|\w+\(\w+=|&lt;svg|\{\{|\{%", page)


def test_the_content_security_policy_allows_one_script_and_no_requests(folder: Path) -> None:
    read = Page(page_of(full(folder)))
    (policy,) = [
        a["content"] or "" for a in read.attributes("meta") if a.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert set(rules) == {"default-src", "img-src", "style-src", "script-src"}
    (script,) = read.scripts
    assert read.attributes("script") == [{}]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'"


def test_the_page_is_accessible(folder: Path) -> None:
    """Headings in order, a caption for each table, heads that say what they head, no id twice, links that lead somewhere."""
    read = Page(page_of(full(folder)))
    names = [tag for tag, _ in read.tags]
    levels = [int(tag[1]) for tag in names if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert names.count("table") == names.count("caption") >= 7
    assert all(a.get("scope") in ("col", "row") for a in read.attributes("th"))
    ids = [a["id"] for _, a in read.tags if "id" in a]
    assert len(set(ids)) == len(ids)
    links = [a["href"] or "" for a in read.attributes("a")]
    assert len(links) == 8
    assert {link.removeprefix("#") for link in links} <= set(ids)
    # What scrolls sideways can be reached without a mouse, and has a name.
    boxes = [a for a in read.attributes("div") if a.get("class") == "scroll"]
    assert len(boxes) == names.count("table")
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in boxes)
    assert ("html", {"lang": "en"}) in read.tags


@pytest.mark.parametrize("ground", ["light", "dark"])
def test_colors_have_enough_contrast(ground: str, folder: Path) -> None:
    """4.5 to 1 for text and 3 to 1 for marks, as the W3C's guidelines ask (WCAG 2.1, 1.4.3 and 1.4.11)."""
    (style,) = Page(page_of(report_of(folder))).styles
    blocks = re.findall(r":root \{([^}]*--ink[^}]*)\}", style)
    colors = dict(re.findall(r"--([a-z-]+): *(#[0-9a-f]{6})", blocks[("light", "dark").index(ground)]))

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(colors[one]), luminance(colors[other])))
        return (high + 0.05) / (low + 0.05)

    for text in ("ink", "soft", "own", "good", "bad"):
        assert contrast(text, "paper") >= 4.5, text
    for text in ("ink", "soft"):
        assert contrast(text, "card") >= 4.5, text
    for card in ("good", "bad", "neutral"):
        assert contrast(card, f"{card}-card") >= 4.5, card
        assert contrast("ink", f"{card}-card") >= 4.5, card
    for mark in ("own", "other", "plain", "bad"):
        assert contrast(mark, "paper") >= 3, mark


def test_the_finished_page_fetches_nothing(finished_digits: Path) -> None:
    page = (finished_digits / "report.html").read_text("utf-8")
    read = Page(page)
    assert list(read.fetched()) == []
    assert (read.open, read.crossed) == ([], [])
    assert {"accuracy", "latency", "throughput", "kept"} <= drawn(read)
    assert str(finished_digits.parent) not in page


def test_the_search_for_what_is_fetched_finds_it() -> None:
    bad = (
        '<script src="x.js"></script><img src="//host/a.png"><link rel="x" href="http://host/a.css"><p onclick="x()">'
        "<style>@import 'a'; p { background: url(http://host/b) }</style><p style=\"background: url('c.png')\"></p>"
    )
    assert len(list(Page(bad).fetched())) == 7
    assert len(list(Page("<script>fetch(x)</script><iframe></iframe>").fetched())) == 2


HOSTILE = "<img src=x onerror=alert(1)>\"&'</title><script>"


def test_names_from_outside_are_text(folder: Path) -> None:
    plain = report_of(folder)
    layer = MaskedLayer(HOSTILE, (8, 4, 3, 3), 72, 1000, 0.7, 0.75)
    report = report_of(
        folder,
        model=replace(MADE, model=HOSTILE, origin=HOSTILE),
        backend_reason=HOSTILE,
        masks=replace(plain.masks, model=HOSTILE, method=HOSTILE, masked=(layer,)),
        conformance=replace(plain.conformance, weights=(weight(HOSTILE, "conforming"),)),
        engine=engine(folder, runtime_version=HOSTILE, layers=(LayerSparsity(HOSTILE, HOSTILE, "sparse", 4, 8),)),
        parity=replace(PARITY, methods=(DENSE_ROW, replace(SPARSE_ROW, name=HOSTILE))),
        timing=replace(plain.timing, device=HOSTILE, note=HOSTILE),
    )
    report = replace(report, command=HOSTILE, permutation_reason=HOSTILE)
    read, usual = Page(page_of(report)), Page(page_of(plain))
    assert list(read.fetched()) == []
    assert {tag for tag, _ in read.tags} == {tag for tag, _ in usual.tags}
    # Title, heading, weights' origin twice, reason, version, layer, method thrice, device, note.
    assert sum(text.count(HOSTILE) for text in read.texts) >= 12


@pytest.mark.parametrize(
    ("changed", "color", "says"),
    [
        ({}, "good", "loses 0.75 points of top-1 (91.00% dense, 90.25% sparse, 400 images)"),
        ({"parity": replace(PARITY, top1_drop=-0.5)}, "good", "gains 0.50 points of top-1"),
        ({"parity": replace(PARITY, top1_drop=0.0)}, "good", "The sparse engine keeps top-1"),
        (CASES["untrained"], "neutral", "accuracy was not judged: the weights are random."),
        ({"parity": FAILED}, "bad", "accuracy is not kept: top-1 drops by 12.50 points; the limit is 1."),
        (CASES["not finite"], "bad", "accuracy is not kept: the outputs are not finite."),
        (CASES["not conforming"], "bad", "Not deployable: 1 weight violates 2:4."),
    ],
)
def test_the_headline_says_what_was_found(changed: dict[str, Any], color: str, says: str, folder: Path) -> None:
    read = Page(page_of(report_of(folder, **changed)))
    assert says in read.text
    verdicts = [a["class"] for a in read.attributes("div") if (a.get("class") or "").startswith("verdict")]
    assert verdicts == [f"verdict {color}"]
    # In words too, for those who do not tell the colors.
    assert {"good": "Pass", "bad": "Fail", "neutral": "Not judged"}[color] + " " in read.text
    assert ("(untrained)" in read.text) == ("random" in says)


def test_the_measured_numbers_are_in_the_page(folder: Path) -> None:
    text = Page(page_of(report_of(folder))).text
    assert "net: 2:4 fp32 engine on onnxruntime" in text
    assert "1 of 2 eligible weights are 2:4" in text
    # 1000 of 1516 multiply-accumulates, and the one layer's magnitude.
    assert "66% of multiply-accumulates" in text
    assert "71.2% of the masked weights' magnitude" in text
    assert "97.75% of images get the same top-1 prediction" in text
    assert "2.00\N{MULTIPLICATION SIGN} dense over sparse latency at batch 8, with no sparse kernels" in text
    assert "ours 90.25 98.50 +0.75 +0.20 to +1.30" in text
    assert "sparse 2.00 5.00 6.00 250 2.000 1.900 to 2.100" in text
    assert "1,234,567 bytes" in text
    assert f"a.weight Conv {SHAPE} conforming masked 71.2 75.3" in text
    assert f"b.weight Conv {SHAPE} ineligible input channels are not a multiple of 4" in text
    # Learning may start from other masks than magnitude ones.
    assert "with the masks that learning started from" in text
    assert "31.0% of groups differ between the two" in text
    assert "BatchNorm recalibrated on 640 training images" in text
    assert "verdict why kept % best %" in text


def test_sections_without_measurements_are_left_out(folder: Path) -> None:
    plain, rich = Page(page_of(report_of(folder))), Page(page_of(full(folder)))
    assert drawn(plain) == {"accuracy", "latency", "throughput", "kept"}
    assert drawn(rich) == drawn(plain) | {"classes", "depth", "patterns", "cost-images", "cost-minutes"}
    for word in ("Error by depth", "Permutation", "changed %", "differs %", "command", "Thresholds", "flips"):
        assert (word in plain.text, word in rich.text) == (False, True), word


def test_a_full_report_shows_every_measurement(folder: Path) -> None:
    text = Page(page_of(full(folder))).text
    # Flips, classes and thresholds.
    assert "changed for 9 images (95% interval 1.03 to 4.23%): 5 from right to wrong, 3 from wrong to right" in text
    assert "1 of 2 classes lose accuracy" in text
    assert "max top1 drop 1 0.75 pass min agreement 99 97.75 fail max top5 drop 1 not judged" in text
    assert "Few images." in text
    # Depth.
    assert "a is the first layer whose output differs from the dense model's by more than the tolerance of 1%." in text
    assert "a Conv 50.00 225.00 0.8100 b Conv 0.40 0.9990" in text
    assert "Only one of the two graphs has 2 layers: x , y ." in text
    # Masks.
    assert "25.0% of 72 groups differ from the magnitude mask. 2 groups keep fewer than 2." in text
    assert "conforming masked 71.2 75.3 25.0 50.00" in text
    # Permutation: 230 of 200, and 30 of 60.
    assert "+15.00% magnitude kept, 50.0% of the gain of an independent choice in each row" in text
    assert "moved 1 8 fixed they reach an output 2 32" in text
    assert "p.safetensors, sha256 2222" in text
    assert "command maskplan engine net --permute" in text


def test_what_the_compiler_made_of_the_files_is_shown(folder: Path) -> None:
    text = Page(page_of(full(folder))).text
    assert "TensorRT-RTX 1.7.1.116 compiles both files that a GPU host builds from. It needed no GPU." in text
    assert "not sparse kernels, not speed, and not TensorRT itself" in text
    for name in ("dense", "sparse"):
        assert f"{name}.fp16.onnx 1:8:8 2 1 Half 1 cast 1.2 7.65" in text
    assert "1 to_fp16 kgen cast Float Half Cast 2 a , relu correlation product Half Half" in text
    assert "Warning for sparse.fp16.onnx (18 times): converting scales" in text
    assert "1 lines about layers of sparse.fp16.onnx" in text
    assert "RTX engine sparse.rtx.plan, 7,654,321 bytes" in text


def test_a_refusal_is_shown_with_its_node_and_a_way_out(folder: Path) -> None:
    text = Page(page_of(report_of(folder, **CASES["refused"]))).text
    assert "TensorRT-RTX 1.7.1.116 refuses sparse.fp16.onnx." in text
    assert (
        "sparse.fp16.onnx : node layer.unique (Unique): the operator is not supported. Way out: write it with others."
        in text
    )
    assert "Not asked: TensorRT-RTX is not installed." in Page(page_of(report_of(folder, **CASES["not compiled"]))).text
    assert "NVIDIA's compiler" not in Page(page_of(report_of(folder))).text


def test_no_flips_are_reported_without_a_significance_test(folder: Path) -> None:
    parity = replace(PARITY, flips=Flips(0, 0, 0, 0), flip_rate=0.0, flip_rate_ci95=(0.0, 1.02), mcnemar_p=1.0)
    text = Page(page_of(report_of(folder, parity=parity))).text
    assert "changed for no image (95% interval 0.00 to 1.02%)." in text
    assert "McNemar" not in text


def test_the_reason_for_no_permutation_is_shown(folder: Path) -> None:
    assert (
        "Permutation Not done: no layer reads them."
        in Page(page_of(report_of(folder, permutation_reason="no layer reads them"))).text
    )


@pytest.mark.parametrize(
    ("speedup", "interval", "spread", "found"),
    [
        (1.2, (1.1, 1.3), None, FASTER),
        (1.2, (1.1, 1.3), 0.1, FASTER),
        (1.2, (1.1, 1.3), 0.3, NO_DIFFERENCE),
        (1.2, (0.9, 1.5), None, NO_DIFFERENCE),
        (0.8, (0.7, 0.9), 0.01, SLOWER),
        (0.8, (0.7, 0.9), 0.3, NO_DIFFERENCE),
        (0.8, (0.7, 1.1), None, NO_DIFFERENCE),
        (1.0, (1.0, 1.0), 0.0, NO_DIFFERENCE),
    ],
)
def test_a_difference_within_noise_is_none(
    speedup: float, interval: tuple[float, float], spread: float | None, found: str, folder: Path
) -> None:
    (timed,) = report_of(folder).timing.batches
    assert gain(replace(timed, speedup=speedup, ratio_ci95=interval, build_spread=spread)) == found


def test_with_sparse_kernels_each_batch_says_whether_sparse_is_faster(folder: Path) -> None:
    timing, on_gpu = report_of(folder).timing, engine(folder, backend="tensorrt")
    (timed,) = timing.batches
    noisy = replace(timed, batch=1, speedup=1.02, ratio_ci95=(0.98, 1.1))
    text = Page(page_of(report_of(folder, engine=on_gpu, timing=replace(timing, batches=(noisy, timed))))).text
    assert "1.020 0.980 to 1.100 no difference" in text
    assert "2.000 1.900 to 2.100 faster" in text
    assert "1.02\N{MULTIPLICATION SIGN} dense over sparse latency at batch 1: within noise" in text


def test_options_that_differ_from_their_defaults_are_listed(folder: Path) -> None:
    usual = Recipe()
    changed = replace(usual, compare=replace(usual.compare, max_top1_drop=2.5), mask=replace(usual.mask, pattern="1:4"))
    assert changed_options(usual) == []
    assert changed_options(changed) == [("mask.pattern", '"1:4"'), ("compare.max_top1_drop", "2.5")]
    assert "recipe all options by default" in Page(page_of(report_of(folder))).text
    text = Page(page_of(report_of(folder, recipe=changed))).text
    assert 'recipe mask.pattern = "1:4" , compare.max_top1_drop = 2.5' in text
    # And all of them below.
    assert "compare.max_top1_drop = 2.5 " in text.partition("All options")[2]


def test_times_have_no_exponents(folder: Path) -> None:
    timing = report_of(folder).timing
    (timed,) = timing.batches
    shown = {0.0426: "0.0426", 0.5: "0.500", 2.5: "2.50", 40.25: "40.2", 123.4: "123", 4321.0: "4,321"}
    batches = tuple(replace(timed, batch=i, sparse=replace(timed.sparse, p50_ms=ms)) for i, ms in enumerate(shown))
    text = Page(page_of(report_of(folder, timing=replace(timing, batches=batches)))).text
    assert re.findall(r"sparse (\S+) 5\.00 6\.00", text) == list(shown.values())


@pytest.mark.parametrize("nodes", [(), ("relu", "a")])
def test_engine_layers_are_matched_by_node_or_name(folder: Path, nodes: tuple[str, ...]) -> None:
    told = (LayerSparsity("a" if not nodes else "a + relu", "sparse_kernel", "sparse", 4, 8, nodes),)
    text = Page(page_of(report_of(folder, engine=engine(folder, backend="tensorrt", layers=told)))).text
    assert "conforming a sparse kernel was chosen sparse 71.2 75.3" in text
    assert f"b.weight Conv {SHAPE} ineligible input channels are not a multiple of 4 unknown" in text


def test_the_reason_why_a_layer_ran_dense_is_shown(folder: Path) -> None:
    told = (LayerSparsity("a", "dense_kernel", "dense", 4, 8, ("a",), "likely_few_channels"),)
    text = Page(page_of(report_of(folder, engine=engine(folder, backend="tensorrt", layers=told)))).text
    assert "conforming likely too few channels for a gain dense 71.2 75.3" in text


@pytest.mark.parametrize(
    ("state", "why"), [("dense", "probably timed as faster"), ("unknown", "its kernel is not named")]
)
def test_an_unknown_reason_is_shown_as_unknown(state: str, why: str, folder: Path) -> None:
    told = (LayerSparsity("a", None, state, 4, 8, ("a",)),)
    text = Page(page_of(report_of(folder, engine=engine(folder, backend="tensorrt", layers=told)))).text
    assert f"conforming {why} {state} 71.2" in text


@pytest.mark.parametrize(
    ("states", "ran"),
    [
        (("sparse", "dense"), "sparse"),
        (("dense", "sparse"), "sparse"),
        (("sparse", "unknown"), "sparse"),
        (("unknown", "dense"), "unknown"),
        (("dense", "unknown"), "unknown"),
        (("dense", "dense"), "dense"),
    ],
)
@pytest.mark.parametrize("names", [("a", "a [profile 1]"), ("a", "a copy of a")])
def test_a_layer_is_sparse_if_it_is_in_any_profile_and_dense_if_it_is_in_all(
    states: tuple[str, str], ran: str, names: tuple[str, str], folder: Path
) -> None:
    told = tuple(
        LayerSparsity(name, "kernel", state, 4, 8, ("a",), "likely_few_channels" if state == "dense" else None)
        for name, state in zip(names, states, strict=True)
    )
    report = report_of(folder, engine=engine(folder, backend="tensorrt", layers=told))
    rows = layer_rows(report)
    assert [row.ran for row in rows] == ["unknown", ran]
    assert (rows[1].why == "likely too few channels for a gain") == (ran == "dense")


def test_plots_are_the_same_in_every_run_and_refer_to_themselves_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = full(folder)
    page = page_of(report)
    for name, cached in PLOTS.items():
        monkeypatch.setattr(plots, name, cached.__wrapped__)
    assert page_of(report) == page
    read = Page(page)
    known = {attributes["id"] for _, attributes in read.tags if "id" in attributes}
    used = {v[1:] for _, a in read.tags for k, v in a.items() if k.endswith("href") and v and v.startswith("#")}
    used |= {u for _, a in read.tags for v in a.values() for u in re.findall(r"url\(#([^)]*)\)", v or "")}
    assert used
    assert used <= known


def test_gpu_times_and_throttle_reasons_are_shown(folder: Path) -> None:
    timing = report_of(folder).timing
    (timed,) = timing.batches
    assert "on the GPU" not in page_of(report_of(folder))
    clocks = GpuClocks(9, 1755.0, 1200.0, 2619.0, ("power cap",), 70.0, 690.0)
    dense, sparse = (replace(timed.dense, gpu_ms=ms, copies_ms=0.5) for ms in (3.25, 1.5))
    on_gpu = replace(timed, dense=dense, sparse=sparse, by="gpu", clocks=clocks)
    text = Page(page_of(report_of(folder, timing=replace(timing, batches=(on_gpu,))))).text
    assert "p99 on the GPU images/s" in text
    assert "8 dense 4.00 5.00 6.00 3.25 250" in text
    assert "Ratios compare GPU times. Batch 8 ran at 1,755 MHz, throttled by power cap." in text
