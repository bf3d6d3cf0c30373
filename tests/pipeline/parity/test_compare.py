"""Parity against counts that are known beforehand.

The classifiers are hand-built graphs whose logits are the mean colors of a picture. The pictures are of one color, so what
each of them predicts, and where two of them differ, follows from a list of numbers.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from scipy.stats import binomtest

from maskplan.engines.base import Arrays, Classifier
from maskplan.engines.ort import OrtEngine
from maskplan.exporters.metadata import write_provenance
from maskplan.pipeline.core.artifacts import ImageSet, Preprocessing, Profile, Provenance, TensorSpec
from maskplan.pipeline.core.choices import FAIL, NOT_APPLICABLE, PASS
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.reports import Flips, ParityReport
from maskplan.pipeline.core.statistics import PairedCounts, drop_interval
from maskplan.pipeline.data.dataset import Split, identify, open_folder, open_val
from maskplan.pipeline.parity.compare import compare, fidelity
from maskplan.pipeline.parity.model_outputs import load_fixed_images, run_models
from maskplan.pipeline.parity.options import CompareOptions

Array = npt.NDArray[Any]

HOW = Preprocessing(3, 4, 4, 0, "nearest", (0.0,) * 3, (1.0,) * 3)
MADE = Provenance("colors", True, "test", "0" * 64, 3, (), HOW)


@dataclass(frozen=True)
class Pictures:
    """Pictures of one color each, kept as PNG files in memory."""

    files: tuple[bytes, ...]
    labels: npt.NDArray[np.int64]

    def name(self, index: int) -> str:
        return f"picture {index}"

    def read(self, index: int) -> bytes:
        return self.files[index]


def split_of(colors: Array, labels: Array) -> Split:
    files = []
    for color in colors:
        buffer = io.BytesIO()
        Image.fromarray(np.full((4, 4, 3), color, np.uint8)).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return Split("val", Pictures(tuple(files), labels.astype(np.int64)), np.arange(len(files)))


def graph_of(
    path: Path, bias: Array, *, nodes: list[onnx.NodeProto] | None = None, classes: int = 3, batch: int | str = "n"
) -> Path:
    """Logits are the mean colors, cut or filled up to `classes`, plus a bias; or what `nodes` make of `means`."""
    head = np.eye(3, classes, dtype=np.float32)
    if nodes is None:
        nodes = [helper.make_node("Gemm", ["means", "head", "bias"], ["logits"])]
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["input", "axes"], ["means"], keepdims=0), *nodes],
        "means",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, classes])],
        [
            numpy_helper.from_array(np.array([2, 3], np.int64), "axes"),
            numpy_helper.from_array(head, "head"),
            numpy_helper.from_array(np.asarray(bias, np.float32), "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def opened(path: Path) -> Classifier:
    return Classifier(OrtEngine(path), path.name)


# In tenths of full brightness: far apart, so that rounding plays no part.
COLOURS = np.array(
    [[9, 1, 1]] * 10 + [[6, 5, 1]] * 7 + [[1, 8, 2]] * 9 + [[2, 5, 6]] * 5 + [[3, 1, 9]] * 11 + [[4, 1, 5]] * 4
)
LABELS = np.array([0] * 10 + [0] * 5 + [1] * 2 + [1] * 9 + [2] * 3 + [1] * 2 + [2] * 11 + [0] * 4)
BIAS = np.array([0.0, 0.15, 0.0])


def pictures() -> Split:
    return split_of(COLOURS * 25, LABELS)


def scores(bias: Array) -> Array:
    return COLOURS * 25 / 255 + bias


def compared(dense: Path, sparse: Path, val: Split | None, **options: Any) -> ParityReport:
    with opened(dense) as first, opened(sparse) as second:
        return compare(first, second, HOW, [None, None], val, CompareOptions(**options))


def test_the_counts_are_exactly_those_known_beforehand(tmp_path: Path) -> None:
    dense, sparse = graph_of(tmp_path / "dense.onnx", np.zeros(3)), graph_of(tmp_path / "sparse.onnx", BIAS)
    report = compared(dense, sparse, pictures())
    first, second = scores(np.zeros(3)).argmax(1), scores(BIAS).argmax(1)
    # The bias turns the seven of 6-5-1 from red to green, and the five of 2-5-6 from blue to green.
    assert np.count_nonzero(first != second) == 12
    # Of the seven, five were right and two become right; of the five, three were right and two become right.
    assert (first == LABELS).sum() - (second == LABELS).sum() == (5 - 2) + (3 - 2)
    n = len(LABELS)
    assert report.images == n == 46
    assert report.top1_dense == pytest.approx(100 * (first == LABELS).sum() / n)
    assert report.top1_sparse == pytest.approx(100 * (second == LABELS).sum() / n)
    assert report.top1_drop == pytest.approx(100 * 4 / n)
    assert report.agreement == pytest.approx(100 * (n - 12) / n)
    assert report.top5_dense == report.top5_sparse == 100
    both = int(((first == LABELS) & (second == LABELS)).sum())
    assert report.drop_ci95 == drop_interval(PairedCounts(both, 8, 4, n - both - 12))
    assert report.drop_ci95 is not None
    assert report.drop_ci95[0] < report.top1_drop < report.drop_ci95[1]
    assert report.flips == Flips(12, 8, 4, 0)
    assert report.flip_rate == pytest.approx(100 * 12 / n)
    exact = binomtest(12, n).proportion_ci(0.95, "exact")
    assert report.flip_rate_ci95 == pytest.approx((100 * exact.low, 100 * exact.high))
    assert report.mcnemar_p == pytest.approx(binomtest(4, 12).pvalue)
    drops = {c.name: (c.images, c.drop) for c in report.classes}
    right = [[int(((said == LABELS) & (c == LABELS)).sum()) for said in (first, second)] for c in range(3)]
    assert drops == {
        str(c): (int((c == LABELS).sum()), pytest.approx(100 * (right[c][0] - right[c][1]) / (c == LABELS).sum()))
        for c in range(3)
    }
    assert (report.top5_drop, report.unlabeled_images, report.outputs[0].images) == (0, 0, 46)
    assert report.verdict == FAIL
    assert report.reason == "top-1 drops by 8.70 points; the limit is 1"


def test_the_order_of_the_models_decides_the_sign(tmp_path: Path) -> None:
    dense, sparse = graph_of(tmp_path / "dense.onnx", np.zeros(3)), graph_of(tmp_path / "sparse.onnx", BIAS)
    forth, back = compared(dense, sparse, pictures()), compared(sparse, dense, pictures())
    assert forth.top1_drop == -(back.top1_drop or 0)
    assert forth.agreement == back.agreement
    # Better than the dense model is no failure.
    assert (forth.verdict, back.verdict) == (FAIL, PASS)


def test_equal_models_drop_nothing_and_pass(tmp_path: Path) -> None:
    path = graph_of(tmp_path / "net.onnx", BIAS)
    report = compared(path, path, pictures(), max_top1_drop=0, min_agreement=100)
    assert (report.verdict, report.reason) == (PASS, None)
    assert (report.top1_drop, report.agreement, report.max_abs_diff) == (0, 100, 0)
    assert (report.flips, report.flip_rate, report.mcnemar_p) == (Flips(0, 0, 0, 0), 0, 1)
    assert report.cosine_min == pytest.approx(1)
    assert report.drop_ci95 is not None
    assert report.drop_ci95[0] <= 0 <= report.drop_ci95[1]


@pytest.mark.parametrize(
    ("options", "verdict"),
    [
        ({"max_top1_drop": 100 * 4 / 46}, PASS),
        ({"max_top1_drop": 100 * 4 / 46 - 1e-6}, FAIL),
        ({"max_top1_drop": 50, "min_agreement": 100 * 34 / 46}, PASS),
        ({"max_top1_drop": 50, "min_agreement": 74}, FAIL),
        ({"max_top1_drop": 1, "min_agreement": 99}, FAIL),
    ],
)
def test_the_thresholds_are_where_they_are_said_to_be(options: dict[str, float], verdict: str, tmp_path: Path) -> None:
    dense, sparse = graph_of(tmp_path / "dense.onnx", np.zeros(3)), graph_of(tmp_path / "sparse.onnx", BIAS)
    report = compared(dense, sparse, pictures(), **options)
    assert report.verdict == verdict
    assert (report.reason is None) == (verdict == PASS)
    assert report.max_top1_drop == options["max_top1_drop"]
    if options["max_top1_drop"] == 1:
        assert "points" in str(report.reason)
        assert "agree on 73.91% of images" in str(report.reason)


def test_differences_of_outputs_are_those_of_numpy(tmp_path: Path) -> None:
    dense, sparse = graph_of(tmp_path / "dense.onnx", np.zeros(3)), graph_of(tmp_path / "sparse.onnx", BIAS)
    report = compared(dense, sparse, pictures(), fixed_images=1000)
    a, b = scores(np.zeros(3)), scores(BIAS)
    assert report.max_abs_diff == pytest.approx(np.abs(a - b).max(), abs=1e-6)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert report.cosine_min == pytest.approx(cosines.min(), abs=1e-6)


def spoilt(path: Path, number: float, only_above: float = -1.0) -> Path:
    """As the plain graph, but with `number` in the second score of pictures whose red is above a limit."""
    nodes = [
        helper.make_node("Gather", ["means", "zero"], ["red"], axis=1),
        helper.make_node("Greater", ["red", "limit"], ["hot"]),
        helper.make_node("Where", ["hot", "fill", "means"], ["logits"]),
    ]
    graph_of(path, np.zeros(3), nodes=nodes)
    model = onnx.load(path)
    fill = np.array([0, number, 0], np.float32)
    for name, value in (("zero", np.array([0])), ("limit", np.array(only_above, np.float32)), ("fill", fill)):
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["dense", "sparse", "both"])
@pytest.mark.parametrize("data", [True, False])
def test_outputs_that_are_not_finite_fail_whatever_else_holds(
    number: float, side: str, data: bool, tmp_path: Path
) -> None:
    good, bad = graph_of(tmp_path / "good.onnx", np.zeros(3)), spoilt(tmp_path / "bad.onnx", number)
    pair = {"dense": (bad, good), "sparse": (good, bad), "both": (bad, bad)}[side]
    report = compared(*pair, pictures() if data else None, max_top1_drop=100)
    assert report.verdict == FAIL
    assert "NaN or infinite" in str(report.reason)
    assert report.max_abs_diff is None or number != math.nan


def test_one_bad_picture_among_many_fails_though_it_is_not_among_the_fixed_ones(tmp_path: Path) -> None:
    colors = np.full((200, 3), 50)
    colors[:, 1] = 100
    val = split_of(colors, np.ones(200))
    drawn = {int(i) for i in val.sample(32, 20240229).indices}
    (hot, *_) = sorted(set(range(200)) - drawn)
    colors[hot, 0] = 250
    val = split_of(colors, np.ones(200))
    good, bad = graph_of(tmp_path / "good.onnx", np.zeros(3)), spoilt(tmp_path / "bad.onnx", math.nan, 0.9)
    report = compared(good, bad, val, max_top1_drop=100, fixed_images=32)
    # The outputs on the fixed pictures are equal, so the picture is indeed none of these.
    assert report.max_abs_diff == 0
    assert (report.verdict, report.reason) == (FAIL, "outputs are NaN or infinite")


def test_random_weights_have_no_parity_but_nan_still_fails(tmp_path: Path) -> None:
    good, bad = graph_of(tmp_path / "good.onnx", np.zeros(3)), spoilt(tmp_path / "bad.onnx", math.nan)
    untrained = dataclasses.replace(MADE, trained=False)
    for provenances in ([MADE, untrained], [untrained, MADE], [untrained, None]):
        for path, verdict in ((good, NOT_APPLICABLE), (bad, FAIL)):
            with opened(good) as first, opened(path) as second:
                report = compare(first, second, HOW, provenances, pictures(), CompareOptions())
            assert report.verdict == verdict
            assert report.reason
    with opened(good) as first, opened(good) as second:
        assert compare(first, second, HOW, [MADE, MADE], pictures(), CompareOptions()).verdict == PASS


def test_without_labeled_images_only_outputs_are_compared(tmp_path: Path) -> None:
    dense, sparse = graph_of(tmp_path / "dense.onnx", np.zeros(3)), graph_of(tmp_path / "sparse.onnx", BIAS)
    report = compared(dense, sparse, None)
    assert (report.verdict, report.images) == (NOT_APPLICABLE, 0)
    assert "no labeled images" in str(report.reason)
    accuracies = [report.top1_dense, report.top5_dense, report.top1_sparse, report.top5_sparse]
    assert [*accuracies, report.top1_drop, report.drop_ci95, report.agreement] == [None] * 7
    assert report.max_abs_diff == pytest.approx(0.15, abs=1e-6)


def test_different_numbers_of_classes_are_refused(tmp_path: Path) -> None:
    three, four = graph_of(tmp_path / "3.onnx", np.zeros(3)), graph_of(tmp_path / "4.onnx", np.zeros(4), classes=4)
    for pair in ((three, four), (four, three)):
        with pytest.raises(InputError, match="differ in their outputs"):
            compared(*pair, pictures())


def test_baselines_stand_beside_the_sparse_model(tmp_path: Path) -> None:
    """Every one is judged against the dense model on the same pictures, in the order given."""
    biases = {
        "dense": np.zeros(3),
        "magnitude": BIAS,
        "better": np.array([0, 0.05, 0.0]),
        "mine": np.array([0.3, 0, 0]),
    }
    models = {name: opened(graph_of(tmp_path / f"{name}.onnx", bias)) for name, bias in biases.items()}
    others = {name: models[name] for name in ("magnitude", "better")}
    report = compare(
        models["dense"], models["mine"], HOW, [None, None], pictures(), CompareOptions(), others, sparse_name="mine"
    )
    assert [row.name for row in report.methods] == ["dense", "magnitude", "better", "mine"]
    right = {name: int((scores(bias).argmax(1) == LABELS).sum()) for name, bias in biases.items()}
    for row in report.methods:
        assert row.top1 == pytest.approx(100 * right[row.name] / 46)
        assert row.drop == pytest.approx(100 * (right["dense"] - right[row.name]) / 46)
    assert report.top1_sparse == report.methods[-1].top1
    for model in models.values():
        model.close()


@pytest.mark.parametrize("batch", [1, 3, 64, 100])
def test_graphs_of_a_fixed_batch_give_the_same_counts(batch: int, tmp_path: Path) -> None:
    """46 pictures are no multiple of 3, 64 or 100."""
    plain = compared(
        graph_of(tmp_path / "a.onnx", np.zeros(3)), graph_of(tmp_path / "b.onnx", BIAS), pictures(), fixed_images=5
    )
    fixed = [graph_of(tmp_path / f"{i}.onnx", bias, batch=batch) for i, bias in enumerate((np.zeros(3), BIAS))]
    report = compared(*fixed, pictures(), fixed_images=5)
    assert dataclasses.replace(report, max_abs_diff=None, cosine_min=None) == dataclasses.replace(
        plain, max_abs_diff=None, cosine_min=None
    )
    assert report.max_abs_diff == pytest.approx(plain.max_abs_diff)
    assert report.cosine_min == pytest.approx(plain.cosine_min)


class Remembering:
    """An engine in NumPy that takes a few pictures at a time and remembers how many."""

    inputs = (TensorSpec("x", "float32", (None, 3, 4, 4)),)
    outputs = (TensorSpec("y", "float32", (None, 3)),)
    last_timing = None

    def __init__(self) -> None:
        self.batches: list[int] = []

    def infer(self, feeds: Arrays) -> dict[str, Array]:
        self.batches.append(len(feeds["x"]))
        return {"y": feeds["x"].mean((2, 3))}

    def close(self) -> None:
        pass


def test_no_call_takes_more_pictures_than_the_profiles_allow() -> None:
    wide, narrow = Remembering(), Remembering()
    profiles = (Profile(1, 1, 1), Profile(1, 2, 5))
    with Classifier(wide, "wide") as first, Classifier(narrow, "narrow", profiles) as second:
        report = compare(first, second, HOW, [None, None], pictures(), CompareOptions())
    assert (report.verdict, report.images) == (PASS, 46)
    assert max(narrow.batches) == 5
    assert wide.batches == [32, 14]


def test_the_fixed_pictures_are_the_same_every_time() -> None:
    first, again = (load_fixed_images(HOW, pictures(), 10) for _ in range(2))
    assert first.shape == (10, 3, 4, 4)
    assert np.array_equal(first, again)
    assert np.array_equal(load_fixed_images(HOW, None, 6), load_fixed_images(HOW, None, 6))
    assert np.unique(load_fixed_images(HOW, None, 6)).size > 200
    assert len(load_fixed_images(HOW, pictures(), 1000)) == 46


def test_an_engine_is_faithful_to_itself_and_not_to_another(tmp_path: Path) -> None:
    path, other = graph_of(tmp_path / "net.onnx", np.zeros(3)), graph_of(tmp_path / "other.onnx", BIAS)
    with opened(path) as engine, Classifier(OrtEngine(path, optimized=False), "reference") as reference:
        same = fidelity(engine, reference, HOW, pictures(), 46)
    assert (same.images, same.agreement) == (46, 100)
    assert same.max_abs_diff == pytest.approx(0, abs=1e-6)
    with opened(other) as engine, opened(path) as reference:
        apart = fidelity(engine, reference, HOW, pictures(), 46)
    assert apart.agreement == pytest.approx(100 * 34 / 46)
    assert apart.max_abs_diff == pytest.approx(0.15, abs=1e-6)


# What the models and the data say of themselves.


def test_models_of_other_image_sizes_are_refused_and_both_are_listed(tmp_path: Path) -> None:
    small, large = graph_of(tmp_path / "small.onnx", np.zeros(3)), graph_of(tmp_path / "large.onnx", np.zeros(3))
    model = onnx.load(large)
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 8
    large.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="differ in their inputs") as caught:
        compared(small, large, pictures())
    assert "small.onnx has (None, 3, 4, 4), large.onnx has (None, 3, 8, 8)" in str(caught.value)


def test_outputs_of_other_names_are_matched_by_order_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense, sparse = graph_of(tmp_path / "dense.onnx", np.zeros(3)), graph_of(tmp_path / "sparse.onnx", np.zeros(3))
    model = onnx.load(sparse)
    model.graph.output[0].name = model.graph.node[-1].output[0] = "scores"
    sparse.write_bytes(model.SerializeToString())
    with caplog.at_level("WARNING", logger="maskplan.pipeline"):
        report = compared(dense, sparse, pictures(), max_top1_drop=3)
    assert (report.verdict, report.agreement) == (PASS, 100)
    assert report.notes == ("the outputs are named 'logits' and 'scores': matched by position",)
    assert report.notes[0] in caplog.text
    assert compared(dense, dense, pictures(), max_top1_drop=3).notes == ()


def many() -> Split:
    """Each picture four times: enough to be sure."""
    return split_of(np.repeat(COLOURS, 4, axis=0) * 25, np.repeat(LABELS, 4))


def turned(path: Path) -> Path:
    """The plain graph with its classes in the order green, blue, red."""
    graph_of(path, np.zeros(3), nodes=[helper.make_node("Gather", ["means", "order"], ["logits"], axis=1)])
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 2, 0]), "order"))
    path.write_bytes(model.SerializeToString())
    return path


def test_a_dense_model_with_its_classes_in_another_order_is_refused_though_no_names_tell(tmp_path: Path) -> None:
    """Both sides are wrong alike, so that they agree and nothing drops: the gate would pass what is never right."""
    path = turned(tmp_path / "turned.onnx")
    with pytest.raises(InputError, match="classes are in a different order than the data's") as caught:
        compared(path, path, many())
    assert "top-1 is 4.3% as is, 82.6% with its classes" in str(caught.value)


def test_a_sparse_model_with_its_classes_in_another_order_fails_and_it_is_said(tmp_path: Path) -> None:
    report = compared(graph_of(tmp_path / "dense.onnx", np.zeros(3)), turned(tmp_path / "turned.onnx"), many())
    assert report.verdict == FAIL
    assert any("the sparse model's classes seem to be in a different order" in note for note in report.notes)


def test_records_whose_labels_differ_are_refused_before_anything_runs(tmp_path: Path) -> None:
    first, second = Remembering(), Remembering()
    records = [dataclasses.replace(MADE, labels=labels) for labels in (("r", "g", "b"), ("g", "r", "b"))]
    with pytest.raises(InputError, match="not in the same order"):
        compare(Classifier(first, "a"), Classifier(second, "b"), HOW, records, pictures(), CompareOptions())
    assert first.batches == second.batches == []


def test_each_model_runs_once_on_each_image_and_the_dense_one_not_at_all_where_its_answers_are_known() -> None:
    dense, sparse = Remembering(), Remembering()
    models = Classifier(dense, "dense"), Classifier(sparse, "sparse")
    report = compare(*models, HOW, [None, None], pictures(), CompareOptions(max_top1_drop=3))
    assert (sum(dense.batches), sum(sparse.batches)) == (46, 46)
    said = run_models({"dense": models[0]}, HOW, pictures(), 256)["dense"]
    dense.batches.clear()
    again = compare(*models, HOW, [None, None], pictures(), CompareOptions(max_top1_drop=3), dense_outputs=said)
    assert again == report
    assert dense.batches == []


def test_images_without_labels_leave_agreement_and_outputs(tmp_path: Path) -> None:
    dense, sparse = graph_of(tmp_path / "dense.onnx", np.zeros(3)), graph_of(tmp_path / "sparse.onnx", BIAS)
    val = split_of(COLOURS * 25, np.full(len(LABELS), -1))
    report = compared(dense, sparse, val)
    assert (report.verdict, report.images, report.unlabeled_images) == (NOT_APPLICABLE, 0, 46)
    assert report.agreement == pytest.approx(100 * 34 / 46)
    assert report.flips == Flips(12, 0, 0, 0)
    assert [report.top1_dense, report.top5_sparse, report.top1_drop, report.mcnemar_p, report.classes] == [None] * 4 + [
        ()
    ]
    assert any("no labels" in note for note in report.notes)
    assert compared(dense, sparse, val, min_agreement=70).verdict == PASS
    assert compared(dense, sparse, val, min_agreement=80).verdict == FAIL


# The command.


def with_record(path: Path, made: Provenance) -> Path:
    model = onnx.load(path)
    write_provenance(model, made)
    path.write_bytes(model.SerializeToString())
    return path


def color_models(folder: Path, made: Provenance | None = None) -> tuple[Path, Path]:
    """Classes in the order blue, green, red; the second says green where it is close."""
    pair = []
    for name, bias in (("dense", np.zeros(3)), ("sparse", np.array([0, 1e-4, 0]))):
        path = folder / f"{name}.onnx"
        nodes = [
            helper.make_node("Gather", ["means", "order"], ["turned"], axis=1),
            helper.make_node("Add", ["turned", "bias"], ["logits"]),
        ]
        graph_of(path, bias, nodes=nodes)
        model = onnx.load(path)
        model.graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 0]), "order"))
        path.write_bytes(model.SerializeToString())
        pair.append(path if made is None else with_record(path, made))
    return pair[0], pair[1]


def test_the_command_reports_what_the_gate_saw(cli: Callable[..., Any], toy_data: Path, tmp_path: Path) -> None:
    dense, sparse = color_models(tmp_path, MADE)
    ran = cli("compare", dense, sparse, "--data", toy_data, "--report", tmp_path / "report.json")
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["verdict"], report["images"], report["top1_dense"], report["agreement"]) == ("pass", 24, 100, 100)
    needed = {
        "reason",
        "top5_dense",
        "top1_sparse",
        "top5_sparse",
        "top1_drop",
        "drop_ci95",
        "max_abs_diff",
        "cosine_min",
    }
    assert needed <= set(report)
    assert "100.00 dense, 100.00 sparse" in ran.out


def test_the_commands_thresholds_reach_the_gate(cli: Callable[..., Any], toy_data: Path, tmp_path: Path) -> None:
    dense, _ = color_models(tmp_path)
    wrong = graph_of(tmp_path / "wrong.onnx", np.zeros(3))
    options = ["--data", toy_data, "--max-top1-drop"]
    assert cli("compare", dense, wrong, *options, 60).code == 1
    assert cli("compare", dense, wrong, *options, 70).code == 0
    assert cli("compare", dense, wrong, *options, 70, "--min-agreement", 50).code == 1
    assert cli("compare", dense, wrong, *options, 70, "--min-agreement", 30).code == 0


def test_random_weights_fail_the_command_with_their_reason(
    cli: Callable[..., Any], toy_data: Path, tmp_path: Path
) -> None:
    dense, sparse = color_models(tmp_path, dataclasses.replace(MADE, trained=False))
    ran = cli("compare", dense, sparse, "--data", toy_data, "--report", tmp_path / "report.json")
    assert ran.code == 1
    assert "the weights are random" in ran.err
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] == "not_applicable"


def test_nan_fails_the_command_and_its_report_is_json(cli: Callable[..., Any], toy_data: Path, tmp_path: Path) -> None:
    dense, _ = color_models(tmp_path)
    bad = spoilt(tmp_path / "bad.onnx", math.nan)
    ran = cli("compare", dense, bad, "--data", toy_data, "--max-top1-drop", 100, "--report", tmp_path / "report.json")
    assert ran.code == 1
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert (report["verdict"], report["max_abs_diff"], report["cosine_min"]) == ("fail", None, None)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("shared", ["all", "one"])
def test_images_that_made_either_model_may_not_judge_it(
    side: int, shared: str, cli: Callable[..., Any], toy_data: Path, tmp_path: Path
) -> None:
    val = identify(open_val(toy_data, (), 3))
    sketch = val.sketch if shared == "all" else ("0" * 16, val.sketch[7])
    pair = color_models(tmp_path, MADE)
    with_record(pair[side], MADE)
    model = onnx.load(pair[side])
    del model.metadata_props[:]
    write_provenance(model, dataclasses.replace(MADE, image_sets=(ImageSet("train", len(sketch), "1" * 64, sketch),)))
    pair[side].write_bytes(model.SerializeToString())
    report = tmp_path / "report.json"
    ran = cli("compare", *pair, "--data", toy_data, "--report", report)
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.startswith("error: val images were also used to make the model")
    assert not report.exists()


def test_images_that_made_the_model_and_are_not_compared_on_are_no_overlap(
    cli: Callable[..., Any], toy_data: Path, tmp_path: Path
) -> None:
    data = open_folder(toy_data, (), 3, seed=0)
    sets = (identify(data.train), identify(data.select))
    dense, sparse = color_models(tmp_path, dataclasses.replace(MADE, image_sets=sets))
    assert cli("compare", dense, sparse, "--data", toy_data).code == 0


def test_models_that_want_different_preprocessing_are_refused(
    cli: Callable[..., Any], toy_data: Path, tmp_path: Path
) -> None:
    dense, sparse = color_models(tmp_path)
    with_record(dense, MADE)
    with_record(sparse, dataclasses.replace(MADE, preprocessing=dataclasses.replace(HOW, mean=(0.5, 0.5, 0.5))))
    ran = cli("compare", dense, sparse, "--data", toy_data)
    assert ran.code == 3
    assert ran.err.startswith("error: the models need different preprocessing")
