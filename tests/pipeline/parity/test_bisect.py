"""Bisection: find the layer of a residual network that is damaged, and measure every common layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from residual_net import (
    IMAGES,
    LAYERS,
    WEIGHTS,
    Array,
    assert_all_the_same,
    by_node,
    edited,
    pruned,
    residual_net,
    run,
    spoilt,
    weights,
)

from maskplan.calibration.placement import place
from maskplan.calibration.qdq import insert_qdq
from maskplan.engines.build import BuildOptions, build_engine
from maskplan.engines.sidecar import write_sidecar
from maskplan.exporters.metadata import describe_onnx
from maskplan.exporters.precision import to_fp16
from maskplan.pipeline.core.artifacts import EngineFile
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.files import sha256_of
from maskplan.pipeline.parity.bisect import BisectOptions, bisect
from maskplan.pipeline.parity.intermediates import Intermediates


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return residual_net(tmp_path / "dense.onnx", weights())


def test_a_model_does_not_differ_from_itself(dense: Path, tmp_path: Path) -> None:
    for other in (dense, residual_net(tmp_path / "again.onnx", weights())):
        report = run(dense, other, tolerance=0)
        assert_all_the_same(report, most=0)
        assert (report.images, report.tolerance) == (5, 0)
        assert [layer.op for layer in report.layers[:3]] == ["Conv", "Relu", "Conv"]
        assert [layer.cosine_min for layer in report.layers] == pytest.approx([1] * len(LAYERS))
        made = [node.name for node in onnx.load(dense).graph.node]
        assert [layer.node for layer in report.layers] == made


@pytest.mark.parametrize(
    ("name", "seed", "factor"),
    [*itertools.product(WEIGHTS, range(3), [1000.0]), *itertools.product(WEIGHTS, [3], [np.nan, np.inf, -1000.0])],
)
@pytest.mark.parametrize("mask", [False, True])
def test_a_damaged_weight_is_found(mask: bool, name: str, seed: int, factor: float, tmp_path: Path) -> None:
    tensors = weights(seed)
    good = residual_net(tmp_path / "good.onnx", tensors)
    kept = pruned(tensors) if mask else tensors
    assert run(good, residual_net(tmp_path / "kept.onnx", kept)).first is None
    report = run(good, residual_net(tmp_path / "bad.onnx", spoilt(kept, name, seed, factor)))
    assert report.first == name
    if not np.isfinite(factor):
        assert by_node(report)[name].relative is None
        assert by_node(report)[name].cosine_min is None


def test_the_numbers_are_those_of_a_plain_reference(dense: Path, tmp_path: Path) -> None:
    """ONNX's own evaluator, and the formulas written out."""
    sparse = residual_net(tmp_path / "sparse.onnx", pruned(weights()))
    outputs = []
    for path in (dense, sparse):
        model = onnx.load(path)
        names = [node.output[0] for node in model.graph.node]
        del model.graph.output[:]
        model.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names)
        outputs.append(dict(zip(names, ReferenceEvaluator(model).run(None, {"input": IMAGES}), strict=True)))
    report = run(dense, sparse)
    assert len(report.layers) == len(LAYERS)
    for layer in report.layers:
        a, b = (side[layer.tensor].astype(np.float64).reshape(5, -1) for side in outputs)
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert layer.relative == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), abs=1e-5)
        assert layer.cosine_min == pytest.approx(cosines.min(), abs=1e-5)
    assert by_node(report)["one.a"].relative > 0.2


def test_the_tolerance_is_what_the_first_layer_exceeds(dense: Path, tmp_path: Path) -> None:
    sparse = residual_net(tmp_path / "sparse.onnx", pruned(weights()))
    layers = run(dense, sparse).layers
    for tolerance in (0.0, 0.3, 0.45):
        beyond = [layer.node for layer in layers if layer.relative > tolerance]
        assert run(dense, sparse, tolerance=tolerance).first == beyond[0]
    assert run(dense, sparse, tolerance=0).first == "one.a"


def test_one_bad_filter_of_a_wide_layer_is_found(tmp_path: Path) -> None:
    """It is lost in the norm of the whole output, which pruning moves by more."""
    generator = np.random.default_rng(3)
    wide = generator.normal(size=(2048, 16, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["input", "stem.weight"], ["stem.out"], "stem", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["stem.out", "wide.weight"], ["logits"], "wide"),
    ]

    def net(path: Path, weight: Array) -> Path:
        stored = {"stem.weight": weights()["stem"], "wide.weight": weight}
        graph = helper.make_graph(
            nodes,
            "net",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 8, 8])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2048, 8, 8])],
            [numpy_helper.from_array(value, name) for name, value in stored.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        path.write_bytes(model.SerializeToString())
        return path

    whole, masked = net(tmp_path / "dense.onnx", wide), pruned({"wide": wide})["wide"]
    sound = bisect(whole, net(tmp_path / "sound.onnx", masked), IMAGES, BisectOptions())
    assert sound.first is None
    bad = masked.copy()
    bad[1000] *= 30
    found = bisect(whole, net(tmp_path / "bad.onnx", bad), IMAGES, BisectOptions())
    assert found.first == "wide"
    last = by_node(found)["wide"]
    assert last.relative is not None
    assert last.relative < 1
    # By hand: the stem's outputs through the difference of both weights, filter by filter.
    stem = next(iter(Intermediates(whole, (3, 8, 8)).open(["stem.out"])(IMAGES).values())).astype(np.float64)
    apart, dense_out = (np.einsum("kc,nchw->knhw", w[:, :, 0, 0].astype(np.float64), stem) for w in (wide - bad, wide))
    worst = np.linalg.norm(apart.reshape(2048, -1), axis=1).max() / (np.linalg.norm(dense_out) / np.sqrt(2048))
    assert last.channel == pytest.approx(worst, rel=1e-4)


def test_a_small_memory_limit_gives_more_runs_and_the_same_report(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse = residual_net(tmp_path / "sparse.onnx", pruned(weights()))
    opened: list[int] = []
    whole = Intermediates.open

    def watched(self: Intermediates, names: Sequence[str]) -> Any:
        opened.append(len(names))
        return whole(self, names)

    monkeypatch.setattr(Intermediates, "open", watched)
    report = run(dense, sparse)
    assert opened == [len(LAYERS)] * 2
    # One image of 16 channels in float32, both models: 8192 bytes.
    for max_bytes, at_most in ((1, 1), (3 * 8192, 3)):
        opened.clear()
        assert run(dense, sparse, max_bytes=max_bytes) == report
        assert sum(opened) == 2 * len(LAYERS)
        assert max(opened[:14]) == at_most


def test_a_fixed_batch_size_makes_no_difference(dense: Path, tmp_path: Path) -> None:
    sparse = residual_net(tmp_path / "sparse.onnx", pruned(weights()))
    expected = run(dense, sparse)
    for first, second in ((4, "batch"), ("batch", 2), (2, 3), (8, 8)):
        a = residual_net(tmp_path / "a.onnx", weights(), batch=first)
        b = residual_net(tmp_path / "b.onnx", pruned(weights()), batch=second)
        report = run(a, b)
        for layer, other in zip(report.layers, expected.layers, strict=True):
            assert (layer.node, layer.relative) == (other.node, pytest.approx(other.relative, abs=1e-6))
            assert layer.cosine_min == pytest.approx(other.cosine_min, abs=1e-6)


def test_half_precision_differs_by_rounding_only(dense: Path, tmp_path: Path) -> None:
    half = edited(dense, tmp_path / "half.onnx", lambda model: model.CopyFrom(to_fp16(model)))
    assert describe_onnx(half).precision == "fp16"
    report = run(dense, half)
    assert_all_the_same(report, most=0.005)
    assert by_node(report)["two.b"].relative > 0
    assert_all_the_same(run(half, dense), most=0.005)


def quantized(path: Path, out: Path) -> Path:
    model = onnx.load(path)
    placement = place(model)
    out.write_bytes(insert_qdq(model, placement, {a.tensor: 4.0 for a in placement.activations}).SerializeToString())
    return out


def test_int8_differs_by_rounding_and_its_extra_nodes_are_no_layers(dense: Path, tmp_path: Path) -> None:
    report = run(dense, quantized(dense, tmp_path / "int8.onnx"))
    assert_all_the_same(report, most=0.2)
    assert by_node(report)["stem"].relative > 0.001
    bad = residual_net(tmp_path / "bad.onnx", spoilt(weights(), "two.a", 0, 1000.0))
    assert run(dense, quantized(bad, tmp_path / "bad.int8.onnx")).first == "two.a"


def test_nan_that_both_models_have_is_no_difference(tmp_path: Path) -> None:
    both = spoilt(weights(), "one.b", 0, np.nan)
    first = residual_net(tmp_path / "first.onnx", both)
    assert_all_the_same(run(first, residual_net(tmp_path / "second.onnx", both)), most=0)
    worse = residual_net(tmp_path / "worse.onnx", spoilt(both, "one.b", 1, np.nan))
    assert run(first, worse).first == "one.b"
    assert run(worse, first).first == "one.b"


def test_outputs_of_nothing_but_zeros(tmp_path: Path) -> None:
    none = {**weights(), "one.b": 0 * weights()["one.b"]}
    dark, lit = residual_net(tmp_path / "dark.onnx", none), residual_net(tmp_path / "lit.onnx", weights())
    layer = by_node(run(dark, dark, tolerance=0))["one.b"]
    assert (layer.relative, layer.cosine_min) == (0, 1)
    # Against zeros no number is small.
    assert (run(dark, lit).first, by_node(run(dark, lit))["one.b"].relative) == ("one.b", None)
    layer = by_node(run(lit, dark))["one.b"]
    assert (layer.relative, layer.cosine_min) == (pytest.approx(1), 0)


def test_shapes_known_only_at_run_time(dense: Path, tmp_path: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        nodes = model.graph.node
        nodes[-1].input[0] = "kept"
        nodes.insert(len(nodes) - 1, helper.make_node("Compress", ["flatten.out", "all"], ["kept"], "keep", axis=1))
        model.graph.initializer.append(numpy_helper.from_array(np.ones(32, bool), "all"))

    path = edited(dense, tmp_path / "compress.onnx", edit)
    assert_all_the_same(run(path, path, max_bytes=1), [*LAYERS, "keep"], most=0)


def externally(path: Path, out: Path, location: str = "weights.bin") -> Path:
    out.parent.mkdir(exist_ok=True)
    onnx.save_model(onnx.load(path), out, save_as_external_data=True, location=location, size_threshold=0)
    return out


def test_external_data_is_read_from_the_files_own_folder(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = externally(dense, tmp_path / "external" / "net.onnx")
    assert not onnx.load(outside, load_external_data=False).graph.initializer[0].raw_data
    assert_all_the_same(run(dense, outside), most=0)
    monkeypatch.chdir(outside.parent)
    assert_all_the_same(run(dense, Path("net.onnx")), most=0)


def test_external_data_is_not_followed_out_of_the_folder(dense: Path, tmp_path: Path) -> None:
    net = externally(dense, tmp_path / "external" / "net.onnx")
    data = net.with_name("weights.bin")
    data.rename(tmp_path / "weights.bin")
    data.symlink_to(tmp_path / "weights.bin")
    with pytest.raises(InputError, match="outside the model's folder"):
        run(dense, net)
    data.unlink()
    with pytest.raises(InputError, match="missing"):
        run(dense, net)

    def edit(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            tensor.external_data[0].value = "../weights.bin"

    model = onnx.load(net, load_external_data=False)
    edit(model)
    net.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="outside the model's folder"):
        run(dense, net)


def engine_of(onnx_file: Path, out: Path) -> EngineFile:
    return build_engine(describe_onnx(onnx_file), BuildOptions("onnxruntime"), out)


def test_an_engine_is_compared_by_its_onnx_file(dense: Path, tmp_path: Path) -> None:
    bad = residual_net(tmp_path / "bad.onnx", spoilt(weights(), "one.b", 0, 1000.0))
    engine = engine_of(bad, tmp_path / "engine.onnx")
    assert run(dense, engine.path).first == "one.b"
    # A plan's tensors cannot be seen; the file that it was built from is found by its digest, whatever its name.
    plan = tmp_path / "engine.plan"
    plan.write_bytes(b"plan")
    write_sidecar(replace(engine, path=plan, sha256=sha256_of(plan), backend="tensorrt"))
    engine.path.unlink()
    assert run(dense, plan).first == "one.b"
    bad.rename(tmp_path / "zz.onnx")
    assert run(dense, plan).first == "one.b"
    (tmp_path / "zz.onnx").unlink()
    with pytest.raises(InputError, match="does not show its intermediate tensors") as caught:
        run(dense, plan)
    assert caught.value.where == plan
    assert engine.onnx_sha256[:12] in str(caught.value.found)


def test_a_checkpoint_equals_its_export(finished_digits: Path) -> None:
    exported = finished_digits / "dense.onnx"
    report = run(finished_digits / "dense.safetensors", exported, IMAGES[:, :1])
    assert (report.first, report.unmatched) == (None, ())
    assert len(report.layers) == len(onnx.load(exported).graph.node)


@pytest.mark.parametrize("name", ["none.onnx", "none.plan", "none.safetensors", "none.pth"])
def test_what_is_missing_or_of_no_known_kind_is_one_error(name: str, dense: Path, tmp_path: Path) -> None:
    for pair in ((dense, tmp_path / name), (tmp_path / name, dense)):
        with pytest.raises(InputError) as caught:
            run(*pair)
        assert name in str(caught.value)


def test_images_that_a_model_does_not_take_are_one_error(dense: Path) -> None:
    for shape in ((2, 1, 8, 8), (2, 3, 9, 8)):
        with pytest.raises(InputError, match="does not accept the images"):
            run(dense, dense, np.zeros(shape, np.float32))


@pytest.mark.parametrize("options", [{"tolerance": -1}, {"tolerance": np.nan}, {"max_bytes": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        BisectOptions(**options)
