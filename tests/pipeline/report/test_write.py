"""report.json against the contract, and its figures against what can be worked out from the files beside it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from report_schema import validate_report, validate_values
from safetensors.numpy import load_file

from maskplan.pipeline.core.artifacts import (
    Checkpoint,
    DenseLayer,
    EngineFile,
    ImageSet,
    LayerSparsity,
    MaskedLayer,
    MaskSet,
    Pattern,
    Preprocessing,
    Profile,
    Provenance,
    TensorSpec,
)
from maskplan.pipeline.core.choices import PASS
from maskplan.pipeline.core.reports import (
    BatchTiming,
    ConformanceReport,
    DepthReport,
    Fidelity,
    Latency,
    LayerDifference,
    ParityReport,
    TimingReport,
)
from maskplan.pipeline.data.dataset import batches
from maskplan.pipeline.data.digits import load_digits
from maskplan.pipeline.masking.statistics import mask_statistics
from maskplan.pipeline.permutation.record import ChannelGroup, Permutation, Permuted
from maskplan.pipeline.recipe import Recipe
from maskplan.pipeline.report.record import RunReport
from maskplan.pipeline.report.write import SCHEMA, as_typed, report_values, weighted_mean, write_report

# From the design's section on report.json, word for word.
CONFORMANCE = "verdict eligible conforming violating dense_by_choice ineligible weights"
WEIGHT = (
    "name node op shape axis dtype verdict reason groups violating_groups negative_zeros first_violation likely_speedup"
)
ENGINE = (
    "backend path sha256 bytes build_s precision runtime_version device device_memory_bytes profiles fidelity sparsity"
)
SPARSITY = "requested sparse_layers dense_layers unknown_layers layers"
PARITY = (
    "verdict reason images top1_dense top5_dense top1_sparse top5_sparse top1_drop drop_ci95 agreement max_abs_diff"
    " cosine_min"
)
BATCH = "batch dense pruned sparse by speedup ratio_ci95 build_spread clocks"
LATENCY = "p50_ms p90_ms p99_ms images_per_s gpu_ms copies_ms host_ms polygraphy_host_ms"
REASONS = {"grouped", "channels_not_multiple_of_4", "not_constant", "unsupported_op", "dtype"}

# Side of the square of outputs, for every weight of the bundled network on 8x8 images.
SIDES = {
    **dict.fromkeys(("stem.weight", "blocks.0.conv1.weight", "blocks.0.conv2.weight"), 8),
    **dict.fromkeys(("blocks.1.conv1.weight", "blocks.1.conv2.weight", "blocks.1.shortcut.0.weight"), 4),
    **dict.fromkeys(("blocks.2.conv1.weight", "blocks.2.conv2.weight", "blocks.2.shortcut.0.weight"), 2),
    "head.weight": 1,
}


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(), parse_constant=refuse)
    return values


@pytest.fixture(scope="module")
def values(finished_digits: Path) -> dict[str, Any]:
    return validate_report(finished_digits / "report.json")


def keys(text: str) -> set[str]:
    return set(text.split())


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


def test_it_has_every_key_of_the_contract(values: dict[str, Any]) -> None:
    assert values["schema"] == SCHEMA == 2
    assert keys("schema model masks conformance engine parity timing") <= set(values)
    assert values["model"]["trained"] is True
    assert keys(CONFORMANCE) <= set(values["conformance"])
    assert len(values["conformance"]["weights"]) == len(SIDES)
    for weight in values["conformance"]["weights"]:
        assert keys(WEIGHT) <= set(weight)
        assert (weight["reason"] in REASONS) == (weight["verdict"] == "ineligible")
    for name in ("engine", "dense_engine"):
        assert keys(ENGINE) <= set(values[name])
        assert keys(SPARSITY) <= set(values[name]["sparsity"])
    assert keys(PARITY) <= set(values["parity"])
    assert len(values["timing"]["batches"]) == 2
    for batch in values["timing"]["batches"]:
        assert keys(BATCH) <= set(batch)
        for engine in ("dense", "pruned", "sparse"):
            assert keys(LATENCY) <= set(batch[engine])


def test_the_report_contains_no_host_paths(values: dict[str, Any], finished_digits: Path) -> None:
    texts = list(strings(values))
    assert len(texts) > 500
    for text in texts:
        assert not text.startswith(("/", "~", "file:"))
        assert str(finished_digits.parent) not in text
        assert str(Path.home()) == "/" or str(Path.home()) not in text


def test_files_are_named_relatively_with_their_size_and_digest(values: dict[str, Any], finished_digits: Path) -> None:
    for record in (values["engine"], values["dense_engine"], values["masks"]):
        data = (finished_digits / record["path"]).read_bytes()
        assert record["sha256"] == hashlib.sha256(data).hexdigest()
        assert record.get("bytes", len(data)) == len(data)
    assert [values[n]["path"] for n in ("engine", "dense_engine")] == ["engine.onnx", "dense_engine.onnx"]
    for name, source in (("engine", "sparse.onnx"), ("dense_engine", "dense.onnx")):
        data = (finished_digits / source).read_bytes()
        assert values[name]["onnx_sha256"] == hashlib.sha256(data).hexdigest()


def groups_of(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(K, C, ...) to groups of four channels, one a row."""
    return np.moveaxis(array, 1, -1).reshape(-1, 4)


def test_the_masks_figures_follow_from_the_files(values: dict[str, Any], finished_digits: Path) -> None:
    masks, weights = (load_file(finished_digits / f"{n}.safetensors") for n in ("masks", "dense"))
    found = values["masks"]
    kept = total = 0.0
    for layer in found["masked"]:
        mask, size = masks.pop(layer["name"]), np.abs(weights[layer["name"]].astype(np.float64))
        best = np.sort(groups_of(size))[:, 2:].sum()
        assert layer["shape"] == list(mask.shape)
        assert layer["groups"] == len(groups_of(mask))
        assert layer["kept"] == pytest.approx(size[mask].sum() / size.sum(), rel=1e-5)
        assert layer["kept_best"] == pytest.approx(best / size.sum(), rel=1e-5)
        assert layer["kept"] <= layer["kept_best"]
        assert layer["macs"] == mask.size * SIDES[layer["name"]] ** 2
        kept, total = kept + layer["kept"] * mask.size, total + mask.size
    assert not masks
    assert found["masked_layers"] == len(found["masked"]) == 8
    assert found["masked_parameters"] == total
    assert found["kept_magnitude_percent"] == pytest.approx(100 * kept / total)
    macs = {name: weights[name].size * side**2 for name, side in SIDES.items()}
    masked = sum(macs[layer["name"]] for layer in found["masked"])
    assert found["masked_macs_percent"] == pytest.approx(100 * masked / sum(macs.values()))
    assert {d["name"]: d["macs"] for d in found["dense"]} == {n: macs[n] for n in ("stem.weight", "head.weight")}


def test_conformance_follows_from_the_onnx_file(values: dict[str, Any], finished_digits: Path) -> None:
    graph = onnx.load(finished_digits / "sparse.onnx").graph
    arrays = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    found = values["conformance"]
    counts = dict.fromkeys(("conforming", "violating", "dense_by_choice", "ineligible"), 0)
    for weight in found["weights"]:
        array = arrays[weight["name"]]
        counts[weight["verdict"]] += 1
        assert weight["shape"] == list(array.shape)
        if weight["verdict"] == "conforming":
            groups = groups_of(array)
            assert weight["groups"] == len(groups)
            assert np.count_nonzero(groups, axis=1).max() == 2
            assert (weight["axis"], weight["violating_groups"], weight["first_violation"]) == (1, 0, None)
    assert counts == {name: found[name] for name in counts}
    assert found["eligible"] == counts["conforming"] + counts["violating"] + counts["dense_by_choice"]
    assert counts == {"conforming": 8, "violating": 0, "dense_by_choice": 1, "ineligible": 1}


def test_parity_is_in_percent_and_follows_from_the_engines(values: dict[str, Any], finished_digits: Path) -> None:
    val = load_digits().val
    how = Preprocessing(**values["model"]["preprocessing"])
    logits: dict[str, list[npt.NDArray[Any]]] = {"dense": [], "sparse": []}
    labels = []
    sessions = {n: onnxruntime.InferenceSession(finished_digits / f"{n}.onnx") for n in logits}
    for images, classes in batches(val, how, 64):
        labels.append(classes)
        for name, session in sessions.items():
            logits[name].append(session.run(None, {"input": images})[0])
    truth = np.concatenate(labels)
    dense, sparse = (np.concatenate(logits[n]) for n in ("dense", "sparse"))
    found = values["parity"]
    assert found["images"] == len(truth) == 359
    for name, scores in (("dense", dense), ("sparse", sparse)):
        ranks = np.argsort(-scores, axis=1)
        assert found[f"top1_{name}"] == pytest.approx(100 * np.mean(ranks[:, 0] == truth))
        assert found[f"top5_{name}"] == pytest.approx(100 * np.mean((ranks[:, :5] == truth[:, None]).any(axis=1)))
    assert found["top1_drop"] == pytest.approx(found["top1_dense"] - found["top1_sparse"])
    assert found["agreement"] == pytest.approx(100 * np.mean(dense.argmax(1) == sparse.argmax(1)))
    assert 0 < found["max_abs_diff"] <= np.abs(dense - sparse).max() + 1e-4
    lengths = np.linalg.norm(dense, axis=1) * np.linalg.norm(sparse, axis=1)
    assert 1 > found["cosine_min"] >= ((dense * sparse).sum(1) / lengths).min() - 1e-5
    assert [m["name"] for m in found["methods"]][::3] == ["dense", "learned, recalibrated"]
    for row in found["methods"]:
        assert row["drop"] == pytest.approx(found["top1_dense"] - row["top1"])
        assert row["drop_ci95"][0] <= row["drop"] <= row["drop_ci95"][1]


def test_times_are_in_milliseconds(values: dict[str, Any]) -> None:
    for batch in values["timing"]["batches"]:
        for engine in (batch["dense"], batch["pruned"], batch["sparse"]):
            assert engine["images_per_s"] == pytest.approx(batch["batch"] / (engine["p50_ms"] / 1000))
            assert engine["p50_ms"] <= engine["p90_ms"] <= engine["p99_ms"]
            assert engine["gpu_ms"] is None
        assert batch["speedup"] == pytest.approx(batch["dense"]["p50_ms"] / batch["sparse"]["p50_ms"])
        spread = abs(batch["pruned"]["p50_ms"] / batch["sparse"]["p50_ms"] - 1)
        assert batch["build_spread"] == pytest.approx(spread)
    assert "no sparse kernels" in values["timing"]["note"]


def test_versions_seed_and_image_sets_are_recorded(values: dict[str, Any]) -> None:
    for name, version in values["versions"].items():
        if name != "python":
            assert version == metadata.version(name)
    assert keys("maskplan python numpy onnx onnxruntime polygraphy torch torchvision") <= set(values["versions"])
    assert values["model"]["seed"] == values["recipe"]["learn"]["seed"] == 0
    assert values["recipe"]["time"]["batches"] == [b["batch"] for b in values["timing"]["batches"]] == [1, 8]
    assert [s["role"] for s in values["model"]["image_sets"]] == ["train", "select"]


def small(folder: Path, states: tuple[str, ...] = (), number: float = 0.5) -> RunReport:
    """A run of one layer, by hand; `number` stands wherever one can fail to be finite."""
    seen = (ImageSet("train", 9, "3" * 64, ("0123456789abcdef",)),)
    how = Preprocessing(1, 8, 8, 0, "bilinear", (0.5,), (0.5,))
    made = Provenance("net", False, "random, seed 1", "d" * 64, 2, (), how, ("w",), "2:4", "channel", "m", 0, seen)
    layer = MaskedLayer("w", (4, 8, 3, 3), 72, 600, 0.75, 0.8)
    other = replace(layer, name="v", shape=(8, 4, 1, 1), kept=0.5)
    pattern, rest = Pattern(2, 4), (DenseLayer("u", (2, 8), 300, "linear"),)
    masks = MaskSet(
        folder / "sub/m", "1" * 64, "net", pattern, "channel", "m", "d" * 64, (layer, other), rest, None, seen
    )
    told = tuple(LayerSparsity(f"layer {i}", None, state, None, 8) for i, state in enumerate(states))
    image = (TensorSpec("input", "float32", (None, 1, 8, 8)),)
    profiles = (Profile(1, 8, 32),)
    engine = EngineFile(
        folder / "engine.plan", "2" * 64, 10, "tensorrt", "fp16", "10.3", "a GPU", "9.0", 2**33, True, "strong",
        profiles, image, image, "4" * 64, 1.5, made, told,
    )  # fmt: skip
    parity = ParityReport(
        "fail", "why", 0, None, None, None, None, None, None, None, number, number, 1.0, ()
    )  # fmt: skip
    one = Latency(number, 2.0, 3.0, 4.0, number, None, 5.0, 6.0)
    timing = TimingReport("a GPU", 2, "", (BatchTiming(8, 5, one, None, one, "gpu", number, (number, 2.0), None),))
    conformance = ConformanceReport(PASS, None, "2:4", 1, 1, 0, 0, 0, ())
    fidelity = Fidelity(1, number, number, 100.0)
    return RunReport(
        made, "fp16", "asked", 1, Recipe(), masks, conformance, engine, engine, fidelity, parity, timing
    )  # fmt: skip


def test_layers_are_counted_by_what_is_known_of_them(tmp_path: Path) -> None:
    states = ("sparse", "dense", "unknown", "sparse", "unknown", "sparse")
    values = report_values(small(tmp_path, states))
    validate_values(values)
    sparsity = values["engine"]["sparsity"]
    assert sparsity["requested"] is True
    assert [sparsity[f"{s}_layers"] for s in ("sparse", "dense", "unknown")] == [3, 1, 2]
    assert [layer["state"] for layer in sparsity["layers"]] == list(states)
    assert all(set(layer) == keys("name kernel state c k nodes reason") for layer in sparsity["layers"])


def test_a_layer_that_is_listed_for_two_profiles_is_counted_once(tmp_path: Path) -> None:
    """Sparse in any profile, dense in all; the list keeps both."""
    states = {"a": "sparse", "b": "dense", "c": "dense", "a [profile 1]": "dense", "b [profile 1]": "dense"}
    layers = tuple(LayerSparsity(name, None, state, 8, 8) for name, state in states.items())
    layers += (LayerSparsity("c [profile 1]", None, "unknown", 8, 8),)
    report = small(tmp_path)
    sparsity = report_values(replace(report, engine=replace(report.engine, layers=layers)))["engine"]["sparsity"]
    assert [sparsity[f"{s}_layers"] for s in ("sparse", "dense", "unknown")] == [1, 1, 1]
    assert len(sparsity["layers"]) == 6


def test_means_are_weighted_by_parameters_and_samples_of_digests_left_out(tmp_path: Path) -> None:
    values = report_values(small(tmp_path))
    assert values["masks"]["masked_parameters"] == 4 * 8 * 9 + 8 * 4
    assert values["masks"]["kept_magnitude_percent"] == pytest.approx(100 * (0.75 * 288 + 0.5 * 32) / 320)
    assert values["masks"]["masked_macs_percent"] == pytest.approx(100 * 1200 / 1500)
    assert [values[n]["path"] for n in ("masks", "engine", "dense_engine")] == ["sub/m", "engine.plan", "engine.plan"]
    assert values["model"]["trained"] is False
    for part in ("model", "masks"):
        assert values[part]["image_sets"] == [{"role": "train", "images": 9, "sha256": "3" * 64, "labeled_sha256": ""}]
    assert (weighted_mean([]), weighted_mean([(3.0, 1), (7.0, 3)])) == (0, 6)


def test_sections_that_were_not_requested_are_null(tmp_path: Path) -> None:
    values = report_values(small(tmp_path))
    assert [values[name] for name in ("depth", "mask_statistics", "permutation", "command")] == [None, None, None, ""]


def test_depth_and_statistics_stand_as_their_records_have_them(tmp_path: Path) -> None:
    depth = DepthReport(4, 0.5, (LayerDifference("conv", "Conv", "t", math.nan, None),), "conv", ("other",))
    mask = np.array([[True, True, False, False]] * 8)
    found = mask_statistics(
        {"w": mask}, {"w": np.array([[4.0, 3.0, 2.0, 1.0]] * 7 + [[1.0, 2.0, 3.0, 4.0]])}, Pattern(2, 4)
    )
    values = report_values(replace(small(tmp_path), depth=depth, mask_statistics=found))
    validate_values(values)
    (layer,) = values["depth"].pop("layers")
    assert values["depth"] == {"images": 4, "tolerance": 0.5, "first": "conv", "unmatched": ["other"]}
    assert {k: layer[k] for k in ("node", "op", "relative")} == {"node": "conv", "op": "Conv", "relative": None}
    counts = {
        "groups": 8,
        "keeping": [0, 0, 8, 0, 0],
        "changed": 1,
        "patterns": [{"pattern": "1100", "groups": 8, "by_magnitude": 7}],
        "others": 0,
    }
    assert values["mask_statistics"] == {"pattern": "2:4", "layers": [{"name": "w", "found": counts}], "total": counts}


@pytest.mark.parametrize("beside", [True, False])
def test_a_permutation_is_reported_with_its_groups_and_without_host_paths(beside: bool, tmp_path: Path) -> None:
    report = small(tmp_path)
    path = tmp_path / "sub/p.safetensors" if beside else tmp_path.parent / "p.safetensors"
    groups = (ChannelGroup("a", 8, "moved", None, 4, ("w",), 1.0, 1.5, 80.0), ChannelGroup("b", 16, "fixed", "why"))
    made = Checkpoint(tmp_path / "permuted.safetensors", "1" * 64, 10, report.model)
    done = Permuted(made, Permutation(path, "2" * 64, "net", "2:4", "3" * 64, groups), 200.0, 230.0, 260.0)
    values = report_values(replace(report, permutation=done))
    validate_values(values)
    found = values["permutation"]
    assert found["path"] == ("sub/p.safetensors" if beside else "p.safetensors")
    assert {
        k: found[k] for k in ("sha256", "pattern", "kept_before", "kept_after", "kept_bound", "efficacy", "reason")
    } == {
        "sha256": "2" * 64,
        "pattern": "2:4",
        "kept_before": 200.0,
        "kept_after": 230.0,
        "kept_bound": 260.0,
        "efficacy": 50.0,
        "reason": None,
    }
    assert [(g["name"], g["state"], g["reason"]) for g in found["groups"]] == [
        ("a", "moved", None),
        ("b", "fixed", "why"),
    ]
    assert not [text for text in strings(found) if str(tmp_path.parent) in text]


def test_the_reason_for_no_permutation_is_the_only_key(tmp_path: Path) -> None:
    values = report_values(replace(small(tmp_path), permutation_reason="no layer reads them"))
    validate_values(values)
    assert values["permutation"] == {"reason": "no layer reads them"}


@pytest.mark.parametrize(
    ("arguments", "typed"),
    [
        ((), "maskplan"),
        (("engine", "resnet50", "--out", "build/r50"), "maskplan engine resnet50 --out build/r50"),
        (("engine", "my net.py:build", "--seed", "3"), "maskplan engine 'my net.py:build' --seed 3"),
        (("engine", "/srv/models/net.py:build", "--out", "/data/runs/r50/"), "maskplan engine net.py:build --out r50"),
        (("engine", "--data=/data/imagenet", "--weights=~/w.pth"), "maskplan engine --data=imagenet --weights=w.pth"),
        (("engine", "--out", "/"), "maskplan engine --out /"),
    ],
)
def test_a_command_is_reported_as_typed_without_host_paths(arguments: tuple[str, ...], typed: str) -> None:
    assert as_typed(arguments) == typed


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_cannot_hold_become_null(number: float, tmp_path: Path) -> None:
    report = small(tmp_path, number=number)
    text = json.dumps(report_values(report), allow_nan=False)
    values = json.loads(text, parse_constant=refuse)
    assert values["parity"]["max_abs_diff"] is values["engine"]["fidelity"]["cosine_min"] is None
    assert values["timing"]["batches"][0]["ratio_ci95"] == [None, 2.0]


def test_both_forms_are_written_with_their_digests(tmp_path: Path) -> None:
    files = write_report(small(tmp_path), tmp_path / "out/r.json", tmp_path / "out/r.html")
    for file in (files.json, files.html):
        assert file.sha256 == hashlib.sha256(file.path.read_bytes()).hexdigest()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["r.html", "r.json"]
    assert validate_report(files.json.path) == report_values(small(tmp_path))
