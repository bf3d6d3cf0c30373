"""The whole line: what it leaves, what it does again and what it does not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from small_line import RECIPE, STAGES, TIMED, VISIBLE, Line, Stages, digests, read_json, stages_of

from maskplan.engines.ort import OrtEngine

# --- a first run


def test_a_run_leaves_the_files_of_the_design(line: Line) -> None:
    assert sorted(p.name for p in line.out.iterdir()) == sorted([".maskplan", *VISIBLE])


def test_a_run_leaves_no_temporary_files(line: Line) -> None:
    assert [p for p in line.out.rglob("*") if "maskplan-tmp" in p.name] == []


def test_no_file_tells_where_it_was_made(line: Line, toy_data: Path) -> None:
    private = [line.out.parent, Path(line.options[0]).parent, toy_data, Path.home(), Path(__file__).parents[2]]
    for path in line.out.rglob("*"):
        if path.is_file():
            found = [str(p) for p in private if str(p) != "/" and str(p).encode() in path.read_bytes()]
            assert not found, f"{path.name} holds {found}"


def test_the_engine_is_2_to_4_and_the_dense_engine_is_not(line: Line) -> None:
    weights = {}
    for name in ("engine.onnx", "dense_engine.onnx"):
        graph = onnx.load(line.out / name).graph
        (weights[name],) = [onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name == "wide.weight"]
    kept = {name: (w.reshape(12, 2, 4, 3, 3) != 0).sum(axis=2) for name, w in weights.items()}

    assert (kept["engine.onnx"] <= 2).all()
    assert (kept["dense_engine.onnx"] > 2).all()
    with safe_open(line.out / "masks.safetensors", "np") as file:
        mask = file.get_tensor("wide.weight")
    assert np.array_equal(mask, weights["engine.onnx"] != 0)


def test_the_report_file_is_the_report(again: Line, cli: Callable[..., Any], tmp_path: Path) -> None:
    ran = cli("engine", *again.options, "--out", again.out, "--report", tmp_path / "copy.json")

    assert ran.code == 0
    assert read_json(tmp_path / "copy.json") == read_json(again.out / "report.json")


def test_the_final_table_shows_every_method_and_the_next_command(
    again: Line, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(again.out.parent)

    shown = cli("engine", *again.options, "--out", "out").out

    for row in ("dense ", "magnitude ", "magnitude, recalibrated ", "learned, recalibrated "):
        assert re.search(rf"^ {row}", shown, re.MULTILINE), shown
    assert "2:4" in shown
    assert "maskplan deploy out/engine.onnx --repository" in shown
    assert str(again.out) not in shown, "paths are shown from where the user stands"


def test_a_folder_named_like_markup_is_printed_as_it_is(
    again: Line, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(again.out.parent)
    again.out.rename("run[bold]")

    assert "run[bold]/engine.onnx" in cli("engine", *again.options, "--out", "run[bold]").out


def test_the_default_folder_is_named_after_the_model(
    again: Line, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(again.out.parent)
    Path("build").mkdir()
    again.out.rename("build/small_net")

    narration = cli("engine", *again.options).err

    assert stages_of(narration).made == ()


# --- the same again


def test_nothing_is_done_again_when_nothing_has_changed(again: Line, cli: Callable[..., Any]) -> None:
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in again.out.rglob("*") if p.name not in ("lock", "")}

    ran = cli("engine", *again.options, "--out", again.out)

    assert ran.code == 0
    assert stages_of(ran.err) == Stages((), STAGES)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in before} == before


def test_it_does_not_matter_where_the_inputs_lie(
    again: Line, cli: Callable[..., Any], toy_data: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(Path(again.options[0]).parent, moved)
    shutil.copytree(toy_data, moved / "data")
    options = [o.replace(str(Path(again.options[0]).parent), str(moved)) for o in again.options]
    options[options.index(str(toy_data))] = str(moved / "data")

    assert stages_of(cli("engine", *options, "--out", again.out).err).made == ()


def test_touched_images_are_looked_at_again_and_found_to_be_the_same(
    again: Line, cli: Callable[..., Any], toy_data: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(toy_data, tmp_path / "data"))
    os.utime(data / "train" / "red" / "00.png", ns=(1, 1))
    options = [str(data) if o == str(toy_data) else o for o in again.options]

    assert stages_of(cli("engine", *options, "--out", again.out).err).made == ("images",)


def changed_recipe(again: Line, old: str, new: str) -> list[str]:
    """The options with a recipe in which a line differs."""
    assert old in RECIPE
    recipe = again.out.parent / "changed.toml"
    recipe.write_text(RECIPE.replace(old, new))
    return [*again.options, "--recipe", str(recipe)]


AFTER_RECALIBRATION = {
    "recalibrate-sparse",
    "export-sparse",
    "check",
    "recalibrate-magnitude-recalibrated",
    "export-magnitude-recalibrated",
    "build-sparse",
    "compare",
    "time",
    "depth",
    "report",
}
EXPORTS = {"export-dense", "export-sparse", "export-magnitude", "export-magnitude-recalibrated"}


@pytest.mark.parametrize(
    ("old", "new", "made"),
    [
        ("max_top1_drop = 100.0", "max_top1_drop = 90.0", {"compare", "report"}),
        ("max_top1_drop = 100.0", "max_top1_drop = 100.0\nmin_agreement = 0.0", {"compare", "report"}),
        ("batches = [1]", "batches = [2]", {"time", "report"}),
        ("[time]", "[recalibrate]\nimages = 24\n[time]", AFTER_RECALIBRATION),
        ("[time]", "[export]\ntolerance_fp32 = 0.01\n[time]", EXPORTS | {"report"}),
    ],
    ids=["gate", "agreement", "batch sizes", "recalibration", "export tolerance"],
)
def test_a_changed_option_reruns_only_what_depends_on_it(
    again: Line, cli: Callable[..., Any], old: str, new: str, made: set[str]
) -> None:
    ran = cli("engine", *changed_recipe(again, old, new), "--out", again.out)

    assert ran.code == 0
    assert set(stages_of(ran.err).made) == made
    assert set(stages_of(ran.err).reused) == set(STAGES) - made


def test_an_option_of_the_command_line_wins_over_the_recipe(again: Line, cli: Callable[..., Any]) -> None:
    ran = cli("engine", *again.options, "--out", again.out, "--max-top1-drop", "50")

    assert stages_of(ran.err).made == ("compare", "report")
    assert read_json(again.out / "report.json")["parity"]["max_top1_drop"] == 50


def test_a_method_in_the_recipe_is_followed(again: Line, cli: Callable[..., Any]) -> None:
    ran = cli("engine", *changed_recipe(again, "[time]", "[mask]\nmethod = 'magnitude'\n[time]"), "--out", again.out)

    assert ran.code == 0
    assert read_json(again.out / "report.json")["masks"]["method"] == "magnitude"


def test_another_precision_starts_at_the_build(again: Line, cli: Callable[..., Any]) -> None:
    ran = cli("engine", *again.options, "--out", again.out, "--precision", "fp16")

    assert ran.code == 0
    later = {"build-sparse", "build-dense", "compare", "time", "report"}
    assert later <= set(stages_of(ran.err).made) <= later | {"check"}
    assert read_json(again.out / "report.json")["engine"]["precision"] == "fp16"
    assert (again.out / "engine.onnx").read_bytes() == (again.out / "sparse.fp16.onnx").read_bytes()


def test_another_mask_method_keeps_the_dense_model(again: Line, cli: Callable[..., Any]) -> None:
    ran = cli("engine", *again.options, "--out", again.out, "--masks", "magnitude")

    assert ran.code == 0
    assert {"load", "images", "export-dense", "build-dense"} <= set(stages_of(ran.err).reused)
    assert "mask" in stages_of(ran.err).made
    names = [row["name"] for row in read_json(again.out / "report.json")["parity"]["methods"]]
    assert names == ["dense", "magnitude", "magnitude, recalibrated"]


def test_its_own_masks_given_as_a_file_make_the_same_model(again: Line, cli: Callable[..., Any], line: Line) -> None:
    ran = cli("engine", *again.options, "--out", again.out, "--masks", line.out / "masks.safetensors")

    assert ran.code == 0
    kept = ("masks.safetensors", "sparse.safetensors", "sparse.onnx", "engine.onnx")
    assert digests(again.out, kept) == digests(line.out, kept)


def test_other_weights_in_the_same_folder_make_everything_anew(
    again: Line, cli: Callable[..., Any], line: Line, tmp_path: Path
) -> None:
    state = torch.load(again.options[2], weights_only=True)
    torch.save({k: v * 2 if k == "wide.weight" else v for k, v in state.items()}, tmp_path / "w2.pth")
    options = [str(tmp_path / "w2.pth") if o == again.options[2] else o for o in again.options]

    ran = cli("engine", *options, "--out", again.out)

    assert ran.code == 0
    assert "load" in stages_of(ran.err).made
    for name, digest in digests(line.out, ["dense.safetensors", "dense.onnx", "sparse.onnx", "engine.onnx"]).items():
        assert digests(again.out, [name])[name] != digest


# --- artifacts that are gone or changed


def remove(path: Path) -> None:
    path.unlink()


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


SPOIL = (remove, flip_a_bit, cut_short)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        # Each file in one way, each way for several files; the slow tests have all combinations.
        pytest.param(name, spoil, marks=() if number % 3 == way else pytest.mark.slow)
        for number, name in enumerate(VISIBLE)
        for way, spoil in enumerate(SPOIL)
    ],
)
def test_an_artifact_that_is_gone_or_changed_is_made_again(
    again: Line, line: Line, cli: Callable[..., Any], name: str, spoil: Callable[[Path], None]
) -> None:
    spoil(again.out / name)

    ran = cli("engine", *again.options, "--out", again.out)

    assert ran.code == 0
    assert stages_of(ran.err).made
    unchanged = [n for n in VISIBLE if n not in TIMED]
    assert digests(again.out, unchanged) == digests(line.out, unchanged)
    for timed in TIMED:
        assert (again.out / timed).is_file()
    for engine in ("engine.onnx", "dense_engine.onnx"):
        assert read_json(again.out / f"{engine}.json")["sha256"] == digests(again.out, [engine])[engine]
    assert read_json(again.out / "report.json")["schema"] == 2


def test_the_files_between_two_stages_are_made_again_too(again: Line, line: Line, cli: Callable[..., Any]) -> None:
    between = [
        p.relative_to(again.out) for p in (again.out / ".maskplan").iterdir() if p.suffix in (".onnx", ".safetensors")
    ]
    assert len(between) >= 5
    for path in between:
        (again.out / path).unlink()

    ran = cli("engine", *again.options, "--out", again.out)

    assert ran.code == 0
    names = [str(path) for path in between]
    assert digests(again.out, names) == digests(line.out, names)


def test_a_folder_without_its_records_is_made_again_to_the_same_bytes(
    again: Line, line: Line, cli: Callable[..., Any]
) -> None:
    for record in (again.out / ".maskplan").glob("*.json"):
        record.unlink()

    ran = cli("engine", *again.options, "--out", again.out)

    assert ran.code == 0
    assert stages_of(ran.err) == Stages(STAGES, ())
    unchanged = [n for n in VISIBLE if n not in TIMED]
    assert digests(again.out, unchanged) == digests(line.out, unchanged)


# --- determinism


@pytest.mark.slow  # test_kill.py has a plain test of runs in other processes
def test_another_process_elsewhere_makes_the_same_bytes(line: Line, tmp_path: Path) -> None:
    """Another folder, working directory, hash seed and process: the same masks, checkpoints, ONNX and predictions."""
    (tmp_path / "cwd").mkdir()
    out = tmp_path / "a rather longer name" / "out"
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "TZ": "Asia/Kathmandu"}
    command = [sys.executable, "-m", "maskplan.pipeline", "engine", *line.options, "--out", str(out)]

    done = subprocess.run(command, cwd=tmp_path / "cwd", env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    unchanged = [n for n in VISIBLE if n not in TIMED]
    assert digests(out, unchanged) == digests(line.out, unchanged)
    keys = {
        folder: {p.name: read_json(p)["key"] for p in (folder / ".maskplan").glob("*.json") if p.name != "report.json"}
        for folder in (out, line.out)
    }
    assert keys[out] == keys[line.out], "keys tell nothing of place or time"
    images = np.random.default_rng(0).standard_normal((5, 3, 16, 16), dtype=np.float32)
    logits = [
        onnxruntime.InferenceSession(folder / "engine.onnx").run(["logits"], {"input": images})[0]
        for folder in (out, line.out)
    ]
    assert np.array_equal(*logits)


def test_fidelity_is_measured_against_the_graph_as_it_is_in_the_file(
    again: Line, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class ShiftedWithoutOptimization(OrtEngine):
        def __init__(self, path: Path, *, optimized: bool = True) -> None:
            super().__init__(path, optimized=optimized)
            self.shift = np.float32(0 if optimized else 0.5)

        def infer(self, feeds: Any) -> Any:
            return {name: output + self.shift for name, output in super().infer(feeds).items()}

    monkeypatch.setattr("maskplan.pipeline.stages.compare.OrtEngine", ShiftedWithoutOptimization)
    shutil.copy(again.out / "report.json", again.out / "before.json")
    options = changed_recipe(again, "max_top1_drop = 100.0", "max_top1_drop = 90.0")

    assert cli("engine", *options, "--out", again.out).code == 0

    report = read_json(again.out / "report.json")
    assert report["engine"]["fidelity"]["max_abs_diff"] == pytest.approx(0.5, abs=1e-4)
    assert report["parity"]["max_abs_diff"] == read_json(again.out / "before.json")["parity"]["max_abs_diff"]


# --- inputs that once left an old answer in place


def test_images_moved_between_classes_of_val_are_compared_again(
    again: Line, toy_data: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    data = Path(shutil.copytree(toy_data, tmp_path / "data"))
    options = [str(data) if option == str(toy_data) else option for option in again.options]
    assert cli("engine", *options, "--out", again.out).code == 0
    (data / "val" / "red").rename(data / "swap")
    (data / "val" / "blue").rename(data / "val" / "red")
    (data / "swap").rename(data / "val" / "blue")

    ran = cli("engine", *options, "--out", again.out)

    assert ran.code == 0
    assert {"images", "compare"} <= set(stages_of(ran.err).made)
    assert "mask" in stages_of(ran.err).reused
    fresh = cli("engine", *options, "--masks", again.out / "masks.safetensors", "--out", tmp_path / "fresh")
    assert fresh.code == 0
    reports = [read_json(folder / "report.json")["parity"] for folder in (again.out, tmp_path / "fresh")]
    assert reports[0]["top1_dense"] == reports[1]["top1_dense"]


def test_a_changed_neighbor_of_the_models_file_makes_the_model_again(
    line: Line, cli: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "net_blocks_of_this_test.py").write_text("SLOPE = 0.0\n")
    lines = Path(line.options[0].rpartition(":")[0]).read_text()
    body = "from net_blocks_of_this_test import SLOPE\n" + lines.replace(
        "return self.head(", "return SLOPE + self.head("
    )
    assert "return SLOPE" in body
    (tmp_path / "small.py").write_text(body)
    options = [f"{tmp_path}/small.py:net", *line.options[1:], "--masks", "magnitude", "--out", tmp_path / "out"]
    assert cli("engine", *options).code == 0
    assert stages_of(cli("engine", *options).err).made == ()
    (tmp_path / "net_blocks_of_this_test.py").write_text("SLOPE = 0.25\n")
    del sys.modules["net_blocks_of_this_test"]

    ran = cli("engine", *options)

    assert ran.code == 0
    assert {"load", "export-dense", "export-sparse", "build-sparse", "compare"} <= set(stages_of(ran.err).made)
    images = np.zeros((1, 3, 16, 16), np.float32)
    dense, untouched = (
        onnxruntime.InferenceSession(folder / "dense.onnx").run(["logits"], {"input": images})[0]
        for folder in (tmp_path / "out", line.out)
    )
    assert dense == pytest.approx(untouched + 0.25, abs=1e-6)
    del sys.modules["net_blocks_of_this_test"]
