"""Layer-wise pruning of ONNX files, against the module's path and against ONNX Runtime."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from maskplan.exporters.conformance import CheckOptions, check_2to4
from maskplan.exporters.metadata import describe_onnx, load_onnx
from maskplan.exporters.prune import prune_onnx
from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.ort_session import open_session
from maskplan.pipeline.data.digits import load_digits
from maskplan.pipeline.data.samples import ImageSamples, TensorSamples
from maskplan.pipeline.masking.layerwise import layerwise_mask
from maskplan.pipeline.masking.policy import select_layers
from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
from maskplan.pipeline.models.layers import trace_layers
from maskplan.pipeline.pruning import onnx_moments, prune_layerwise
from maskplan.pipeline.pruning.prune_layerwise import NOT_REACHED, LayerwiseOptions
from maskplan.pipeline.pruning.second_moments import MomentOptions, second_moments

TWO_FOUR = Pattern(2, 4)
RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def small_model(batch: int | str = "n") -> onnx.ModelProto:
    """Two inputs that meet in an Add; a convolution without a bias, one with one, and a product."""
    nodes = [
        helper.make_node("Conv", ["a", "w1"], ["h1"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["b", "w2", "b2"], ["h2"], "second"),
        helper.make_node("Add", ["h1", "h2"], ["s"]),
        helper.make_node("Relu", ["s"], ["r"]),
        helper.make_node("ReduceMean", ["r"], ["m"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["m", "w3"], ["y"], "third"),
    ]
    weights = {"w1": noise(8, 4, 3, 3), "w2": noise(8, 8, 1, 1), "b2": noise(8), "w3": noise(8, 6)}
    given = [
        helper.make_tensor_value_info("a", TensorProto.FLOAT, (batch, 4, 6, 6)),
        helper.make_tensor_value_info("b", TensorProto.FLOAT, (batch, 8, 6, 6)),
    ]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, (batch, 6))]
    graph = helper.make_graph(nodes, "g", given, out, [numpy_helper.from_array(w, n) for n, w in weights.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def correlated(rows: int) -> dict[str, np.ndarray]:
    mixing = np.random.default_rng(1).standard_normal((8, 8)).astype(np.float32)
    both = np.maximum(np.einsum("nchw,cd->ndhw", noise(rows, 8, 6, 6), mixing), 0)
    return {"a": both[:, :4], "b": both}


def pruned(path: Path, out: Path, arrays: dict[str, np.ndarray], **options: Any) -> prune_layerwise.LayerwisePruned:
    samples = TensorSamples("train", arrays, {})
    return prune_layerwise.prune_layerwise(path, out, describe_onnx(path).inputs, samples, LayerwiseOptions(**options))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(small_model(), path)
    return path


def test_masks_equal_those_of_the_module(finished_digits: Path, tmp_path: Path) -> None:
    """Same network, same images: the moments agree to rounding, and the masks entirely."""
    module, provenance = open_checkpoint(ModelOptions("digits_resnet", "auto", None, 0, None, False))
    images = load_digits().train.sample(100, 0)
    path = finished_digits / "dense.onnx"
    model = describe_onnx(path)
    samples = ImageSamples(images, provenance.preprocessing, model.inputs[0])
    options = LayerwiseOptions(images=100)
    done = prune_layerwise.prune_layerwise(path, tmp_path / "p.onnx", model.inputs, samples, options)
    assert done.by_magnitude == ()
    found, before = tensors(tmp_path / "p.onnx"), tensors(path)
    layers = select_layers(trace_layers(module, provenance.preprocessing)[0], TWO_FOUR).masked
    assert len(layers) == 8
    moments = second_moments(module, layers, provenance.preprocessing, images, MomentOptions(images=100))
    for layer, moment in moments:
        # BatchNorm follows each of them, which is folded in the file: a factor for each row, which no mask depends on.
        assert moment.before_norm
        expected = layerwise_mask(module.state_dict()[layer.name].numpy(), moment.effective, TWO_FOUR)
        assert np.array_equal(found[layer.name] != 0, expected), layer.name
        assert np.array_equal(found[layer.name], np.where(expected, before[layer.name], 0))


def test_moments_equal_those_of_the_module(finished_digits: Path) -> None:
    from maskplan.exporters.layer_inputs import observed_layers
    from maskplan.exporters.prune import select_weights

    module, provenance = open_checkpoint(ModelOptions("digits_resnet", "auto", None, 0, None, False))
    images, options = load_digits().train.sample(40, 0), MomentOptions(images=40, batch=16, positions=20)
    path = finished_digits / "dense.onnx"
    model, inputs = load_onnx(path), describe_onnx(path).inputs
    selected = select_weights(model, path, TWO_FOUR)
    layers, _ = observed_layers(model, selected.uses.keys(), 4)
    samples = ImageSamples(images, provenance.preprocessing, inputs[0])
    found = {
        m.layer.name: m.moments
        for m in onnx_moments.onnx_moments(model, path.parent, layers, inputs, samples, options, where=path)
    }
    known, _ = trace_layers(module, provenance.preprocessing)
    wanted = [layer for layer in known if layer.name in found]
    assert len(wanted) == 9
    for layer, expected in second_moments(module, wanted, provenance.preprocessing, images, options):
        moment = found[layer.name]
        assert moment is not None
        scale = float(np.abs(expected.about_mean).max())
        assert moment.rows == expected.rows
        assert np.abs(moment.about_mean - expected.about_mean).max() < 1e-4 * scale
        assert np.abs(moment.mean - expected.mean).max() < 1e-4 * scale**0.5


def test_an_update_lowers_the_error_of_the_outputs(small: Path, tmp_path: Path) -> None:
    calibration, evaluation = correlated(64), correlated(64)
    expected = open_session(small).run(None, evaluation)[0]

    def error(path: Path) -> float:
        return float(((open_session(path).run(None, evaluation)[0] - expected) ** 2).sum())

    errors = {}
    prune_onnx(small, tmp_path / "m.onnx", TWO_FOUR)
    errors["magnitude"] = error(tmp_path / "m.onnx")
    for update in (False, True):
        out = tmp_path / f"{update}.onnx"
        done = pruned(small, out, calibration, update=update)
        assert check_2to4(out, CheckOptions(strict=True)).passed
        assert [layer.name for layer in done.layers] == ["w1", "w2", "w3"]
        assert done.samples == 64
        errors["update" if update else "mask"] = error(out)
        if update:
            assert all(layer.updated_error is not None and layer.updated_error < layer.error for layer in done.layers)
    assert errors["update"] < errors["mask"] < errors["magnitude"]
    assert errors["update"] < errors["magnitude"] / 2


def test_without_an_update_only_existing_biases_change(small: Path, tmp_path: Path) -> None:
    done = pruned(small, tmp_path / "p.onnx", correlated(32))
    before, after = tensors(small), tensors(tmp_path / "p.onnx")
    assert before.keys() == after.keys()
    for name in ("w1", "w2", "w3"):
        assert np.array_equal(after[name][after[name] != 0], before[name][after[name] != 0])
    assert [layer.shifted for layer in done.layers] == [False, True, False]
    assert not np.array_equal(after["b2"], before["b2"])


def test_a_fixed_batch_and_whole_runs_give_the_same_masks(small: Path, tmp_path: Path) -> None:
    arrays = correlated(30)
    pruned(small, tmp_path / "a.onnx", arrays)
    fixed = small_model(batch=4)
    for tensor in fixed.graph.initializer:
        tensor.CopyFrom(next(t for t in onnx.load(small).graph.initializer if t.name == tensor.name))
    onnx.save(fixed, tmp_path / "fixed.onnx")
    pruned(tmp_path / "fixed.onnx", tmp_path / "b.onnx", arrays)
    whole = {name: array[:, None] for name, array in arrays.items()}
    samples = TensorSamples("train", whole, {}, one_run_each=True)
    options = LayerwiseOptions()
    prune_layerwise.prune_layerwise(small, tmp_path / "c.onnx", describe_onnx(small).inputs, samples, options)
    expected = tensors(tmp_path / "a.onnx")
    for name in ("b", "c"):
        found = tensors(tmp_path / f"{name}.onnx")
        assert all(np.array_equal(found[w] != 0, expected[w] != 0) for w in ("w1", "w2", "w3"))


def test_external_data_stays_external(small: Path, tmp_path: Path) -> None:
    arrays = correlated(32)
    pruned(small, tmp_path / "a.onnx", arrays, update=True)
    path = tmp_path / "external.onnx"
    onnx.save(onnx.load(small), path, save_as_external_data=True, location="w.data", size_threshold=0)
    pruned(path, tmp_path / "out" / "b.onnx", arrays, update=True)
    assert next(t for t in load_onnx(tmp_path / "out" / "b.onnx").graph.initializer if t.name == "w1").external_data
    a, b = tensors(tmp_path / "a.onnx"), tensors(tmp_path / "out" / "b.onnx")
    assert a.keys() == b.keys()
    assert all(b[name] == pytest.approx(a[name], abs=1e-6) for name in a)


def test_half_precision_weights_keep_their_type(small: Path, tmp_path: Path) -> None:
    model = small_model()
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, tmp_path / "half.onnx")
    arrays = {name: array.astype(np.float16) for name, array in correlated(32).items()}
    pruned(tmp_path / "half.onnx", tmp_path / "p.onnx", arrays, update=True)
    found = tensors(tmp_path / "p.onnx")
    assert {array.dtype for array in found.values()} == {np.dtype(np.float16)}
    assert open_session(tmp_path / "p.onnx").run(None, arrays)[0].dtype == np.float16


def test_a_branch_that_never_runs_is_pruned_by_magnitude(tmp_path: Path) -> None:
    def branch(weight: str) -> onnx.GraphProto:
        out = [helper.make_tensor_value_info(f"{weight}_y", TensorProto.FLOAT, None)]
        nodes = [
            helper.make_node("Relu", ["x"], [f"{weight}_x"]),
            helper.make_node("Conv", [f"{weight}_x", weight], [f"{weight}_y"]),
        ]
        return helper.make_graph(nodes, weight, [], out)

    node = helper.make_node("If", ["which"], ["y"], then_branch=branch("yes"), else_branch=branch("no"))
    given = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 8, 3, 3)),
        helper.make_tensor_value_info("which", TensorProto.BOOL, ()),
    ]
    weights = {"yes": noise(8, 8, 1, 1), "no": noise(8, 8, 1, 1)}
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph([node], "g", given, out, [numpy_helper.from_array(w, n) for n, w in weights.items()])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    arrays = {"x": noise(20, 1, 8, 3, 3), "which": np.ones(20, np.bool_)}
    samples = TensorSamples("train", arrays, {}, one_run_each=True)
    done = prune_layerwise.prune_layerwise(
        path, tmp_path / "p.onnx", describe_onnx(path).inputs, samples, LayerwiseOptions(update=True)
    )
    assert [layer.name for layer in done.layers] == ["yes"]
    assert done.by_magnitude == (("no", NOT_REACHED),)
    assert check_2to4(tmp_path / "p.onnx", CheckOptions(strict=True)).passed


def test_moments_in_several_passes_are_the_same(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = correlated(40)
    pruned(small, tmp_path / "a.onnx", arrays)
    monkeypatch.setattr("maskplan.pipeline.pruning.second_moments._MAX_BYTES", 1)
    monkeypatch.setattr(onnx_moments, "_SLICE_BYTES", 1)
    pruned(small, tmp_path / "b.onnx", arrays)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(tensors(tmp_path / "a.onnx").values(), tensors(tmp_path / "b.onnx").values(), strict=True)
    )


def test_nothing_is_written_if_the_samples_do_not_run_or_it_is_interrupted(
    small: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "p.onnx"
    broken = correlated(8)
    broken["a"][0] = np.nan
    with pytest.raises(InputError, match="inputs of w1 contain NaN"):
        pruned(small, out, broken)
    np.savez(tmp_path / "train.npz", **correlated(8))

    def interrupted(*arguments: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return layerwise_mask(*arguments, **named)

    monkeypatch.setattr(prune_layerwise, "layerwise_mask", interrupted)
    ran = cli("prune", small, "--data", tmp_path / "train.npz", "-o", out)
    assert ran.code == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "train.npz"]


def test_the_command_prunes_on_arrays_and_on_images(small: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    np.savez(tmp_path / "train.npz", **correlated(16))
    out = tmp_path / "p.onnx"
    ran = cli("prune", small, "--data", tmp_path / "train.npz", "--method", "layerwise", "--update", "-o", out)
    assert ran.code == 0, ran.err
    assert "3 weights layer-wise on 16 samples" in ran.out
    nodes = [helper.make_node("Conv", ["x", "stem"], ["h"]), helper.make_node("Conv", ["h", "w"], ["y"])]
    weights = {"stem": noise(8, 3, 1, 1), "w": noise(4, 8, 1, 1)}
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, "h", "w"))]
    ends = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", given, ends, [numpy_helper.from_array(w, n) for n, w in weights.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "i.onnx")
    (tmp_path / "images").mkdir()
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    command = ("prune", tmp_path / "i.onnx", "--data", tmp_path / "images", "-o", out)
    ran = cli(*command)
    assert ran.code == 3
    assert "--shape" in ran.err
    assert cli(*command, "--shape", "3x8x8", "--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2").code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "layerwise"], "layer-wise pruning needs data"),
        (["--method", "magnitude", "--data", "train.npz"], "magnitude pruning uses no data"),
        (["--update"], "magnitude pruning uses no data"),
        (["--method", "layerwise", "--data", "wrong.npz"], "does not fit the network's inputs"),
        (["--method", "learned"], "unknown method of pruning"),
        (["--data", "train.npz", "--mean", "half"], "expected one number per channel"),
    ],
)
def test_wrong_options_have_one_clear_message(
    options: list[str],
    message: str,
    small: Path,
    tmp_path: Path,
    cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("train.npz", **correlated(2))
    np.savez("wrong.npz", a=noise(2, 4, 6, 6))
    ran = cli("prune", small, *options, "-o", "p.onnx")
    assert ran.code == 3
    assert message in ran.err
    assert not Path("p.onnx").exists()
