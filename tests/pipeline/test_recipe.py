"""Recipes: every option can be given, every problem is told, and ranges are those of arithmetic."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.validation import above, at_least
from maskplan.pipeline.recipe import Recipe, read_recipe

# A value other than the default for every option of every table, as TOML and as Python has it.
OTHERS: dict[str, dict[str, tuple[str, Any]]] = {
    "permute": {"effort": ("0.5", 0.5), "restarts": ("3", 3), "seed": ("14", 14)},
    "mask": {
        "method": ("'magnitude'", "magnitude"),
        "pattern": ("'1:4'", "1:4"),
        "layout": ("'flat'", "flat"),
        "include_linear": ("true", True),
        "layers": ("['layer3.*']", ("layer3.*",)),
        "min_channels": ("64", 64),
        "keep_dense_budget": ("5", 5.0),
        "images": ("64", 64),
        "init_method": ("'layerwise'", "layerwise"),
        "few_images": ("true", True),
    },
    "learn": {
        "epochs": ("7", 7),
        "batch": ("16", 16),
        "lr": ("0.25", 0.25),
        "tau_start": ("2", 2.0),
        "tau_end": ("0.5", 0.5),
        "noise_start": ("0.75", 0.75),
        "noise_end": ("0.5", 0.5),
        "hard": ("false", False),
        "init_std": ("1.5", 1.5),
        "init_margin": ("2.5", 2.5),
        "distill": ("0.5", 0.5),
        "distill_temperature": ("4.0", 4.0),
        "norm_reward": ("0.125", 0.125),
        "match_features": ("0.5", 0.5),
        "match_blocks": ("0.25", 0.25),
        "judge_every": ("3", 3),
        "ema": ("0.75", 0.75),
        "augment": ("'shift+flip'", "shift+flip"),
        "patience": ("3", 3),
        "save_every": ("100", 100),
        "budget_minutes": ("1.5", 1.5),
        "seed": ("11", 11),
    },
    "recalibrate": {
        "images": ("64", 64),
        "batch": ("32", 32),
        "seed": ("12", 12),
        "augment": ("'crop'", "crop"),
        "relative": ("false", False),
    },
    "synthesize": {
        "images": ("64", 64),
        "steps": ("20", 20),
        "batch": ("32", 32),
        "lr": ("0.1", 0.1),
        "smoothness": ("0.5", 0.5),
        "seed": ("15", 15),
    },
    "export": {"tolerance_fp32": ("1e-2", 0.01), "tolerance_fp16": ("0.5", 0.5)},
    "calibrate": {
        "images": ("64", 64),
        "batch": ("8", 8),
        "method": ("'percentile'", "percentile"),
        "percentile": ("99.9", 99.9),
        "exclude": ("['stem*']", ("stem*",)),
        "keep_fp32": ("['/head/*']", ("/head/*",)),
        "quantize_outputs": ("true", True),
        "quantize_heads": ("true", True),
        "max_drop": ("0.5", 0.5),
        "seed": ("13", 13),
    },
    "tensorrt": {
        "tf32": ("true", True),
        "optimization_level": ("4", 4),
        "workspace_bytes": ("1_000_000", 1_000_000),
        "timing_cache": ("'a/cache'", Path("a/cache")),
        "timing_cache_wait_s": ("2.5", 2.5),
        "version_compatible": ("true", True),
        "hardware_compatible": ("true", True),
        "refittable": ("true", True),
        "strip_plan": ("true", True),
        "targets": ("['sm86']", ("sm86",)),
    },
    "model": {"outputs": ("['boxes:values']", ("boxes:values",))},
    "compile": {"mode": ("'required'", "required")},
    "compare": {
        "max_top1_drop": ("-0.5", -0.5),
        "min_agreement": ("99", 99.0),
        "fixed_images": ("5", 5),
        "max_top5_drop": ("0.25", 0.25),
        "max_flip_rate": ("2", 2.0),
        "max_class_drop": ("5.0", 5.0),
        "min_cosine": ("0.99", 0.99),
        "min_sqnr_db": ("20", 20.0),
        "max_relative_error": ("0.1", 0.1),
        "max_metric_drop": ("0.5", 0.5),
        "use_ci": ("true", True),
    },
    "time": {
        "batches": ("[2, 4, 16]", (2, 4, 16)),
        "warm_up": ("0", 0),
        "seconds": ("0.5", 0.5),
        "min_repeats": ("6", 6),
        "max_repeats": ("600", 600),
        "shape": ("[3, 64, 64]", (3, 64, 64)),
    },
}


def read(tmp_path: Path, text: str | bytes, seed: int = 0) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_recipe(path, seed)


def refused(tmp_path: Path, text: str | bytes) -> InputError:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert str(tmp_path / "recipe.toml") in str(caught.value)
    return caught.value


def given_as(tables: dict[str, dict[str, tuple[str, Any]]]) -> str:
    return "".join(
        f"[{name}]\n" + "".join(f"{key} = {text}\n" for key, (text, _) in options.items())
        for name, options in tables.items()
    )


def test_without_a_recipe_the_defaults_hold(tmp_path: Path) -> None:
    assert read_recipe(None, 0) == Recipe()
    assert read(tmp_path, "") == Recipe()
    assert read(tmp_path, "# only a remark\n[learn]\n[time]\n") == Recipe()


def test_the_list_of_other_values_leaves_no_option_out() -> None:
    defaults = Recipe()
    for table, options in OTHERS.items():
        record = getattr(defaults, table)
        assert set(options) == {f.name for f in dataclasses.fields(record)} - {
            "learn",
            "set_in_recipe",
            "judge_augment",
            "judge_relative",
        }
        for name, (_, value) in options.items():
            assert getattr(record, name) != value, f"{table}.{name} is its default"
    assert set(OTHERS) == {f.name for f in dataclasses.fields(defaults)}


def test_every_option_reaches_its_stage(tmp_path: Path) -> None:
    recipe = read(tmp_path, given_as(OTHERS), seed=5)
    for table, options in OTHERS.items():
        for name, (_, value) in options.items():
            found = getattr(getattr(recipe, table), name)
            assert found == value, f"{table}.{name}"
            assert type(found) is type(value), f"{table}.{name}"
    # The mask stage learns by the table [learn].
    assert recipe.mask.learn == recipe.learn


def test_the_options_that_a_recipe_sets_are_known_though_they_are_defaults(tmp_path: Path) -> None:
    default = Recipe().learn
    recipe = read(tmp_path, f"[learn]\nrate = {default.lr}\nepochs = {default.epochs}\n")
    assert recipe.learn == default
    assert recipe.mask.set_in_recipe == ("epochs", "lr")


SINGLE = [(table, name) for table, options in OTHERS.items() for name in options]


@pytest.mark.parametrize(("table", "name"), SINGLE)
def test_one_option_changes_nothing_else(table: str, name: str, tmp_path: Path) -> None:
    text, value = OTHERS[table][name]
    recipe = read(tmp_path, f"{table}.{name} = {text}\n")
    wanted = dataclasses.replace(getattr(Recipe(), table), **{name: value})
    changed = {table: wanted}
    if table == "learn":
        changed["mask"] = dataclasses.replace(Recipe().mask, learn=wanted, set_in_recipe=(name,))
    if name in ("augment", "relative") and table == "recalibrate":
        # Masks are judged with the statistics that they will have.
        changed["learn"] = dataclasses.replace(Recipe().learn, **{f"judge_{name}": value})
        changed["mask"] = dataclasses.replace(Recipe().mask, learn=changed["learn"])
    assert recipe == dataclasses.replace(Recipe(), **changed)


@pytest.mark.parametrize(
    "text",
    [
        "min_repeats = 3000\nmax_repeats = 5000",
        "max_repeats = 5000\nmin_repeats = 3000",
        "min_repeats = 1\nmax_repeats = 2",
    ],
)
def test_options_that_bound_each_other_are_judged_together(text: str, tmp_path: Path) -> None:
    recipe = read(tmp_path, f"[time]\n{text}\n")
    wanted = dict(line.split(" = ") for line in text.splitlines())
    assert (recipe.time.min_repeats, recipe.time.max_repeats) == (
        int(wanted["min_repeats"]),
        int(wanted["max_repeats"]),
    )


def test_options_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    assert "max_repeats is 20" in str(refused(tmp_path, "[time]\nmin_repeats = 30\nmax_repeats = 20\n"))


def test_the_seed_is_for_every_stage_that_the_recipe_gives_none(tmp_path: Path) -> None:
    plain = read_recipe(None, 9)
    assert (plain.learn.seed, plain.recalibrate.seed, plain.mask.learn.seed) == (9, 9, 9)
    own = read(tmp_path, "[learn]\nseed = 4\n", seed=9)
    assert (own.learn.seed, own.recalibrate.seed, own.mask.learn.seed) == (4, 9, 4)
    zero = read(tmp_path, "[recalibrate]\nseed = 0\n", seed=9)
    assert (zero.learn.seed, zero.recalibrate.seed) == (9, 0)


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    problems = {
        "[lern]\nepochs = 3": ["[lern]", "did you mean 'learn'"],
        "[quantization]": [
            "[quantization]",
            "mask, learn, recalibrate, synthesize, export, calibrate, compile, tensorrt, compare, time",
        ],
        "[learn]\nepoch = 2\nlr = 'fast'": ["[learn]", "'epoch'", "did you mean 'epochs'", "'fast'", "float"],
        "[time]\nbatches = 8\nseconds = -1": ["[time]", "batches", "seconds is -1"],
        "[export]\nquux = 18": ["[export]", "'quux'", "its keys are tolerance_fp16, tolerance_fp32"],
        "[mask]\npattern = '5:4'\nlayout = 'x'": ["[mask]", "N:M pattern", "'x'"],
    }
    message = str(refused(tmp_path, "\n".join(problems)))
    for texts in problems.values():
        for text in texts:
            assert text in message
    assert "9 problems" in message
    # A good option among bad ones is not a problem.
    assert "warm_up" not in str(refused(tmp_path, "[time]\nwarm_up = 1\nleast = 0\n"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[learn]\nepochs = 2.0", "epochs"),
        ("[learn]\nepochs = true", "epochs"),
        ("[learn]\nseed = '3'", "seed"),
        ("[learn]\nlr = nan", "lr"),
        ("[learn]\nbudget_minutes = inf", "budget_minutes"),
        ("[learn]\ntau_end = 0", "tau_end"),
        ("[time]\nbatches = [1, 2.5]", "batches"),
        ("[time]\nbatches = []", "batch"),
        ("[compare]\nmax_top1_drop = [1.0]", "max_top1_drop"),
        ("[mask]\npattern = 2", "pattern"),
        ("[mask.learn]\nepochs = 3", "learn"),
        ("time = 3", "time is not a table"),
        ("[[learn]]\nepochs = 3", "learn is not a table"),
    ],
)
def test_values_of_the_wrong_kind_are_refused_by_name(text: str, says: str, tmp_path: Path) -> None:
    error = refused(tmp_path, text)
    assert says in str(error)
    assert "Traceback" not in str(error)


def test_a_refused_value_is_shown_with_what_to_give_instead(tmp_path: Path) -> None:
    for text in ("[mask]\npattern = '5:4'\n", "[time]\nseconds = -3.5\n", "[mask]\nlayout = 'diagonal'\n"):
        message = str(refused(tmp_path, text))
        assert text.partition("= ")[2].strip("'\n") in message
    assert "at least 0" in str(refused(tmp_path, "[time]\nseconds = -3.5\n"))
    assert "channel, flat" in str(refused(tmp_path, "[mask]\nlayout = 'diagonal'\n"))


@pytest.mark.parametrize(
    "text", [b"[learn", b"epochs: 3", b"\xff\xfe\x00", b"[learn]\nseed = 1\nseed = 2\n", b"[a]\n[a]\n"]
)
def test_what_is_not_toml_is_called_that(text: bytes, tmp_path: Path) -> None:
    assert refused(tmp_path, text).what == "the recipe is not TOML"


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(InputError) as caught:
            read_recipe(path, 0)
        assert str(path) in str(caught.value)


NUMBERS = st.one_of(st.floats(), st.integers(-50, 50), st.none())


@pytest.mark.parametrize(
    ("check", "holds"), [(at_least, lambda value, low: value >= low), (above, lambda value, low: value > low)]
)
@given(st.integers(-5, 5), st.dictionaries(st.sampled_from(["first", "second", "third"]), NUMBERS, min_size=1))
def test_ranges_are_those_of_arithmetic(
    check: Callable[..., None],
    holds: Callable[[float, float], bool],
    low: int,
    values: dict[str, float | None],
) -> None:
    bad = [
        name
        for name, value in values.items()
        if value is not None and (math.isnan(value) or math.isinf(value) or not holds(value, low))
    ]
    if not bad:
        check(low, **values)
        return
    with pytest.raises(InputError) as caught:
        check(low, **values)
    assert caught.value.what == f"{bad[0]} is {values[bad[0]]}"
    assert f" {low}" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("text", "table", "field", "value"),
    [
        ("[learn]\nrate = 0.25", "learn", "lr", 0.25),
        ("[learn]\nprior = 1.5", "learn", "init_std", 1.5),
        ("[learn]\nlead = 2.5", "learn", "init_margin", 2.5),
        ("[learn]\nsoftness = 4.0", "learn", "distill_temperature", 4.0),
        ("[mask]\nprior = 'layerwise'", "mask", "init_method", "layerwise"),
        ("[compare]\nconfident = true", "compare", "use_ci", True),
        ("[tensorrt]\nstripped = true", "tensorrt", "strip_plan", True),
    ],
)
def test_keys_under_their_old_names_are_read_with_a_note(
    text: str, table: str, field: str, value: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="maskplan.pipeline.recipe"):
        recipe = read(tmp_path, text)
    assert getattr(getattr(recipe, table), field) == value
    assert f"is now called {field}" in caplog.text
