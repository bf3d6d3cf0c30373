"""Refine: which masks the evidence of an engine removes, and which of two engines is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from maskplan.pipeline.core.artifacts import DenseLayer, EngineFile, LayerSparsity, MaskedLayer, MaskSet, Pattern
from maskplan.pipeline.core.choices import FAIL, PASS
from maskplan.pipeline.core.output_reports import OutputParity
from maskplan.pipeline.core.refinement import PassFigures, PassTiming
from maskplan.pipeline.core.reports import ConformanceReport, ParityReport, WeightVerdict
from maskplan.pipeline.masking.maskset import exclude_layers
from maskplan.pipeline.stages.refine import FIRST, REFINED, better, figures, layers_to_restore, why_skip

# --- which masks to remove


def layer(name: str, state: str, *nodes: str) -> LayerSparsity:
    return LayerSparsity(name, None, state, 8, 8, nodes)


def engine(*layers: LayerSparsity) -> EngineFile:
    return EngineFile(
        Path("engine.plan"), "e" * 64, 1, "tensorrt", "fp16", "10", "a GPU", "8.0", 1, True, "strong", (), (), (),
        "f" * 64, 1.0, None, layers,
    )  # fmt: skip


def conformance(*uses: tuple[str, str]) -> ConformanceReport:
    """Of (weight, node) pairs."""
    weights = [
        WeightVerdict(name, node, "Conv", (8, 8, 1, 1), 1, "float16", "conforming", None, 16, 0, 0, None, False)
        for name, node in uses
    ]
    return ConformanceReport(PASS, None, "2:4", len(weights), len(weights), 0, 0, 0, tuple(weights))


def masks_of(*names: str) -> MaskSet:
    layers = tuple(MaskedLayer(name, (8, 8, 1, 1), 16, 64, 0.7, 0.8) for name in names)
    return MaskSet(Path("m"), "a" * 64, "net", Pattern(2, 4), "channel", "magnitude", "d" * 64, layers, ())


def restored(layers: list[LayerSparsity], *uses: tuple[str, str]) -> tuple[str, ...]:
    return layers_to_restore(engine(*layers), conformance(*uses), masks_of(*dict(uses)))


def test_only_masked_weights_of_layers_that_run_dense_are_restored() -> None:
    layers = [layer("a + relu", "dense", "a", "relu"), layer("b", "sparse", "b"), layer("c", "unknown", "c")]
    uses = [(f"{name}.weight", name) for name in ("c", "b", "a")]
    assert restored(layers, *uses) == ("a.weight",)


def test_what_was_not_masked_is_not_restored() -> None:
    found = conformance(("a.weight", "a"), ("head.weight", "head"))
    ran = engine(layer("a", "dense", "a"), layer("head", "dense", "head"))
    assert layers_to_restore(ran, found, masks_of("a.weight")) == ("a.weight",)


def test_layers_that_were_merged_are_restored_together_in_the_order_of_the_masks() -> None:
    assert restored([layer("a || b", "dense", "a", "b")], ("b", "b"), ("a", "a")) == ("b", "a")


@pytest.mark.parametrize("other", ["sparse", "unknown"])
def test_a_second_layer_of_the_same_node_that_is_not_dense_keeps_the_mask(other: str) -> None:
    """Such as the same convolution tuned for another profile."""
    assert restored([layer("a", "dense", "a"), layer("a [profile 1]", other, "a")], ("a", "a")) == ()
    assert restored([layer("a", "dense", "a"), layer("a [profile 1]", "dense", "a")], ("a", "a")) == ("a",)


@pytest.mark.parametrize("other", ["sparse", "unknown", None])
def test_a_weight_used_twice_is_restored_only_when_both_uses_run_dense(other: str | None) -> None:
    uses = [("w", "a"), ("w", "a_2")]
    second = [] if other is None else [layer("a_2", other, "a_2")]
    assert restored([layer("a", "dense", "a"), *second], *uses) == ()
    assert restored([layer("a", "dense", "a"), layer("a_2", "dense", "a_2")], *uses) == ("w",)


def test_a_layer_of_the_same_name_that_names_no_nodes_is_no_evidence() -> None:
    assert restored([layer("a", "dense")], ("a", "a")) == ()


@pytest.mark.parametrize(
    ("states", "why"),
    [
        ("", "tensorrt gives no evidence of which layers run sparse"),
        ("sparse sparse", "all 2 masked layers run sparse"),
        ("sparse unknown", "no masked layer is known to run dense: 1 run sparse, 1 are unknown"),
        ("unknown unknown", "no masked layer is known to run dense: 0 run sparse, 2 are unknown"),
        ("dense dense", "all 2 masked layers run dense: without their masks this would be the dense engine"),
        ("dense sparse", None),
        ("dense unknown", None),
    ],
)
def test_a_second_pass_is_skipped_where_it_would_be_for_nothing(states: str, why: str | None) -> None:
    ran = engine(*(layer(name, state, name) for name, state in zip("ab", states.split(), strict=False)))
    found, masks = conformance(("a", "a"), ("b", "b")), masks_of("a", "b")
    assert why_skip(ran, found, masks, layers_to_restore(ran, found, masks)) == why


def test_a_mask_file_without_some_masks_has_the_others_as_they_were(tmp_path: Path, masks_on_disk: MaskSet) -> None:
    left = exclude_layers(masks_on_disk, {"a"}, "because", tmp_path / "fewer.safetensors")

    before, after = load_file(masks_on_disk.path), load_file(left.path)
    assert set(after) == {"b"}
    assert np.array_equal(after["b"], before["b"])
    assert left.masked == masks_on_disk.masked[1:]
    assert left.dense == (DenseLayer("a", (8, 8, 1, 1), 64, "because"),)
    assert (left.method, left.pattern, left.weights_sha256) == ("magnitude", Pattern(2, 4), "d" * 64)
    again = exclude_layers(masks_on_disk, {"a"}, "because", tmp_path / "again.safetensors")
    assert again.sha256 == left.sha256 != masks_on_disk.sha256


@pytest.fixture
def masks_on_disk(tmp_path: Path) -> MaskSet:
    path = tmp_path / "masks.safetensors"
    generator = np.random.default_rng(0)
    save_file({name: generator.random((8, 8, 1, 1)) < 0.5 for name in "ab"}, path)
    return replace(masks_of("a", "b"), path=path)


# --- which engine to keep


def timed(
    speedup: float, half: float = 0.01, *, dense: float = 8.0, batch: int = 1, spread: float | None = None
) -> Any:
    return PassTiming(batch, dense / speedup, dense, speedup, (speedup - half, speedup + half), spread)


def passed(drop: float | None, *batches: PassTiming, verdict: str = PASS) -> PassFigures:
    return PassFigures("e" * 64, 2, verdict, drop, batches)


@pytest.mark.parametrize(
    ("first", "refined", "kept", "told"),
    [
        (passed(1.0, timed(1.5)), passed(0.5, timed(1.5)), REFINED, "top-1 drop 0.50 points, 1.00 before"),
        (passed(1.0, timed(1.5)), passed(0.5, timed(1.7)), REFINED, "not slower beyond the noise: 1.700x dense"),
        (passed(1.0, timed(1.5)), passed(1.0, timed(1.5)), REFINED, "not slower"),
        (passed(0.5, timed(1.5)), passed(0.6, timed(1.7)), FIRST, "top-1 drop 0.60 points, 0.50 before"),
        (passed(1.0, timed(1.5)), passed(0.5, timed(1.4)), FIRST, "slower beyond the noise: 1.400x dense at batch 1"),
        # The intervals meet.
        (passed(1.0, timed(1.5)), passed(0.5, timed(1.49)), REFINED, "not slower"),
        (passed(1.0, timed(1.5, 0.2)), passed(0.5, timed(1.4, 0.2)), REFINED, "not slower"),
        # The intervals are apart, and by less than one engine differs from itself.
        (passed(1.0, timed(1.5, spread=0.1)), passed(0.5, timed(1.4)), REFINED, "not slower"),
        (passed(1.0, timed(1.5)), passed(0.5, timed(1.4, spread=0.1)), REFINED, "not slower"),
        (passed(1.0, timed(1.5)), passed(0.5, timed(1.4, dense=8.8)), REFINED, "not slower"),
        (passed(1.0, timed(1.5)), passed(0.5, timed(1.4, dense=8.1)), FIRST, "slower"),
        # At one batch size of two.
        (
            passed(1.0, timed(1.5), timed(1.5, batch=8)),
            passed(0.5, timed(1.6), timed(1.2, batch=8)),
            FIRST,
            "noise: 1.200x dense at batch 8 (1.500x before)",
        ),
        # Without images, without times, with neither.
        (passed(None, timed(1.5)), passed(None, timed(1.5)), REFINED, "not slower"),
        (passed(None, timed(1.5)), passed(None, timed(1.3)), FIRST, "slower"),
        (passed(1.0), passed(1.0), REFINED, "top-1 drop"),
        (passed(0.9), passed(1.0), FIRST, "top-1 drop"),
        (passed(1.0, timed(1.5, batch=8)), passed(0.5, timed(1.0, batch=1)), REFINED, "top-1 drop"),
        (passed(None), passed(None), REFINED, "closer to the dense model"),
        (passed(None, timed(1.5)), passed(9.0, timed(1.5)), REFINED, "not slower"),
        (passed(0.0, timed(1.5)), passed(None, timed(1.5)), REFINED, "not slower"),
        # The gate comes first.
        (passed(2.0, timed(1.5), verdict=FAIL), passed(0.5, timed(1.0)), REFINED, "first engine fails the parity gate"),
        (passed(1.0, timed(1.5)), passed(0.5, timed(1.6), verdict=FAIL), FIRST, "refined engine fails"),
        (passed(3.0, timed(1.5), verdict=FAIL), passed(2.0, timed(1.5), verdict=FAIL), REFINED, "top-1 drop"),
    ],
)  # fmt: skip
def test_the_better_engine_is_kept(first: PassFigures, refined: PassFigures, kept: str, told: str) -> None:
    choice = better(first, refined, ("a",))
    assert choice.kept == kept
    assert told in choice.reason


def test_a_tie_in_which_nothing_was_restored_goes_to_the_first() -> None:
    assert better(passed(1.0, timed(1.5)), passed(1.0, timed(1.5)), ()).kept == FIRST


# --- of networks that are compared by output


def erred(error: float | None, *batches: PassTiming, verdict: str = PASS) -> PassFigures:
    return replace(passed(None, *batches, verdict=verdict), relative_error=error)


@pytest.mark.parametrize(
    ("first", "refined", "kept", "told"),
    [
        (erred(0.2), erred(0.1), REFINED, "relative error 0.1, 0.2 before"),
        (erred(0.1), erred(0.2), FIRST, "the refined engine is worse: relative error 0.2, 0.1 before"),
        (erred(0.1), erred(0.1), REFINED, "relative error 0.1, 0.1 before"),
        (erred(0.2, timed(1.5)), erred(0.1, timed(1.4)), FIRST, "slower beyond the noise: 1.400x dense at batch 1"),
        (erred(0.1, timed(1.5)), erred(0.2, timed(1.7)), FIRST, "relative error 0.2, 0.1 before"),
        (erred(0.2, timed(1.5)), erred(0.1, timed(1.5)), REFINED, "before; not slower beyond the noise"),
        (erred(0.3, verdict=FAIL), erred(0.4), REFINED, "first engine fails the parity gate"),
        (erred(0.3), erred(0.2, verdict=FAIL), FIRST, "refined engine fails"),
        # Of outputs that are not finite.
        (erred(None, timed(1.5)), erred(0.1, timed(1.5)), REFINED, "not slower"),
        (erred(0.1), erred(None), REFINED, "closer to the dense model"),
        # A classifier that is compared by output has both.
        (replace(erred(0.1), top1_drop=1.0), replace(erred(0.2), top1_drop=0.5), FIRST, "relative error"),
    ],
)
def test_the_engine_with_the_smaller_error_is_kept(
    first: PassFigures, refined: PassFigures, kept: str, told: str
) -> None:
    choice = better(first, refined, ("a",))
    assert choice.kept == kept
    assert told in choice.reason


def of_output(name: str, error: float | None) -> OutputParity:
    return OutputParity(name, "values", 4, error, None, None, None, 0.9, 1.0)


def measured(verdict: str, *errors: float | None) -> ParityReport:
    return ParityReport(
        verdict, None, 0, None, None, None, None, None, None, None, None, None, 1.0,
        by_output=tuple(of_output(f"o{i}", error) for i, error in enumerate(errors)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("errors", "worst"), [((0.1, 0.3, 0.2), 0.3), ((None, 0.2), 0.2), ((None,), None), ((0.0,), 0.0), ((), None)]
)
def test_the_error_of_a_pass_is_that_of_its_worst_output(errors: tuple[float | None, ...], worst: float | None) -> None:
    found = figures(engine(), masks_of("a", "b"), measured(FAIL, *errors))
    assert found == PassFigures("e" * 64, 2, FAIL, None, (), worst)


def test_without_a_second_pass_nothing_was_measured() -> None:
    assert figures(engine(), masks_of("a")) == PassFigures("e" * 64, 1, "not_applicable", None, ())
