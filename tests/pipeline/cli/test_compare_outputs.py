"""`maskplan compare` on a network of images of any size: --shape, --outputs and --metric, against NumPy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from any_network import save_net, weights
from onnx import helper
from PIL import Image

Cli = Callable[..., Any]
METRICS = '''
import numpy as np

def accuracy(outputs, targets):
    """Of pixels, one number for all samples."""
    return np.mean(outputs["y"].argmax(1) == targets["classes"])

def each(outputs, targets):
    return (outputs["y"].argmax(1) == targets["classes"]).mean(axis=(1, 2))
'''


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Networks with classes of pixels, of images of any size; the second is the first with noise on its weights."""
    weight = weights(8, 3, 3, 3)
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "first", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Conv", ["b", "w2"], ["y"], "second"),
    ]
    paths = []
    for name, scale in (("dense", 0.0), ("sparse", 0.5)):
        tensors = {"w1": weight + scale * weights(8, 3, 3, 3, seed=3), "w2": weights(5, 8, 1, 1, seed=1)}
        images, classes = ["N", 3, "H", "W"], ["N", 5, "H", "W"]
        paths.append(save_net(tmp_path / f"{name}.onnx", nodes, tensors, {"x": images}, {"y": classes}))
    return paths


def computed(pair: list[Path], x: np.ndarray) -> list[np.ndarray]:
    sessions = [onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in pair]
    return [session.run(None, {"x": x})[0] for session in sessions]


def arrays(folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """A file with images and the class of each pixel."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((10, 3, 6, 9), np.float32)
    classes = generator.integers(0, 5, (10, 6, 9))
    np.savez(folder / "val.npz", x=x, classes=classes)
    return folder / "val.npz", x, classes


@pytest.mark.parametrize("shape", ["3x10x14", "10x14"])
def test_images_get_the_size_that_was_given(shape: str, pair: list[Path], cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    generator, pixels = np.random.default_rng(0), []
    for i in range(4):
        pixels.append(generator.integers(0, 256, (10, 14, 3), dtype=np.uint8))
        Image.fromarray(pixels[-1]).save(tmp_path / "photos" / f"{i}.png")
    data = ("--data", tmp_path / "photos", "--shape", shape, "--min-sqnr", 0, "--report", tmp_path / "r.json")
    ran = cli("compare", *pair, *data)
    assert ran.code == 0, ran.err
    (output,) = json.loads((tmp_path / "r.json").read_text())["by_output"]
    x = (np.stack(pixels).astype(np.float32) / 255).transpose(0, 3, 1, 2)
    a, b = computed(pair, np.ascontiguousarray(x))
    assert output["samples"] == 4
    assert output["relative_error"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-4)


def test_a_size_is_asked_for_where_none_is_known(pair: list[Path], cli: Cli, tmp_path: Path) -> None:
    ran = cli("compare", *pair, "--min-sqnr", 0)
    assert (ran.code, ran.out) == (3, "")
    assert "--shape 3x224x224" in ran.err
    # On noise of the given size nothing can pass.
    ran = cli("compare", *pair, "--min-sqnr", 0, "--shape", "3x4x6")
    assert (ran.code, "no data: give --data" in ran.err) == (1, True)
    for wrong in ("1x4x6", "4", "3x4x6x1"):
        ran = cli("compare", *pair, "--min-sqnr", 0, "--shape", wrong)
        assert (ran.code, "does not fit the model" in ran.err) == (3, True)
    # Arrays have a size of their own.
    assert cli("compare", *pair, "--min-sqnr", 0, "--data", arrays(tmp_path)[0]).code == 0


@pytest.mark.parametrize(("given", "axis"), [(None, None), ("y:logits", 1), ("y:logits:3", 3), ("y:values", None)])
def test_what_an_output_holds_is_told(
    given: str | None, axis: int | None, pair: list[Path], cli: Cli, tmp_path: Path
) -> None:
    """Of dynamic height and width an output is not known to be an image."""
    data, x, _ = arrays(tmp_path)
    told = () if given is None else ("--outputs", given)
    ran = cli("compare", *pair, "--data", data, "--min-sqnr", 0, *told, "--report", tmp_path / "r.json")
    assert ran.code == 0, ran.err
    (output,) = json.loads((tmp_path / "r.json").read_text())["by_output"]
    if axis is None:
        assert (output["kind"], output["agreement"]) == ("values", None)
        return
    a, b = computed(pair, x)
    same = 100 * (a.argmax(axis) == b.argmax(axis)).mean()
    assert 10 < same < 99
    assert (output["kind"], output["agreement"]) == ("logits", pytest.approx(same, abs=1e-6))
    assert cli("compare", *pair, "--data", data, *told, "--min-agreement", same - 1).code == 0
    ran = cli("compare", *pair, "--data", data, *told, "--min-agreement", same + 1)
    assert (ran.code, f"y: agreement in % is {same:.4g}" in ran.err) == (1, True)


def test_every_wrong_output_is_named(pair: list[Path], cli: Cli) -> None:
    told = ("--outputs", "z:logits", "--outputs", "y:boxes", "--outputs", "y:logits:0", "--outputs", "y")
    ran = cli("compare", *pair, "--shape", "3x4x6", *told)
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.startswith("error: invalid --outputs")
    for problem in ("no output is called 'z'", "'y:boxes' is not", "'y:logits:0' is not", "'y' is not"):
        assert problem in ran.err
    assert "the outputs are y" in ran.err


@pytest.mark.parametrize("function", ["accuracy", "each"])
def test_the_drop_of_a_metric_is_judged(function: str, pair: list[Path], cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(METRICS)
    data, x, classes = arrays(tmp_path)
    dense, sparse = ((y.argmax(1) == classes).mean() for y in computed(pair, x))
    better, worse = (pair, pair[::-1]) if dense > sparse else (pair[::-1], pair)
    drop = abs(dense - sparse)
    assert drop > 0.005
    metric = ("--data", data, "--metric", f"{tmp_path / 'm.py'}:{function}", "--report", tmp_path / "r.json")
    assert cli("compare", *better, *metric, "--max-metric-drop", drop + 0.001).code == 0
    found = json.loads((tmp_path / "r.json").read_text())["metric"]
    assert (found["name"], found["samples"]) == (function, 10)
    assert found["drop"] == pytest.approx(drop, abs=1e-9)
    assert sorted([found["dense"], found["sparse"]]) == pytest.approx(sorted([dense, sparse]), abs=1e-9)
    low, high = found["drop_ci95"]
    assert low < drop < high
    ran = cli("compare", *better, *metric, "--max-metric-drop", drop - 0.001)
    assert (ran.code, f"{function} drops by {drop:.4g}" in ran.err) == (1, True)
    if function == "accuracy":
        return
    ran = cli("compare", *better, *metric, "--max-metric-drop", drop + 0.001, "--use-ci")
    assert (ran.code, f"at worst {high:.4g} (95%)" in ran.err) == (1, True)
    # The other way round it is a gain.
    assert cli("compare", *worse, *metric, "--max-metric-drop", 0).code == 0


def test_a_metric_without_a_limit_and_a_limit_without_a_metric_decide_nothing(
    pair: list[Path], cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "m.py").write_text(METRICS)
    data = ("--data", arrays(tmp_path)[0])
    ran = cli("compare", *pair, *data, "--metric", f"{tmp_path / 'm.py'}:each")
    assert (ran.code, "no limit on the outputs" in ran.err) == (1, True)
    ran = cli("compare", *pair, *data, "--max-metric-drop", 1, "--report", tmp_path / "r.json")
    assert (ran.code, "no limit on the outputs" in ran.err) == (1, True)
    (check,) = json.loads((tmp_path / "r.json").read_text())["checks"]
    assert (check["name"], check["passed"]) == ("max_metric_drop", None)
    assert "give --metric FILE.py:FUNCTION" in check["message"]
