"""The whole line: what it leaves, what it does again and what it does not, in this folder and in another one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open

from pipeline.cli.app import main

MODEL = """
import torch
from torch import nn

PREPROCESSING = {"height": 16, "width": 16, "resize": 0, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
LABELS = ("blue", "green", "red")


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.wide, self.bn2 = nn.Conv2d(8, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, 1, 1, groups=12)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = torch.relu(self.bn1(self.stem(x)))
        x = torch.relu(self.bn2(self.wide(x)))
        return self.head(self.depthwise(x).mean((2, 3)))


def net():
    return Small()
"""

RECIPE = """
[learn]
epochs = 2
[time]
seconds = 0.1
batches = [1]
[compare]
fixed_images = 2
max_top1_drop = 100.0
"""

VISIBLE = (
    "dense.fp16.onnx",
    "dense.onnx",
    "dense.safetensors",
    "dense_engine.onnx",
    "dense_engine.onnx.json",
    "engine.onnx",
    "engine.onnx.json",
    "masks.safetensors",
    "report.html",
    "report.json",
    "sparse.fp16.onnx",
    "sparse.onnx",
    "sparse.safetensors",
)
# What a build or a clock writes holds times; everything else is the same to the byte.
TIMED = ("report.html", "report.json", "dense_engine.onnx.json", "engine.onnx.json")
STAGES = (
    "load",
    "images",
    "export-dense",
    "mask",
    "bake-sparse",
    "recalibrate-sparse",
    "export-sparse",
    "check",
    "baseline-mask",
    "bake-magnitude",
    "export-magnitude",
    "bake-magnitude-recalibrated",
    "recalibrate-magnitude-recalibrated",
    "export-magnitude-recalibrated",
    "build-sparse",
    "build-dense",
    "compare",
    "time",
    "report",
)

# Runs the command line where importing any of the named packages fails.
WITHOUT = """
import sys

blocked = sys.argv.pop(1).split(",")


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is not here", name=name)


sys.meta_path.insert(0, Blocker())
from pipeline.cli.app import main

sys.exit(main(sys.argv[1:]))
"""
NO_TORCH = "torch,torchvision,timm,tensorrt,pycuda"


@dataclass(frozen=True)
class Line:
    """A finished run of the small model, and what it was made from. `options` is everything but `--out`."""

    out: Path
    options: tuple[str, ...]


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory, toy_data: Path) -> Line:
    """Run once; do not write to it."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "small.py").write_text(MODEL)
    (folder / "recipe.toml").write_text(RECIPE)
    namespace: dict[str, Any] = {}
    exec(MODEL, namespace)
    torch.manual_seed(3)
    torch.save(namespace["net"]().state_dict(), folder / "w.pth")
    options = (f"{folder}/small.py:net", "--weights", f"{folder}/w.pth", "--data", str(toy_data))
    options += ("--recipe", f"{folder}/recipe.toml")
    out = tmp_path_factory.mktemp("first") / "out"
    assert main(["engine", *options, "--out", str(out)]) == 0
    return Line(out, options)


@pytest.fixture
def again(line: Line, tmp_path: Path) -> Line:
    """A copy of the finished run, to go on with."""
    return Line(Path(shutil.copytree(line.out, tmp_path / "out")), line.options)


@dataclass(frozen=True)
class Stages:
    """Which stages a run did, and which it took as they were, by its narration."""

    made: tuple[str, ...]
    reused: tuple[str, ...]


def stages_of(narration: str) -> Stages:
    return Stages(
        tuple(re.findall(r"^([a-z0-9-]+) …$", narration, re.MULTILINE)),
        tuple(re.findall(r"^([a-z0-9-]+): unchanged$", narration, re.MULTILINE)),
    )


def digests(folder: Path, names: Sequence[str] = VISIBLE) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


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


@pytest.mark.parametrize("spoil", [remove, flip_a_bit, cut_short])
@pytest.mark.parametrize("name", VISIBLE)
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
    assert read_json(again.out / "report.json")["schema"] == 1


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


def test_another_process_elsewhere_makes_the_same_bytes(line: Line, tmp_path: Path) -> None:
    """Another folder, working directory, hash seed and process: the same masks, checkpoints, ONNX and predictions."""
    (tmp_path / "cwd").mkdir()
    out = tmp_path / "a rather longer name" / "out"
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "TZ": "Asia/Kathmandu"}
    command = [sys.executable, "-m", "pipeline", "engine", *line.options, "--out", str(out)]

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


# --- handover


def run_without(packages: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT, packages, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def moved(line: Line, tmp_path: Path) -> Line:
    """The finished folder on what may be another host: moved, the original gone."""
    first = Path(shutil.copytree(line.out, tmp_path / "first" / "out"))
    (tmp_path / "host").mkdir()
    elsewhere = Path(shutil.move(first, tmp_path / "host" / "elsewhere"))
    shutil.rmtree(tmp_path / "first")
    return Line(elsewhere, line.options)


BEFORE_BUILD = STAGES[: STAGES.index("build-sparse")]


def test_on_a_host_without_torch_the_tensorrt_backend_starts_at_the_build(moved: Line) -> None:
    before = digests(moved.out)

    done = run_without(
        NO_TORCH, "engine", *moved.options, "--backend", "tensorrt", "--out", moved.out, cwd=moved.out.parent
    )

    assert done.returncode == 3, done.stderr
    assert stages_of(done.stderr) == Stages(("build-sparse",), BEFORE_BUILD)
    assert "Traceback" not in done.stderr
    message = done.stderr[done.stderr.index("error:") :]
    assert "TensorRT is not here" in message
    assert "pip install 'maskplan[tensorrt]'" in message
    assert digests(moved.out) == before


def test_a_refused_handover_does_not_spoil_the_folder_for_the_old_backend(moved: Line, cli: Callable[..., Any]) -> None:
    cli("engine", *moved.options, "--backend", "tensorrt", "--out", moved.out)

    ran = cli("engine", *moved.options, "--out", moved.out)

    assert ran.code == 0
    assert set(stages_of(ran.err).made) <= {"check"}


def test_on_a_host_without_torch_the_same_backend_does_nothing_again(moved: Line) -> None:
    done = run_without(
        NO_TORCH, "engine", *moved.options, "--backend", "onnxruntime", "--out", moved.out, cwd=moved.out.parent
    )

    assert done.returncode == 0, done.stderr
    # The report states why the backend was taken, which is another reason now.
    assert set(stages_of(done.stderr).made) <= {"report"}
    assert set(STAGES) - {"report"} <= set(stages_of(done.stderr).reused)
    assert read_json(moved.out / "report.json")["engine"]["backend_reason"] == "asked for"


def test_on_a_host_without_torch_everything_from_the_build_on_runs(moved: Line, tmp_path: Path) -> None:
    arguments = ("--precision", "fp16", "--backend", "onnxruntime", "--repository", tmp_path / "models")

    done = run_without(NO_TORCH, "engine", *moved.options, *arguments, "--out", moved.out, cwd=moved.out.parent)

    assert done.returncode == 0, done.stderr
    assert set(BEFORE_BUILD) - {"check"} <= set(stages_of(done.stderr).reused)
    assert {"build-sparse", "build-dense", "compare", "time", "report"} <= set(stages_of(done.stderr).made)
    assert (tmp_path / "models" / "small_net" / "1" / "model.onnx").is_file()


def test_without_torch_an_unfinished_folder_says_what_to_install(moved: Line) -> None:
    (moved.out / "sparse.onnx").unlink()

    done = run_without(NO_TORCH, "engine", *moved.options, "--out", moved.out, cwd=moved.out.parent)

    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert "PyTorch is not installed" in done.stderr
    assert "maskplan[learn]" in done.stderr


# --- untrained models


@pytest.fixture(scope="module")
def untrained(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Line:
    """A run of random weights; do not write to it."""
    out = tmp_path_factory.mktemp("untrained") / "out"
    options = ["random" if o.endswith("w.pth") else o for o in line.options]
    assert main(["engine", *options, "--out", str(out)]) == 0
    return Line(out, tuple(options))


def test_random_weights_are_marked_untrained_and_not_judged(untrained: Line) -> None:
    report = read_json(untrained.out / "report.json")

    assert report["model"]["trained"] is False
    assert report["model"]["origin"] == "random, seed 0"
    parity = report["parity"]
    assert parity["verdict"] == "not_applicable"
    assert "random" in parity["reason"]
    assert [parity[key] for key in ("images", "top1_dense", "top1_sparse", "top1_drop", "agreement")] == [0] + [
        None
    ] * 4
    assert parity["methods"] == []
    assert report["conformance"]["verdict"] == "pass"
    assert report["timing"]["batches"][0]["dense"]["p50_ms"] > 0


def test_random_weights_are_marked_in_every_artifact(untrained: Line) -> None:
    for name in ("dense.safetensors", "sparse.safetensors"):
        with safe_open(untrained.out / name, "np") as file:
            assert json.loads(file.metadata()["maskplan"])["trained"] is False
    for name in ("dense.onnx", "sparse.onnx", "sparse.fp16.onnx"):
        (entry,) = [p for p in onnx.load(untrained.out / name).metadata_props if p.key == "maskplan"]
        assert json.loads(entry.value)["trained"] is False
    assert read_json(untrained.out / "engine.onnx.json")["provenance"]["trained"] is False
    assert "untrained" in (untrained.out / "report.html").read_text()


def test_random_weights_are_announced_loudly_and_not_to_be_deployed_next(
    untrained: Line, cli: Callable[..., Any]
) -> None:
    shown = cli("engine", *untrained.options, "--out", untrained.out).out

    assert "UNTRAINED" in shown
    assert "good for timing" in shown
    assert "maskplan deploy" not in shown


def test_weights_that_cannot_be_had_are_replaced_by_random_ones_with_a_warning(
    untrained: Line, cli: Callable[..., Any], tmp_path: Path
) -> None:
    options = ["auto" if o == "random" else o for o in untrained.options]
    shutil.copytree(untrained.out, tmp_path / "out")

    ran = cli("-q", "engine", *options, "--out", tmp_path / "out")

    assert ran.code == 0
    assert "warning: " in ran.err
    assert "random weights" in ran.err
    assert "timing only" in ran.err


def test_compare_does_not_pass_random_weights(untrained: Line, cli: Callable[..., Any], toy_data: Path) -> None:
    sides = (untrained.out / "dense_engine.onnx", untrained.out / "engine.onnx")

    ran = cli("compare", *sides, "--data", toy_data, "--max-top1-drop", "100")

    assert ran.code == 1
    assert "not applicable" in ran.out
    assert "random" in ran.err


def test_deploy_refuses_random_weights_unless_told(untrained: Line, cli: Callable[..., Any], tmp_path: Path) -> None:
    arguments = ("deploy", untrained.out / "engine.onnx", "--repository", tmp_path / "models")

    refused = cli(*arguments)
    assert refused.code == 3
    assert "--allow-untrained" in refused.err
    assert not (tmp_path / "models").exists()

    assert cli(*arguments, "--allow-untrained").code == 0
    assert (tmp_path / "models" / "small_net" / "1" / "model.onnx").is_file()


def test_the_line_does_not_deploy_random_weights_unless_told(
    untrained: Line, cli: Callable[..., Any], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(untrained.out, tmp_path / "out"))
    arguments = ("engine", *untrained.options, "--out", out, "--repository", tmp_path / "models")

    refused = cli(*arguments)
    assert refused.code == 3
    assert not (tmp_path / "models").exists()
    assert (out / "report.json").is_file(), "what the run found is kept"

    told = cli(*arguments, "--allow-untrained")
    assert told.code == 0
    assert f"{tmp_path / 'models' / 'small_net'}, version 1" in told.out


# --- the accuracy gate


@dataclass(frozen=True)
class Failed:
    """A run whose masks cost too much accuracy."""

    code: int
    out: Path
    repository: Path


@pytest.fixture(scope="module")
def failed(finished_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Failed:
    """Magnitude masks without recalibration cost the digits about 30 points; do not write to it."""
    folder = tmp_path_factory.mktemp("failed")
    out = Path(shutil.copytree(finished_digits, folder / "out"))
    (folder / "r.toml").write_text("[recalibrate]\nimages = 0\n[time]\nseconds = 0.1\n")
    arguments = ["engine", "--masks", "magnitude", "--recipe", f"{folder}/r.toml", "--out", str(out)]
    return Failed(main([*arguments, "--repository", f"{folder}/models"]), out, folder / "models")


def test_lost_accuracy_ends_the_run_with_exit_code_1(failed: Failed) -> None:
    assert failed.code == 1


def test_lost_accuracy_is_reported_in_full(failed: Failed) -> None:
    report = read_json(failed.out / "report.json")

    parity = report["parity"]
    assert parity["verdict"] == "fail"
    assert "1 are allowed" in parity["reason"]
    assert 10 < parity["top1_drop"] < 60
    assert parity["top1_drop"] == pytest.approx(parity["top1_dense"] - parity["top1_sparse"])
    assert parity["drop_ci95"][0] < parity["top1_drop"] < parity["drop_ci95"][1]
    assert report["conformance"]["verdict"] == "pass"
    assert report["masks"]["method"] == "magnitude"
    assert "accuracy is not kept" in (failed.out / "report.html").read_text()


def test_an_engine_that_lost_accuracy_is_not_deployed(failed: Failed) -> None:
    assert not failed.repository.exists()


def test_lost_accuracy_says_so_each_time(failed: Failed, cli: Callable[..., Any], tmp_path: Path) -> None:
    out = Path(shutil.copytree(failed.out, tmp_path / "out"))
    (tmp_path / "r.toml").write_text("[recalibrate]\nimages = 0\n[time]\nseconds = 0.1\n")

    ran = cli("engine", "--masks", "magnitude", "--recipe", tmp_path / "r.toml", "--out", out)

    assert stages_of(ran.err).made == ()
    assert ran.code == 1
    assert "failed: parity: top-1 drops by" in ran.err
    assert "maskplan deploy" not in ran.out


def test_recalibration_is_what_the_digits_need(finished_digits: Path) -> None:
    parity = read_json(finished_digits / "report.json")["parity"]

    assert parity["verdict"] == "pass"
    assert parity["reason"] is None
    drops = {row["name"]: row["drop"] for row in parity["methods"]}
    assert drops["magnitude, recalibrated"] < drops["magnitude"] - 10
