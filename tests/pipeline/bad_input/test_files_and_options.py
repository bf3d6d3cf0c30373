"""Files, options and output folders that cannot be used."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest
from PIL import Image


class Ran(Protocol):
    code: int
    out: str
    err: str


Refused = Callable[..., str]


# --- ONNX files and engines


@pytest.mark.parametrize(
    "command",
    [("check", "x.onnx"), ("build", "x.onnx", "-o", "e.onnx"), ("prune", "x.onnx", "-o", "s.onnx")],
    ids=lambda c: c[0],
)
@pytest.mark.parametrize("content", ["missing", "empty", "text", "image", "truncated"])
def test_a_file_that_is_not_onnx_is_refused(
    refused: Refused, finished_digits: Path, tmp_path: Path, command: tuple[str, ...], content: str
) -> None:
    write_bad_onnx(tmp_path / "x.onnx", content, finished_digits)

    assert "x.onnx" in refused(*command)


@pytest.mark.parametrize("content", ["missing", "empty", "text", "image", "truncated"])
@pytest.mark.parametrize("side", [0, 1], ids=["as dense", "as sparse"])
def test_compare_refuses_a_file_that_is_not_onnx(
    refused: Refused, finished_digits: Path, tmp_path: Path, content: str, side: int
) -> None:
    write_bad_onnx(tmp_path / "x.onnx", content, finished_digits)
    sides = [finished_digits / "dense.onnx"]
    sides.insert(side, Path("x.onnx"))

    assert "x.onnx" in refused("compare", *sides)


def write_bad_onnx(path: Path, content: str, finished: Path) -> None:
    whole = (finished / "sparse.onnx").read_bytes()
    if content == "image":
        Image.new("RGB", (4, 4)).save(path, "PNG")
    elif content != "missing":
        path.write_bytes({"empty": b"", "text": b"not ONNX\n" * 9, "truncated": whole[: len(whole) // 2]}[content])


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("inspect", "e.onnx"), "engine not found"),
        (("deploy", "e.onnx", "--repository", "models"), "engine not found"),
        (("time", "e.onnx", "e.onnx"), "engine not found"),
    ],
    ids=lambda c: c[0] if isinstance(c, tuple) else None,
)
def test_a_missing_engine_is_refused(refused: Refused, command: tuple[str, ...], says: str) -> None:
    assert says in refused(*command)


@pytest.mark.parametrize("command", [("inspect",), ("deploy", "--repository", "models"), ("time", "engine.onnx")])
def test_an_engine_that_does_not_match_its_sidecar_is_refused(
    refused: Refused, digits: Path, command: tuple[str, ...]
) -> None:
    shutil.copy(digits / "dense_engine.onnx", digits / "engine.onnx")

    message = refused(command[0], digits / "engine.onnx", *[digits / a if "." in a else a for a in command[1:]])

    assert "does not match its sidecar" in message


def test_an_engine_without_its_sidecar_is_refused(refused: Refused, digits: Path) -> None:
    (digits / "engine.onnx.json").unlink()

    assert "no engine.onnx.json" in refused("inspect", digits / "engine.onnx")


def test_compare_refuses_a_text_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")

    assert "cannot compare this kind of file" in refused("compare", "notes.txt", "notes.txt")


# --- options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--backend", "openvino"), ("unknown backend 'openvino'", "onnxruntime")),
        (("--precision", "int3"), ("unknown precision 'int3'", "fp16")),
        (("--weights", "best"), ("best",)),
    ],
)
def test_an_unknown_choice_gets_the_known_ones(
    refused: Refused, tiny_spec: str, out: Path, options: tuple[str, str], says: tuple[str, ...]
) -> None:
    message = refused("engine", tiny_spec, *options, "--out", out)

    for text in says:
        assert text in message


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("build", "sparse.onnx", "--backend", "openvino", "-o", "e.onnx"), "unknown backend"),
        (("build", "sparse.onnx", "--profile", "8:1:4", "-o", "e.onnx"), "invalid profile"),
        (("check", "sparse.onnx", "--pattern", "4"), "not an N:M pattern"),
        (("check", "sparse.onnx", "--masks", "nowhere.safetensors"), "mask file not found"),
        (("time", "engine.onnx", "engine.onnx", "--batch", "1,two"), "not a list of batch sizes"),
        (("compare", "sparse.onnx", "sparse.safetensors", "--max-top1-drop", "nan"), "nan"),
    ],
)
def test_an_invalid_option_is_refused(
    refused: Refused, digits: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(digits)

    assert says in refused(*command)


def test_a_seed_below_zero_is_refused(refused: Refused, tiny_spec: str, toy_data: Path, quick: Path, out: Path) -> None:
    message = refused(
        "engine", tiny_spec, "--weights", "random", "--data", toy_data, "--recipe", quick, "--out", out, "--seed", "-1"
    )

    assert "seed" in message


def test_all_problems_of_a_recipe_are_reported_at_once(
    refused: Refused, tiny_spec: str, tmp_path: Path, out: Path
) -> None:
    (tmp_path / "r.toml").write_text(
        "[lern]\nepochs = 3\n[learn]\nepochs = 'many'\nepoch = 2\n[time]\nbatches = 8\n[export]\nopset = 18\n"
    )

    message = refused("engine", tiny_spec, "--recipe", "r.toml", "--out", out)

    assert "5 problems in the recipe" in message
    for text in ("[lern]", "did you mean 'learn'", "'epoch'", "did you mean 'epochs'", "batches", "'opset'", "'many'"):
        assert text in message


@pytest.mark.parametrize("content", [None, "[learn\nepochs = 3", "\xff\xfe", "learn = 3\n"])
def test_a_recipe_that_cannot_be_read_is_refused(
    refused: Refused, tiny_spec: str, tmp_path: Path, out: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "r.toml").write_bytes(content.encode("latin-1"))

    assert "r.toml" in refused("engine", tiny_spec, "--recipe", "r.toml", "--out", out)


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ("learn", "batch = 0"),
        ("learn", "epochs = -1"),
        ("learn", "lr = nan"),
        ("learn", "seed = -1"),
        ("learn", "tau_end = 0.0"),
        ("recalibrate", "batch = 0"),
        ("recalibrate", "images = -1"),
        ("compare", "fixed_images = 0"),
        ("compare", "max_top1_drop = nan"),
        ("time", "batches = [0]"),
        ("time", "seconds = nan"),
        ("mask", "pattern = '5:4'"),
        ("mask", "layout = 'diagonal'"),
        ("mask", "method = 'oracle'"),
    ],
)
def test_a_recipe_with_invalid_values_is_refused(
    refused: Refused, tiny_spec: str, toy_data: Path, tmp_path: Path, quick: Path, out: Path, table: str, line: str
) -> None:
    key = line.partition(" =")[0]
    kept = "\n".join(text for text in quick.read_text().splitlines() if not text.startswith(f"{key} ="))
    text = kept.replace(f"[{table}]", f"[{table}]\n{line}") if f"[{table}]" in kept else f"{kept}\n[{table}]\n{line}"
    (tmp_path / "r.toml").write_text(text)

    message = refused(
        "engine", tiny_spec, "--weights", "random", "--data", toy_data, "--recipe", "r.toml", "--out", out
    )

    assert key in message or "pattern" in message


def test_a_recipe_with_the_flat_layout_is_refused_before_anything_is_written(
    refused: Refused, tiny_spec: str, tmp_path: Path, quick: Path, out: Path
) -> None:
    (tmp_path / "r.toml").write_text(f"{quick.read_text()}\n[mask]\nlayout = 'flat'\n")

    message = refused("engine", tiny_spec, "--masks", "magnitude", "--recipe", "r.toml", "--out", out)

    assert "flat" in message


# --- the output


def test_an_output_folder_below_a_file_is_refused(refused: Refused, tiny_spec: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, not a folder")

    message = refused("engine", tiny_spec, "--weights", "random", "--out", "file/out")

    assert "cannot write" in message
    assert str(tmp_path / "file" / "out") in message
    assert "--out" in message


@pytest.mark.parametrize("out", ["file", "/proc/maskplan", "/dev/null/x"])
def test_an_output_folder_that_cannot_be_written_is_refused(
    refused: Refused, tiny_spec: str, tmp_path: Path, out: str
) -> None:
    (tmp_path / "file").write_text("a file, not a folder")

    assert "cannot write" in refused("engine", tiny_spec, "--weights", "random", "--out", out)


@pytest.mark.parametrize("command", [("mask", "-o"), ("export", "-o"), ("mask", "--report")], ids=lambda c: " ".join(c))
def test_an_output_file_that_cannot_be_written_is_refused(
    refused: Refused, tiny_spec: str, tmp_path: Path, command: tuple[str, str]
) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    target = ("-o", "/dev/null") if command[1] == "--report" else ()

    message = refused(command[0], tiny_spec, "--weights", "random", *target, command[1], "file/out")

    assert "cannot write" in message


def test_bad_input_does_not_change_a_finished_folder(refused: Refused, digits: Path) -> None:
    message = refused("engine", "digits_resnet", "--out", digits, "--weights", "nowhere.pth")

    assert "nowhere.pth" in message


def test_bad_input_leaves_an_empty_folder_empty(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()

    refused("engine", "resnet5O", "--out", "mine")

    assert (tmp_path / "mine").is_dir()
