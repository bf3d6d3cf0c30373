"""FP16 copies of any FP32 file: compared with it on random or given samples, refused where they differ too much."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from any_network import baked_batch, save_net, weights
from fp16_constant_graphs import f32
from fp16_graphs import FLOAT, model_of, node, noise, run
from fp16_hostile_graphs import GRAPHS
from onnx import TensorProto, helper, numpy_helper
from small_net import small_net

from maskplan.exporters.convert_precision import ConvertOptions, convert_precision
from maskplan.exporters.metadata import describe_onnx, read_provenance
from maskplan.pipeline.core.artifacts import Preprocessing, Provenance
from maskplan.pipeline.core.errors import InputError

FEW = ConvertOptions(images=4)


def save(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def sensitive() -> onnx.ModelProto:
    """Differences of numbers close to 1000, times 1000: FP16 rounds them to multiples of 500."""
    nodes = [node("Add", ["x", "k"], "a"), node("Sub", ["a", "k"], "s"), node("Mul", ["s", "k"])]
    return model_of(nodes, {"k": f32(1000)})


@pytest.mark.parametrize("name", [name for name in GRAPHS if name != "operator_of_another_domain"])
def test_every_graph_that_is_hard_for_fp16_is_converted(name: str, tmp_path: Path) -> None:
    path, out = save(GRAPHS[name](), tmp_path / "m.onnx"), tmp_path / "half.onnx"
    options = ConvertOptions(images=4, shapes={"x": (2, 8, 4, 4)} if name != "nms" else {})
    report = convert_precision(path, out, options)
    assert report.passed
    assert report.problems == []
    assert out.is_file()


def test_the_classifier_becomes_fp16_and_keeps_its_metadata(tmp_path: Path) -> None:
    preprocessing = Preprocessing(3, 8, 8, 0, "bilinear", (0.5,) * 3, (0.25,) * 3)
    provenance = Provenance("net", True, "test", "0" * 64, 5, (), preprocessing)
    out = tmp_path / "half.onnx"
    report = convert_precision(small_net(tmp_path / "m.onnx", provenance=provenance), out, ConvertOptions(images=6))
    assert (report.samples, report.inputs) == (9, "random")
    assert describe_onnx(out).precision == "fp16"
    assert read_provenance(onnx.load(out), out) == provenance
    (logits,) = report.outputs
    assert 0 < logits.difference < 1e-2
    assert report.in_fp32 == {}


def test_a_file_whose_outputs_differ_too_much_is_not_written(tmp_path: Path) -> None:
    path, out = save(sensitive(), tmp_path / "m.onnx"), tmp_path / "half.onnx"
    report = convert_precision(path, out, FEW)
    assert not report.passed
    assert not out.exists()
    assert "5%" not in report.problems[0]
    assert report.problems[0].startswith("y: differs by")
    assert "0.05 is allowed" in report.problems[0]
    # What differs can be kept.
    kept = convert_precision(path, out, ConvertOptions(images=4, keep_fp32=("a",)))
    assert kept.passed
    assert set(kept.in_fp32) == {"a", "s"}


def test_a_wider_tolerance_lets_it_pass(tmp_path: Path) -> None:
    path = save(sensitive(), tmp_path / "m.onnx")
    assert convert_precision(path, tmp_path / "half.onnx", ConvertOptions(images=4, tolerance=1.0)).passed


def test_a_nan_is_a_problem_whatever_the_tolerance(tmp_path: Path) -> None:
    """The square of small activations vanishes on one image only, which no constant shows."""
    nodes = [
        node("Mul", ["x", "small"], "s"),
        node("Add", ["s", "shift"], "t"),
        node("Mul", ["t", "t"], "q"),
        node("Div", ["q", "q"]),
    ]
    path = save(model_of(nodes, {"small": f32(0.1), "shift": f32(1e-4)}), tmp_path / "m.onnx")
    report = convert_precision(path, tmp_path / "half.onnx", ConvertOptions(images=4, tolerance=1e9))
    assert report.problems == ["y: NaN on black, where FP32 has numbers"]


def test_activations_that_overflow_on_the_samples_stay_fp32(tmp_path: Path) -> None:
    nodes = [node("Mul", ["x", "k"], "a"), node("Mul", ["a", "k"], "b"), node("Tanh", ["b"])]
    path, out = save(model_of(nodes, {"k": f32(500)}), tmp_path / "m.onnx"), tmp_path / "half.onnx"
    report = convert_precision(path, out, FEW)
    assert report.passed
    assert set(report.in_fp32) == {"b", "y"}


def test_given_images_are_compared_besides_the_constant_ones(tmp_path: Path) -> None:
    """NaN on one of the images only: the sixth is all twos, whose difference from two is zero."""
    nodes = [node("Sub", ["x", "two"], "d"), node("Mul", ["d", "small"], "s"), node("Div", ["s", "s"])]
    model = model_of(nodes, {"two": f32(2.0001), "small": f32(0.5)})
    path, out = save(model, tmp_path / "m.onnx"), tmp_path / "half.onnx"
    images = noise(7, 8, 4, 4)
    assert convert_precision(path, out, FEW, [images[:4], images[4:]]).passed
    out.unlink()
    images[5] = 2
    report = convert_precision(path, out, FEW, [images[:4], images[4:]])
    assert report.problems == ["y: NaN on image 4, where FP32 has numbers"]
    assert (report.samples, report.inputs) == (10, "images")
    assert not out.exists()


def test_images_of_a_fixed_batch_are_filled_up(tmp_path: Path) -> None:
    path = small_net(tmp_path / "m.onnx", batch=4)
    report = convert_precision(path, tmp_path / "half.onnx", FEW, [np.ones((6, 3, 8, 8), np.float32)])
    assert report.passed
    assert report.samples == 3 * 4 + 8


def test_integer_outputs_must_mostly_agree(tmp_path: Path) -> None:
    graph = model_of([node("Add", ["x", "k"], "a"), node("Sub", ["a", "k"], "s"), node("ArgMax", ["s"], axis=1)])
    del graph.graph.output[:]
    graph.graph.output.append(helper.make_tensor_value_info("y", TensorProto.INT64, None))
    graph.graph.initializer.append(numpy_helper.from_array(f32(30000), "k"))
    path = save(graph, tmp_path / "m.onnx")
    report = convert_precision(path, tmp_path / "half.onnx", FEW)
    assert not report.passed
    assert "is equal; 90.0% is required" in report.problems[0]
    assert convert_precision(path, tmp_path / "half.onnx", ConvertOptions(images=4, min_agreement=0.1)).passed


def test_external_data_is_read_and_the_copy_has_none(tmp_path: Path) -> None:
    small_net(tmp_path / "whole.onnx")
    model = onnx.load(tmp_path / "whole.onnx")
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    assert convert_precision(tmp_path / "m.onnx", tmp_path / "half.onnx", FEW).passed
    (tmp_path / "weights").unlink()
    half = onnx.load(tmp_path / "half.onnx")
    assert not any(tensor.external_data for tensor in half.graph.initializer)
    options = onnxruntime.SessionOptions()
    session = onnxruntime.InferenceSession(half.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert session.run(None, {"input": np.ones((2, 3, 8, 8), np.float32)})[0].shape == (2, 5)


def test_weights_beyond_the_format_are_refused(tmp_path: Path) -> None:
    small_net(tmp_path / "whole.onnx")
    onnx.save(
        onnx.load(tmp_path / "whole.onnx"),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="w",
        size_threshold=0,
    )
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    tensor = model.graph.initializer[0]
    tensor.dims[:] = [600_000_000]
    del tensor.external_data[:]
    for key, value in (("location", "w"), ("offset", "0"), ("length", "2400000000")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    save(model, tmp_path / "m.onnx")
    with (tmp_path / "w").open("r+b") as file:
        # A file with a hole takes no space on the disk.
        file.truncate(2_400_000_000)
    with pytest.raises(InputError, match="do not fit into one ONNX file") as caught:
        convert_precision(tmp_path / "m.onnx", tmp_path / "half.onnx", FEW)
    assert "2.4 GB" in str(caught.value)


def test_files_and_shapes_that_cannot_be_converted_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "half.onnx"
    with pytest.raises(InputError, match="not FP32"):
        convert_precision(small_net(tmp_path / "half_net.onnx", "float16"), out, FEW)
    free = small_net(tmp_path / "free.onnx", size="size")
    with pytest.raises(InputError, match="shape is unknown") as caught:
        convert_precision(free, out, FEW)
    assert "?x3" not in str(caught.value)
    assert "1x3x?x?" in str(caught.value)
    with pytest.raises(InputError, match="unknown input"):
        convert_precision(free, out, ConvertOptions(shapes={"image": (1, 3, 8, 8)}))
    assert convert_precision(free, out, ConvertOptions(images=2, shapes={"input": (1, 3, 8, 8)})).passed
    with pytest.raises(InputError, match="match no node"):
        convert_precision(free, out, ConvertOptions(images=2, keep_fp32=("b0",), shapes={"input": (1, 3, 8, 8)}))


def test_several_inputs_of_other_types_are_sampled(tmp_path: Path) -> None:
    nodes = [
        node("Gather", ["table", "ids"], "e"),
        node("Where", ["flags", "e", "zero"], "m"),
        node("Add", ["m", "x"]),
    ]
    model = model_of(nodes, {"table": noise(3, 4), "zero": f32(0)}, shape=("n", 4))
    model.graph.input.append(helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"]))
    model.graph.input.append(helper.make_tensor_value_info("flags", TensorProto.BOOL, ["n", 1]))
    assert convert_precision(save(model, tmp_path / "m.onnx"), tmp_path / "half.onnx", FEW).passed


def test_the_same_file_is_written_every_time(tmp_path: Path) -> None:
    path = save(GRAPHS["normalized_by_max"](), tmp_path / "m.onnx")
    for name in ("a", "b"):
        assert convert_precision(path, tmp_path / name, FEW).passed
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    (found,) = run(onnx.load(tmp_path / "a"), np.zeros((1, 8, 4, 4), np.float32))
    assert found.dtype == np.float32
    assert onnx.load(tmp_path / "a").graph.output[0].type.tensor_type.elem_type == FLOAT


def test_scalar_inputs_and_batches_in_the_graph_are_run(tmp_path: Path) -> None:
    nodes = [node("Conv", ["x", "w"], "a"), node("Mul", ["a", "gain"], "y")]
    shapes = {"x": ["N", 3, 4, 4], "gain": []}
    scalar = save_net(tmp_path / "scalar.onnx", nodes, {"w": weights(8, 3, 1, 1)}, shapes, {"y": ["N", 8, 4, 4]})
    for path in (scalar, baked_batch(tmp_path / "baked.onnx")):
        assert convert_precision(path, tmp_path / "half.onnx", FEW).passed
    assert describe_onnx(tmp_path / "half.onnx").inputs[0].shape == (1, 3, 8, 8)
