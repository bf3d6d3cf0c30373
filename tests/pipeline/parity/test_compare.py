"""Parity against counts that are known beforehand."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from color_models import (
    BIAS,
    COLORS,
    HOW,
    LABELS,
    MADE,
    Array,
    compared,
    graph_of,
    opened,
    pictures,
    scores,
    split_of,
    spoilt,
)
from onnx import helper, numpy_helper
from scipy.stats import binomtest

from maskplan.engines.base import Arrays, Classifier
from maskplan.engines.ort import OrtEngine
from maskplan.pipeline.core.artifacts import Profile, TensorSpec
from maskplan.pipeline.core.choices import FAIL, NOT_APPLICABLE, PASS
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.reports import Flips
from maskplan.pipeline.core.statistics import PairedCounts, drop_interval
from maskplan.pipeline.data.dataset import Split
from maskplan.pipeline.parity.compare import compare, fidelity
from maskplan.pipeline.parity.model_outputs import load_fixed_images, run_models
from maskplan.pipeline.parity.options import CompareOptions


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
    return split_of(np.repeat(COLORS, 4, axis=0) * 25, np.repeat(LABELS, 4))


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
    val = split_of(COLORS * 25, np.full(len(LABELS), -1))
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
