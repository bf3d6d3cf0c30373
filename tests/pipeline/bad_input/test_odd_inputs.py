"""Damaged artifacts of a finished run, given to the commands: a message and an exit code from 0 to 3, never an exception."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskplan.engines.sidecar import sidecar_path
from maskplan.pipeline.core.files import sha256_of

RECIPE = """
[learn]
epochs = 1
lr = 0.5
[calibrate]
images = 16
method = "entropy"
exclude = ["fc"]
[compare]
fixed_images = 4
max_top1_drop = 100.0
[time]
seconds = 0.05
batches = [1]
"""
Command = tuple[object, ...]


def commands(kind: str, run: Path, odd: Path) -> list[Command]:
    """The commands that read this kind of file."""
    dense, sparse, out = run / "dense.onnx", run / "sparse.onnx", run / "out"
    engine, data = run / "engine.onnx", run / "data"
    compare = ("compare", "--recipe", run / "recipe.toml", "--data", data)
    bake = ("bake", "digits_resnet", "-o", out / "baked.safetensors")
    return {
        "onnx": [
            ("check", odd),
            ("check", odd, "--strict", "--junit", out / "j.xml", "--report", out / "r.json"),
            ("prune", odd, "-o", out / "pruned.onnx"),
            ("build", odd, "--backend", "onnxruntime", "-o", out / "engine.onnx"),
            (*compare, dense, odd),
            (*compare, odd, sparse, "--bisect"),
            ("calibrate", odd, "--data", data, "--images", 16, "-o", out / "int8.onnx"),
        ],
        "engine": [
            ("inspect", odd),
            ("deploy", odd, "--repository", out / "models", "--allow-untrained"),
            ("time", engine, odd, "--seconds", 0.05, "--batch", 1),
            (*compare, dense, odd, "--github"),
        ],
        "checkpoint": [(*compare, odd, sparse), (*bake, "--weights", odd, "--masks", run / "masks.safetensors")],
        "masks": [(*bake, "--masks", odd), ("check", sparse, "--masks", odd)],
        "recipe": [("compare", dense, sparse, "--data", data, "--recipe", odd)],
        "report": [(*compare, dense, sparse, "--baseline", odd)],
        "data": [
            ("compare", dense, sparse, "--data", odd, "--recipe", run / "recipe.toml"),
            ("calibrate", dense, "--data", odd, "--images", 16, "-o", out / "int8.onnx"),
        ],
    }[kind]


FILES = {
    "onnx": ("dense.onnx", "sparse.onnx", "dense.fp16.onnx"),
    "engine": ("engine.onnx",),
    "checkpoint": ("sparse.safetensors", "dense.safetensors"),
    "masks": ("masks.safetensors",),
    "recipe": ("recipe.toml",),
    "report": ("report.json",),
    "data": ("data",),
}
ODD_VALUES = (
    None, True, -1, 0, 10**25, 1e308, -0.0, "", "\x1b[31m\n::error::x", "\ud800", "../../x", [], {}, [[]], [None], {"a": []},
)  # fmt: skip


def write_digits(folder: Path) -> None:
    """Gray noise in the classes of the digits."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for digit in range(10):
            (folder / split / str(digit)).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / str(digit) / f"{i}.png")


def damaged(data: bytes, random: random.Random) -> bytes:
    """Flipped, cut, repeated or zeroed; mostly near the ends, where formats keep their structure."""
    kind = random.choice(("flip", "flip", "flip", "cut", "zero", "repeat", "nothing"))
    near = min(len(data), 4096)
    at = random.choice((random.randrange(near), len(data) - 1 - random.randrange(near), random.randrange(len(data))))
    changed = bytearray(data)
    if kind == "flip":
        for _ in range(random.choice((1, 1, 3, 20))):
            position = min(max(at + random.randrange(-64, 64), 0), len(data) - 1)
            changed[position] ^= 1 << random.randrange(8)
    elif kind == "zero":
        changed[at : at + random.randrange(1, 64)] = bytes(8)
    elif kind == "repeat":
        changed[at:at] = changed[at : at + random.randrange(1, 512)]
    return bytes(changed[:at] if kind == "cut" else changed if kind != "nothing" else b"")


def with_odd_value(values: Any, random: random.Random) -> Any:
    """JSON values with one of them replaced, removed or renamed, at any depth."""
    if isinstance(values, dict) and values and random.random() < 0.8:
        key = random.choice(sorted(values))
        changed = dict(values)
        if random.random() < 0.1:
            changed[random.choice(("x\x1b", key.upper()))] = changed.pop(key)
        elif random.random() < 0.1:
            del changed[key]
        else:
            changed[key] = with_odd_value(values[key], random)
        return changed
    if isinstance(values, list) and values and random.random() < 0.8:
        at = random.randrange(len(values))
        return [*values[:at], with_odd_value(values[at], random), *values[at + 1 :]]
    return random.choice(ODD_VALUES)


def odd_json(text: bytes, random: random.Random) -> bytes:
    if random.random() < 0.15:
        return random.choice(
            (b"[" * 50_000, b'{"a":' * 50_000, b"9" * 5000, b'{"sha256": ' + b"9" * 5000 + b"}", b"null")
        )
    if random.random() < 0.25:
        return damaged(text, random)
    return json.dumps(with_odd_value(json.loads(text), random)).encode()


def odd_toml(text: bytes, random: random.Random) -> bytes:
    values = (
        "nan",
        "-1",
        "1" + "0" * 30,
        "1" + "0" * 5000,
        '"x\\u001b"',
        "[" * 5000,
        "{}",
        "1979-05-27",
        "1e400",
        "true",
    )
    lines = text.decode().splitlines()
    at = random.choice([i for i, line in enumerate(lines) if " = " in line])
    lines[at] = f"{lines[at].split(' = ')[0]} = {random.choice(values)}"
    return damaged(text, random) if random.random() < 0.3 else "\n".join(lines).encode()


def make_odd(kind: str, run: Path, random: random.Random) -> Path:
    """Damage one file in place; returns what to give to the commands."""
    path = run / random.choice(FILES[kind])
    if kind == "data":
        image = random.choice(sorted(path.rglob("*.png")))
        image.write_bytes(damaged(image.read_bytes(), random))
        if random.random() < 0.3:
            image.parent.rename(
                image.parent.with_name(random.choice(("c0\n::error::x", "\x1b[2J", "n" * 200, "-", " ")))
            )
    elif kind == "report":
        path.write_bytes(odd_json(path.read_bytes(), random))
    elif kind == "recipe":
        path.write_bytes(odd_toml(path.read_bytes(), random))
    elif kind == "engine" and random.random() < 0.6:
        sidecar_path(path).write_bytes(odd_json(sidecar_path(path).read_bytes(), random))
    else:
        path.write_bytes(damaged(path.read_bytes(), random))
        if kind == "engine" and random.random() < 0.7:
            # A sidecar that matches the damaged engine: it is loaded.
            record = json.loads(sidecar_path(path).read_bytes())
            sidecar_path(path).write_text(json.dumps(record | {"sha256": sha256_of(path)}))
    if kind in ("onnx", "engine", "checkpoint", "masks") and random.random() < 0.2:
        named = run / f"{random.choice(('x' * 200, 'a b', chr(0x1B) + '[1m', '::error::'))}{path.suffix}"
        if sidecar_path(path).is_file():
            sidecar_path(path).rename(sidecar_path(named))
        return path.rename(named)
    return path


@pytest.fixture
def run(finished_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a finished run, a recipe and a data folder, to damage."""
    folder = tmp_path / "run"
    folder.mkdir()
    for path in finished_digits.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    (folder / "recipe.toml").write_text(RECIPE)
    write_digits(folder / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    return folder


def test_undamaged_files_get_as_far_as_a_result(run: Path, cli: Callable[..., Any]) -> None:
    """Otherwise the damage below would not be what is refused."""
    for kind, names in FILES.items():
        for command in commands(kind, run, run / names[0]):
            ran = cli(*command)
            assert ran.code in (0, 1), (command, ran.err)


@pytest.mark.parametrize("seed", [*range(30), *(pytest.param(i, marks=pytest.mark.slow) for i in range(30, 200))])
def test_an_odd_input_ends_in_a_message(seed: int, run: Path, cli: Callable[..., Any]) -> None:
    choice = random.Random(seed)
    kind = list(FILES)[seed % len(FILES)]
    odd = make_odd(kind, run, choice)
    for command in commands(kind, run, odd) if seed >= 30 else choice.sample(commands(kind, run, odd), 1):
        ran = cli(*command)
        assert ran.code in (0, 1, 2, 3), (command, ran)
        assert (ran.code == 0) or ran.err, command
        printed = ran.out + ran.err
        assert "Traceback" not in printed
        assert all(c in "\n\t" or c.isprintable() for c in printed), printed
        commands_of_runner = [line for line in printed.splitlines() if line.lstrip().startswith("::")]
        assert not commands_of_runner or "--github" in command, printed
