from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from maskplan.exporters.lazy_load import load_lazily
from maskplan.exporters.tensors import read_values
from maskplan.pipeline.core.errors import InputError


def test_large_weights_are_read_from_the_file_when_needed(finished_digits: Path) -> None:
    for name in ("sparse.onnx", "dense.fp16.onnx"):
        path = finished_digits / name
        whole, mapped = onnx.load(path), load_lazily(path)
        assert mapped.ByteSize() < path.stat().st_size / 4
        for plain, tensor in zip(whole.graph.initializer, mapped.graph.initializer, strict=True):
            assert (plain.name, list(plain.dims), plain.data_type) == (tensor.name, list(tensor.dims), tensor.data_type)
            read = read_values(tensor, path.parent)
            expected = numpy_helper.to_array(plain).astype(np.float64)
            assert np.array_equal(read.to_floats(read.array), expected)
        del whole.graph.initializer[:], mapped.graph.initializer[:]
        assert whole == mapped


def test_tensors_that_are_external_already_keep_their_place(tmp_path: Path) -> None:
    """Inline bytes beside a reference are ignored by runtimes, so they must not be what is looked at."""
    tensor = numpy_helper.from_array(np.zeros((64, 64), np.float32), "w")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "elsewhere.bin"
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xy"]
    model = helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], [tensor]))
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    (found,) = load_lazily(path).graph.initializer
    assert [(e.key, e.value) for e in found.external_data] == [("location", "elsewhere.bin")]


@pytest.mark.parametrize("data", [b"", b"\x3a\xff\xff\xff\xff\x0f", b"\xff" * 20, b"\x3a\x7f" + bytes(3)])
def test_a_file_that_is_not_protobuf_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(InputError, match="not an ONNX file"):
        load_lazily(path)
