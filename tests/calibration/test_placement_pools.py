"""Placement around poolings, as NVIDIA's compiler needs it to compute each of them once."""

from __future__ import annotations

from placement_graphs import placed, uses

from maskplan.calibration.placement import PlaceOptions

OUTPUTS = PlaceOptions(quantize_outputs=True)


def test_between_two_pools_there_is_a_pair_if_a_layer_reads_the_value_too() -> None:
    body = """
        stem | a = Conv(x, w0)
        pool1 | b = MaxPool<kernel_shape = [2, 2]>(a)
        pool2 | c = MaxPool<kernel_shape = [2, 2]>(b)
        flatten | d = Identity(c)
        conv | e = Conv(d, w1)
        other | f = Conv(b, w2)
    """
    found = placed(body, outputs=("e", "f"))
    assert uses(found) == {
        "x": [("stem", 0)],
        "a": [("pool1", 0)],
        "b": [("pool2", 0), ("other", 0)],
        "d": [("conv", 0)],
    }
    assert found.tied == (("a", "b", "d"),)
    alone = body.replace("other | f = Conv(b, w2)", "other | f = Conv(a, w2)")
    assert "b" not in uses(placed(alone, outputs=("e", "f")))


def test_with_outputs_all_readers_of_a_pooling_that_is_concatenated_get_its_quantized_output() -> None:
    body = """
        stem | a = Conv(x, w0)
        pool | b = AveragePool<kernel_shape = [2, 2]>(a)
        norm | c = BatchNormalization(b, gamma, beta, mean, var)
        relu | d = Relu(c)
        conv | e = Conv(d, w1)
        join | f = Concat<axis = 1>(b, e)
        act | g = Sigmoid(f)
        last | y = Conv(g, wide)
        again | z = Concat<axis = 1>(b, x)
    """
    found = placed(body, OUTPUTS)
    assert uses(found)["b"] == [("norm", 0), ("join", 0), ("again", 0)]
    assert uses(found)["x"] == [("stem", 0), ("again", 1)], "inputs of a concatenation are quantized together"
    assert uses(placed(body, OUTPUTS, ("y", "b")))["b"] == [("join", 0)], "what the graph returns stays as it is"
    assert "b" not in uses(placed(body))


def test_an_average_is_quantized_beside_a_layer_so_that_what_is_before_both_stays_int8() -> None:
    body = """
        stem | a = Conv(x, w0)
        pool | b = MaxPool<kernel_shape = [2, 2]>(a)
        join | c = Concat<axis = 1>(b, b)
        conv | d = Conv(c, wide)
        average | e = AveragePool<kernel_shape = [2, 2]>(c)
        other | y = Conv(e, wide)
    """
    found = placed(body, outputs=("d", "y"))
    assert uses(found) == {
        "x": [("stem", 0)],
        "a": [("pool", 0)],
        "b": [("join", 0), ("join", 1)],
        "c": [("conv", 0), ("average", 0)],
        "e": [("other", 0)],
    }
    alone = placed(body.replace("d = Conv(c, wide)", "d = Sigmoid(c)"), outputs=("d", "y"))
    assert uses(alone) == {"x": [("stem", 0)], "e": [("other", 0)]}, "without a layer beside it, an average ends INT8"
