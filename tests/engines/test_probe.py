"""The probe without a GPU: the order of columns, real 2:4 packing as a stand-in for cuSPARSELt, and faults."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from fake_cusparselt import HOST, Packed, compress, multiply, time_on_cpu
from torch.nn import functional

from maskplan.engines import cusparselt as cusparselt_module
from maskplan.engines.cusparselt import SparseHost, find_cusparselt_host
from maskplan.engines.probe import (
    MULTIPLES,
    ProbeOptions,
    ProbeReport,
    columns_of,
    probe,
    weight_matrix,
)
from maskplan.exporters.layer_shapes import LayerShape
from maskplan.pipeline.core.errors import HostError, InputError
from maskplan.pipeline.core.serialization import decode, encode

SHAPES = {
    "square": LayerShape(32, 16, 3, 3, 9, 9, pads=(1, 1, 1, 1)),
    "strided": LayerShape(48, 8, 3, 1, 11, 7, strides=(2, 1), pads=(0, 0, 1, 2)),
    "dilated": LayerShape(17, 12, 2, 3, 10, 12, dilations=(2, 3)),
    "pointwise": LayerShape(16, 20, 1, 1, 4, 4),
    "linear": LayerShape(10, 64, 1, 1, 1, 1),
}
QUICK = ProbeOptions((1, 3), warm_up=1, repeats=2)


def pruned(shape: LayerShape, seed: int = 0) -> npt.NDArray[np.float32]:
    """Two zeros at random places of each four along C."""
    generator = np.random.default_rng(seed)
    weight = generator.normal(size=(shape.k, shape.c, shape.r, shape.s)).astype(np.float32)
    grouped = weight.reshape(shape.k, shape.c // 4, 4, shape.r, shape.s)
    ranks = generator.random(grouped.shape).argsort(axis=2).argsort(axis=2)
    grouped[ranks < 2] = 0
    return weight


@pytest.mark.parametrize("name", SHAPES)
def test_conforming_weights_are_2_4_in_groups_of_four_neighbors(name: str) -> None:
    matrix = weight_matrix(pruned(SHAPES[name]))
    assert np.count_nonzero(matrix.reshape(-1, 4), axis=1).max() == 2
    assert (matrix == Packed.of(torch.from_numpy(matrix)).unpacked().numpy()).all()


def test_columns_ordered_c_r_s_would_not_be() -> None:
    weight = pruned(SHAPES["square"])
    assert np.count_nonzero(weight.reshape(-1, 4), axis=1).max() > 2


@pytest.mark.parametrize("name", SHAPES)
def test_the_product_with_the_columns_is_the_convolution(name: str) -> None:
    shape = SHAPES[name]
    weight = torch.from_numpy(pruned(shape)).double()
    images = torch.randn(2, shape.c, shape.height, shape.width, generator=torch.Generator().manual_seed(0)).double()
    top, left, bottom, right = shape.pads
    padded = functional.pad(images, (left, right, top, bottom))
    wanted = functional.conv2d(padded, weight, None, shape.strides, 0, shape.dilations)
    assert tuple(wanted.shape[2:]) == shape.output
    matrix = torch.from_numpy(weight_matrix(weight.numpy()))
    found = (columns_of(images, shape) @ matrix.t()).reshape(2, *shape.output, shape.k).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", MULTIPLES)
def test_2_4_weights_pass_in_every_dtype(dtype: str) -> None:
    weights = {name: pruned(shape) for name, shape in SHAPES.items()}
    weights["linear"] = weights["linear"][:, :, 0, 0]
    report = probe(weights, SHAPES, replace(QUICK, dtype=dtype), HOST)
    assert (report.verdict, report.reason) == ("pass", None)
    for layer in report.layers:
        assert layer.verdict == "pass", layer
        assert layer.error is not None
        assert layer.tolerance is not None
        assert layer.error <= layer.tolerance
        rows, columns, _ = MULTIPLES[dtype]
        assert (layer.gemm[0] % rows, layer.gemm[1] % columns) == (0, 0)
        assert [b.batch for b in layer.batches] == [1, 3]
        for b in layer.batches:
            assert b.sparse_gemm_ms is not None
            assert b.dense_gemm_ms is not None
            assert (b.conv_ms is None) == (dtype == "int8")
            assert (b.reason is None) == (dtype != "int8")
    assert decode(ProbeReport, json.loads(json.dumps(encode(report)))) == report


def test_multiples_are_those_of_pytorch() -> None:
    limits = torch.sparse.SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("int8", torch.int8)):
        found = limits[dtype]
        assert MULTIPLES[name] == (found.sparse_min_rows, found.sparse_min_cols, found.dense_min_cols)
        assert MULTIPLES[name][1] % found.dense_min_rows == 0


def test_a_violating_weight_is_named_and_never_compressed() -> None:
    shape = SHAPES["square"]
    spoiled = pruned(shape)
    spoiled[5, 8:12, 2, 1] = 1
    seen: list[torch.Tensor] = []

    def counted(matrix: torch.Tensor) -> Packed:
        seen.append(matrix)
        return compress(matrix)

    report = probe({"a": spoiled, "b": pruned(shape)}, {"a": shape, "b": shape}, QUICK, replace(HOST, compress=counted))
    assert len(seen) == 1
    first, second = report.layers
    assert (first.name, first.verdict, first.batches) == ("a", "fail", ())
    assert first.reason is not None
    assert "first at [5, 8:12, 2, 1]" in first.reason
    assert "1 of 1152 groups" in first.reason
    assert second.verdict == "pass"
    assert (report.verdict, report.reason) == ("fail", "1 of 2 weights failed, first a")


def one(host: SparseHost = HOST, weight: npt.NDArray[Any] | None = None, **how: Any) -> Any:
    shape = SHAPES["square"]
    weight = pruned(shape) if weight is None else weight
    (layer,) = probe({"w": weight}, {"w": shape}, replace(QUICK, **how), host).layers
    return layer


@pytest.mark.parametrize("dtype", MULTIPLES)
def test_values_that_come_back_changed_fail(dtype: str) -> None:
    def spoiling(matrix: torch.Tensor) -> Packed:
        packed = compress(matrix)
        packed.values[3, 7] = 3
        return packed

    layer = one(replace(HOST, compress=spoiling), dtype=dtype)
    assert layer.verdict == "fail"
    assert layer.reason == f"1 {dtype} values are changed by packing"


@pytest.mark.parametrize("dtype", MULTIPLES)
def test_a_product_that_differs_fails(dtype: str) -> None:
    """Right for the identity, so that only the comparison with the dense product can tell."""

    def wrong(packed: Packed, dense: torch.Tensor) -> torch.Tensor:
        product = multiply(packed, dense)
        if dense.shape[0] != dense.shape[1]:
            product[4, 2] += product[4, 2].abs() + 1
        return product

    layer = one(replace(HOST, multiply=wrong), dtype=dtype)
    assert layer.verdict == "fail"
    assert "the sparse product differs" in layer.reason


def test_a_product_that_differs_by_rounding_alone_passes() -> None:
    def rounded(packed: Packed, dense: torch.Tensor) -> torch.Tensor:
        product = multiply(packed, dense)
        return product if dense.shape[0] == dense.shape[1] else torch.nextafter(product, torch.zeros_like(product))

    layer = one(replace(HOST, multiply=rounded), dtype="bf16")
    assert layer.verdict == "pass"
    assert 0 < layer.error <= layer.tolerance


def test_int8_uses_its_range_in_weights_and_images() -> None:
    largest = {}

    def watching(packed: Packed, dense: torch.Tensor) -> torch.Tensor:
        largest["weights"] = int(packed.values.abs().max())
        if dense.shape[0] != dense.shape[1]:
            largest["images"] = int(dense.abs().max())
        return multiply(packed, dense)

    assert one(replace(HOST, multiply=watching), dtype="int8").verdict == "pass"
    assert largest["weights"] == 127
    assert 64 < largest["images"] <= 127


def test_a_weight_that_is_not_the_layers_is_told() -> None:
    layer = one(weight=np.zeros((32, 16, 1, 1), np.float32))
    assert (layer.verdict, layer.reason) == ("fail", "the weight (32, 16, 1, 1) does not match the layer's shape")


def test_convolutions_are_timed_with_the_best_algorithm_found_and_what_was_set_comes_back() -> None:
    seen = []

    def watching(runs: Mapping[str, Callable[[], object]], warm_up: int, repeats: int) -> dict[str, float]:
        seen.append(torch.backends.cudnn.benchmark)
        if len(seen) == 2:
            raise RuntimeError("CUDA error")
        return time_on_cpu(runs, warm_up, repeats)

    before = torch.backends.cudnn.benchmark
    one(replace(HOST, time_ms=watching))
    assert (before, seen, torch.backends.cudnn.benchmark) == (False, [True, True], before)


def test_the_host_is_this_machines_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(HostError, match="PyTorch finds none"):
        probe({}, {}, QUICK)


def test_refusals_of_the_library_are_told() -> None:
    def refuse(matrix: torch.Tensor) -> Packed:
        raise RuntimeError("CUDA error: operation not supported\nmore")

    layer = one(replace(HOST, compress=refuse))
    assert (layer.verdict, layer.reason) == ("fail", "RuntimeError: CUDA error: operation not supported")

    def full(*_: object) -> dict[str, float]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    layer = one(replace(HOST, time_ms=full))
    assert layer.verdict == "pass"
    assert layer.batches[0].sparse_gemm_ms is None
    assert "out of memory" in layer.batches[0].reason


def test_values_beyond_half_precision_are_told() -> None:
    large = pruned(SHAPES["square"])
    large[large != 0] = 1e6
    layer = one(weight=large)
    assert layer.verdict == "fail"
    assert "not finite numbers of fp16" in layer.reason
    assert one(weight=large, dtype="bf16").verdict == "pass"


def test_what_cannot_be_2_4_is_left_out_and_nothing_left_is_a_failure() -> None:
    shape = LayerShape(16, 3, 3, 3, 8, 8)
    report = probe({"stem": np.zeros((16, 3, 3, 3), np.float32)}, {"stem": shape}, QUICK, HOST)
    assert report.layers[0].verdict == "left_out"
    assert report.layers[0].reason == "channels_not_multiple_of_4"
    assert (report.verdict, report.reason) == ("fail", "no weight could be probed")


def test_layers_of_one_shape_are_timed_once() -> None:
    shape, calls = SHAPES["pointwise"], []

    def counted(runs: Mapping[str, Callable[[], object]], warm_up: int, repeats: int) -> dict[str, float]:
        calls.append(sorted(runs))
        return time_on_cpu(runs, warm_up, repeats)

    weights = {"a": pruned(shape, 1), "b": pruned(shape, 2)}
    report = probe(weights, {"a": shape, "b": shape}, QUICK, replace(HOST, time_ms=counted))
    assert calls == [["conv", "dense", "sparse"]] * 2
    assert report.layers[0].batches == report.layers[1].batches


@pytest.mark.parametrize("options", [{"dtype": "fp8"}, {"batches": (0,)}, {"repeats": 0}, {"warm_up": 0}, {"seed": -1}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        ProbeOptions(**options)


def test_each_thing_missing_on_a_host_is_told_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(HostError, match="PyTorch finds none") as caught:
        find_cusparselt_host()
    assert torch.__version__ in str(caught.value.found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "An Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(HostError, match="no sparse tensor cores") as caught:
        find_cusparselt_host()
    assert "An Old GPU, compute capability 7.5" in str(caught.value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    with pytest.raises(HostError, match="no cuSPARSELt") as caught:
        find_cusparselt_host()
    assert caught.value.fix is not None
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(HostError, match="PyTorch is not installed"):
        find_cusparselt_host()


def a_gpu_of(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch tells of one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 702)


def test_a_host_that_has_everything_is_told_as_pytorch_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    a_gpu_of((8, 6), monkeypatch)
    host = find_cusparselt_host()
    assert (host.device, host.compute_capability, host.cuda_version) == ("A GPU", "8.6", "13.0")
    assert (host.torch_version, host.cusparselt_version, host.torch_device) == (torch.__version__, "702", "cuda")


def test_a_pytorch_built_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    a_gpu_of((8, 6), monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(HostError, match="built for no CUDA"):
        find_cusparselt_host()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(HostError, match=r"built for CUDA 13\.0"):
        find_cusparselt_host()


def test_weights_packed_for_another_library_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has a second one, CUTLASS, and chooses by what is set elsewhere."""
    a_gpu_of((8, 6), monkeypatch)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda matrix: SimpleNamespace(BACKEND="cutlass"))
    layer = one(replace(HOST, compress=find_cusparselt_host().compress))
    assert (layer.verdict, layer.reason) == ("fail", "RuntimeError: packed for cutlass, not for cuSPARSELt")


def test_products_of_int8_are_not_rounded_to_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own operator would; other dtypes are left to it."""
    a_gpu_of((8, 6), monkeypatch)
    wide = torch.full((2, 2), 30000, dtype=torch.int32)
    asked = []

    def sparse_mm(packed: object, dense: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
        asked.append((packed, out_dtype))
        return wide

    monkeypatch.setattr(torch, "_cslt_sparse_mm", sparse_mm)
    multiplied, dense = find_cusparselt_host().multiply, torch.eye(2)
    assert multiplied(SimpleNamespace(dtype=torch.int8, packed="packed"), dense) is wide
    assert asked == [("packed", torch.int32)]
    assert torch.equal(multiplied(2 * torch.eye(2), dense), 2 * torch.eye(2))
    assert len(asked) == 1


def test_the_gpus_clock_counts_no_warm_up_and_runs_all_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over stand-ins for PyTorch's events, which take their times only once they are waited for."""
    a_gpu_of((8, 6), monkeypatch)
    waiting: list[Callable[[], None]] = []
    clock = [0.0]
    costs = {"a": 3.0, "b": 5.0}
    ran: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            waiting.append(lambda: setattr(self, "at", clock[0]))

        def elapsed_time(self, other: Any) -> float:
            return float(other.at - self.at)  # type: ignore[attr-defined]

    def synchronize() -> None:
        while waiting:
            waiting.pop(0)()

    def run(name: str) -> Callable[[], None]:
        def work() -> None:
            # The first runs of each are slow.
            cost = costs[name] + 1000 * (ran.count(name) < 3)
            ran.append(name)
            waiting.append(lambda: clock.__setitem__(0, clock[0] + cost))

        return work

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    assert find_cusparselt_host().time_ms({name: run(name) for name in costs}, 3, 4) == costs
    assert ran == ["a", "b", "b", "a", "a", "b", "a", "b", "b", "a", "a", "b", "b", "a"]
    assert not waiting


def test_the_command_ends_with_3_where_there_is_no_gpu(
    digits_resnet: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ran = cli("probe", digits_resnet)
    assert ran.code == 3
    assert "PyTorch finds none" in ran.err
    assert "fix:" in ran.err


@pytest.fixture
def digits_resnet(tmp_path: Path, cli: Any) -> Path:
    """The bundled network with magnitude masks, baked."""
    masks, out = tmp_path / "masks.safetensors", tmp_path / "sparse.safetensors"
    assert cli("mask", "digits_resnet", "--method", "magnitude", "-o", masks).code == 0
    assert cli("bake", "digits_resnet", "--masks", masks, "-o", out).code == 0
    return out


def test_the_command_takes_a_checkpoint_and_its_onnx_alike(
    digits_resnet: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cusparselt_module, "find_cusparselt_host", lambda: HOST)
    graph, report = digits_resnet.with_suffix(".onnx"), digits_resnet.with_suffix(".json")
    ran = cli("export", "digits_resnet", "--weights", digits_resnet, "-o", graph)
    assert ran.code == 0, ran.err
    found = []
    for source in (digits_resnet, graph):
        ran = cli("probe", source, "--batch", "1,2", "--report", report)
        assert ran.code == 0, ran.err
        told = decode(ProbeReport, json.loads(report.read_text()))
        assert all(layer.name in ran.out for layer in told.layers)
        found.append([(layer.name, asdict(layer.shape), layer.verdict) for layer in told.layers])
    assert found[0] == found[1]
    assert len(found[0]) == 8
    assert {verdict for _, _, verdict in found[0]} == {"pass"}


def test_the_command_ends_with_1_on_dense_weights_and_3_on_bad_options(
    tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cusparselt_module, "find_cusparselt_host", lambda: HOST)
    graph = tmp_path / "dense.onnx"
    assert cli("export", "digits_resnet", "-o", graph).code == 0
    ran = cli("probe", graph, "--batch", "1")
    assert ran.code == 1
    assert "weights failed, first" in ran.err
    assert cli("probe", graph, "--batch", "0").code == 3
    assert cli("probe", graph, "--dtype", "fp8").code == 3
    assert cli("probe", tmp_path / "none.onnx").code == 3


def _gpu_missing() -> str:
    try:
        find_cusparselt_host()
    except HostError as error:
        return error.what
    return ""


@pytest.mark.skipif(bool(_gpu_missing()), reason=_gpu_missing() or "a GPU is here")
@pytest.mark.parametrize("dtype", MULTIPLES)
def test_this_gpu_takes_the_masks(dtype: str) -> None:
    weights = {name: pruned(shape) for name, shape in SHAPES.items()}
    report = probe(weights, SHAPES, replace(QUICK, dtype=dtype, warm_up=3))
    assert report.verdict == "pass", report
    assert all(b.sparse_gemm_ms is not None for layer in report.layers for b in layer.batches)
