"""Logits of a graph in memory, whatever batch it takes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from maskplan.calibration.session import logits_of
from maskplan.pipeline.core.errors import InputError

WEIGHT = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


def model_of(batch: str, op: str = "Gemm") -> onnx.ModelProto:
    """A linear layer on images of 1x2x2; a second output that must not be taken for the first."""
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 20]> g (float[{batch}, 1, 2, 2] x) => (float y, float z)'
        f" {{ a = Flatten(x) y = {op}(a, w) z = Neg(y) }}"
    )
    model.graph.initializer.append(numpy_helper.from_array(WEIGHT, "w"))
    return model


@pytest.mark.parametrize("batch", ["n", "1", "4", "7", "200"])
@pytest.mark.parametrize("count", [1, 7, 130])
def test_every_image_gets_its_logits_once_in_order_whatever_the_graphs_batch(batch: str, count: int) -> None:
    images = np.random.default_rng(count).normal(size=(count, 1, 2, 2)).astype(np.float32)
    found = logits_of(model_of(batch), images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, images.reshape(count, 4) @ WEIGHT, rtol=1e-5, atol=1e-6)


def test_a_graph_that_onnx_runtime_does_not_accept_is_an_error_in_one_line() -> None:
    with pytest.raises(InputError, match="ONNX Runtime does not accept") as error:
        logits_of(model_of("n", "Nonsense"), np.zeros((1, 1, 2, 2), np.float32))
    assert "Nonsense" in str(error.value.found)
    assert "\n" not in str(error.value.found)
