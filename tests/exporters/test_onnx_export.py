"""PyTorch to ONNX: what the file computes, its names, and that its bytes contain the model and nothing of this host."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exported_nets import Net, eager, export, images, pooled, run, tensors_of
from onnx import TensorProto
from torch import nn

from maskplan.exporters.metadata import read_provenance
from maskplan.exporters.onnx_export import ExportOptions, export_onnx
from maskplan.exporters.subgraphs import walk_graphs
from maskplan.pipeline.core.artifacts import OnnxModel, Provenance
from maskplan.pipeline.data.dataset import batches
from maskplan.pipeline.data.digits import PREPROCESSING as DIGITS
from maskplan.pipeline.data.digits import load_digits
from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint

# The exporter's notes, and what paths of this host look like.
TRACES = (b"stack_trace", b"site-packages", b'File "', b"torch_version", b"name_scopes", b"/home/", b".py")
both_precisions = pytest.mark.parametrize("precision", ["fp32", "fp16"])


def test_indices_of_einsum_are_lower_case_as_tensorrt_requires(tmp_path: Path) -> None:
    module = Net(
        lambda s, x: torch.einsum("nCHW,nDHW->nDC", s.stem(x), s.stem(x)[:, :2]), stem=nn.Conv2d(3, 4, 3)
    ).eval()
    (model,) = export(module, tmp_path)
    equations = [
        a.s.decode() for node in onnx.load(model.path).graph.node for a in node.attribute if node.op_type == "Einsum"
    ]
    assert equations
    assert all(equation.islower() for equation in equations)
    assert np.allclose(run(model.path, images(2)), eager(module, images(2)), atol=1e-3)


def assert_names_follow(path: Path, module: nn.Module) -> None:
    """Weights bear their parameters' names and shapes; the nodes that use them bear the modules' paths."""
    graph = onnx.load(path).graph
    weighted = {n.name: n for n in graph.node if n.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")}
    layers = {p: m for p, m in module.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert set(weighted) == set(layers)
    tensors = {t.name: tuple(t.dims) for t in graph.initializer}
    for layer, found in layers.items():
        assert weighted[layer].input[1] == f"{layer}.weight"
        shape = tuple(found.weight.shape)
        # MatMul takes a linear layer's weight the other way round.
        assert tensors[f"{layer}.weight"] == (shape[::-1] if weighted[layer].op_type == "MatMul" else shape)


def settled(module: nn.Module) -> nn.Module:
    """With BatchNorm that does something: random scales (some negative), shifts and statistics."""
    generator = torch.Generator().manual_seed(7)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            with torch.no_grad():
                norm.weight.copy_(torch.randn(norm.num_features, generator=generator))
                norm.bias.copy_(torch.randn(norm.num_features, generator=generator))
                norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator))
                norm.running_var.copy_(0.5 + torch.rand(norm.num_features, generator=generator))
    return module.eval()


@dataclass(frozen=True)
class Exported:
    """A module, exported once in both precisions; do not change it."""

    module: nn.Module
    provenance: Provenance
    state_before: Mapping[str, torch.Tensor]
    files: Mapping[str, OnnxModel]


def exported(module: nn.Module, provenance: Provenance, folder: Path) -> Exported:
    before = {name: value.clone() for name, value in module.state_dict().items()}
    outs = {precision: folder / f"{precision}.onnx" for precision in ("fp32", "fp16")}
    records = export_onnx(module, provenance, ExportOptions(), outs)
    return Exported(module, provenance, before, dict(zip(outs, records, strict=True)))


@pytest.fixture(scope="module")
def tiny(tiny_source: str, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The tiny model with half of the input channels of `wide` pruned, before a BatchNorm with some negative scales."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.py").write_text(tiny_source)
    module, provenance = open_checkpoint(ModelOptions(f"{folder / 'tiny.py'}:build", "random"))
    with torch.no_grad():
        settled(module).wide.weight[:, ::2] = 0
    return exported(module, provenance, folder)


def branching() -> nn.Module:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        def light(y: torch.Tensor) -> torch.Tensor:
            return s.head(pooled(y))

        def dark(y: torch.Tensor) -> torch.Tensor:
            return s.head(pooled(-y)) + 1

        return torch.cond(x.sum() > 0, light, dark, (x,))

    return Net(forward, head=nn.Linear(3, 4))


@pytest.fixture(scope="module")
def branches(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A model with a branch in its graph."""
    module = branching()
    full, half = export(module, tmp_path_factory.mktemp("branches"), ["fp32", "fp16"])
    return Exported(module, full.provenance, {}, {"fp32": full, "fp16": half})


def test_both_precisions_compute_what_eager_does_at_any_batch(tiny: Exported) -> None:
    full, half = tiny.files["fp32"], tiny.files["fp16"]
    for batch in (1, 2, 5):
        x = images(batch)
        expected = eager(tiny.module, x)
        assert expected.shape == (batch, 3)
        assert np.allclose(run(full.path, x), expected, atol=1e-5)
        assert np.allclose(run(half.path, x), expected, atol=2e-2 * np.abs(expected).max())
    assert run(half.path, images(1)).dtype == np.float32


@both_precisions
def test_opset_inputs_outputs_types_and_record_are_as_documented(precision: str, tiny: Exported) -> None:
    record = tiny.files[precision]
    model = onnx.load(record.path)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    for value, name, rest in ((model.graph.input[0], "input", [3, 16, 16]), (model.graph.output[0], "logits", [3])):
        kind = value.type.tensor_type
        assert (value.name, kind.elem_type) == (name, TensorProto.FLOAT)
        assert kind.shape.dim[0].dim_param
        assert [d.dim_value for d in kind.shape.dim[1:]] == rest
    assert len(model.graph.input) == len(model.graph.output) == 1
    weights = {t.data_type for t in model.graph.initializer if t.name.endswith(".weight")}
    assert weights == {TensorProto.FLOAT if precision == "fp32" else TensorProto.FLOAT16}
    assert read_provenance(model, record.path) == tiny.provenance == record.provenance
    assert (record.precision, record.sha256) == (precision, hashlib.sha256(record.path.read_bytes()).hexdigest())
    assert_names_follow(record.path, tiny.module)


def test_batchnorm_is_folded_into_the_weight_and_zeros_stay(tiny: Exported) -> None:
    conv, norm = tiny.module.wide, tiny.module.bn2
    scale = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach().numpy()
    folded = tensors_of(tiny.files["fp32"].path)["wide.weight"]
    assert np.allclose(folded, conv.weight.detach().numpy() * scale[:, None, None, None], atol=1e-6)
    assert np.array_equal(folded == 0, conv.weight.detach().numpy() == 0)
    assert "BatchNormalization" not in {n.op_type for n in onnx.load(tiny.files["fp32"].path).graph.node}


@both_precisions
def test_folding_with_a_negative_gamma_leaves_no_minus_zero(precision: str, tiny: Exported) -> None:
    weight, gamma = tiny.module.wide.weight, tiny.module.bn2.weight
    # Folding alone turns pruned zeros into -0.0 where gamma is negative.
    assert torch.signbit(weight * gamma.reshape(-1, 1, 1, 1))[:, ::2].any()
    pruned = 0
    for value in tensors_of(tiny.files[precision].path).values():
        if value.dtype.kind == "f":
            zeros = value[value == 0]
            pruned += zeros.size
            assert not np.signbit(zeros).any()
    assert pruned >= 12 * 4 * 9


def test_the_exported_module_is_unchanged(tiny: Exported) -> None:
    state = tiny.module.state_dict()
    assert state.keys() == tiny.state_before.keys()
    assert all(torch.equal(value, tiny.state_before[name]) for name, value in state.items())


def test_the_bundled_model_predicts_as_eager_does(tmp_path: Path) -> None:
    module, made = open_checkpoint(ModelOptions("digits_resnet"))
    (record,) = export_onnx(module, made, ExportOptions(), {"fp32": tmp_path / "digits.onnx"})
    assert_names_follow(record.path, module)
    right = 0
    for x, labels in batches(load_digits().val, DIGITS, 100):
        expected, found = eager(module, x), run(record.path, x)
        assert np.allclose(found, expected, atol=1e-4)
        right += int((found.argmax(1) == labels).sum())
    assert right >= 0.98 * len(load_digits().val)


def assert_nothing_of_this_host(data: bytes, *folders: Path) -> None:
    for trace in (*TRACES, *(str(f).encode() for f in folders), str(Path(__file__).parents[2]).encode()):
        assert trace not in data, data[max(data.index(trace) - 100, 0) :][:300]


@both_precisions
def test_the_bytes_contain_nothing_of_this_host(precision: str, tiny: Exported) -> None:
    path = tiny.files[precision].path
    # "tiny.py:build" is recorded as tiny_build, without its folder.
    assert json.loads(onnx.load(path).metadata_props[0].value)["model"] == "tiny_build"
    assert_nothing_of_this_host(path.read_bytes(), path.parent, Path.home())


def test_branches_in_the_graph_contain_nothing_of_this_host_either(branches: Exported) -> None:
    path = branches.files["fp32"].path
    assert len(list(walk_graphs(onnx.load(path).graph))) == 3
    assert_nothing_of_this_host(path.read_bytes(), path.parent, Path.home())


@both_precisions
def test_a_model_with_branches_is_exported_in_both_precisions(precision: str, branches: Exported) -> None:
    for x in (images(3) + 1, images(3) - 1):
        assert np.allclose(run(branches.files[precision].path, x), eager(branches.module, x), atol=1e-2)


@pytest.mark.slow  # the whole line in another process is a plain test of test_run.py
def test_the_command_writes_bytes_that_do_not_depend_on_folder_process_or_hash_seed(
    cli: Callable[..., Any], tiny_spec: str, tmp_path: Path
) -> None:
    outs = {precision: tmp_path / f"{precision}.onnx" for precision in ("fp32", "fp16")}
    for precision, kind in (("fp32", TensorProto.FLOAT), ("fp16", TensorProto.FLOAT16)):
        ran = cli("export", tiny_spec, "--weights", "random", "--precision", precision, "-o", outs[precision])
        assert ran.code == 0, ran.err
        assert precision in ran.out
        (head,) = [t for t in onnx.load(outs[precision]).graph.initializer if t.name == "head.weight"]
        assert head.data_type == kind
    elsewhere = tmp_path / "some" / "where else"
    elsewhere.mkdir(parents=True)
    shutil.copy(tiny_spec.removesuffix(":build"), elsewhere / "tiny.py")
    # FP16 is converted from the FP32 graph, so one process shows differences of either.
    command = [sys.executable, "-m", "maskplan.pipeline", "export", "tiny.py:build", "--weights", "random"]
    done = subprocess.run(
        [*command, "--precision", "fp16", "-o", "fp16.onnx"],
        cwd=elsewhere,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "fp16.onnx").read_bytes() == outs["fp16"].read_bytes()


def test_an_unknown_precision_is_refused(cli: Callable[..., Any], tiny_spec: str, tmp_path: Path) -> None:
    ran = cli("export", tiny_spec, "--weights", "random", "--precision", "int3", "-o", tmp_path / "no.onnx")
    assert (ran.code, (tmp_path / "no.onnx").exists()) == (3, False)


def test_the_stored_weights_are_the_whole_model(tmp_path: Path) -> None:
    """Convolution, mean and head in NumPy, from the file's tensors by name, give the file's numbers."""
    module = Net(lambda s, x: s.head(pooled(s.stem(x))), stem=nn.Conv2d(3, 8, 3, bias=False), head=nn.Linear(8, 4))
    (record,) = export(module, tmp_path)
    stored = tensors_of(record.path)
    x = images(2)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
    features = np.einsum("nchwrs,kcrs->nkhw", windows, stored["stem.weight"]).mean((2, 3))
    expected = features @ stored["head.weight"].T + stored["head.bias"]
    assert np.allclose(run(record.path, x), expected, atol=1e-5)


# Names that differ from the exporter's own.


def test_a_linear_layer_over_pixels_keeps_its_parameters_name(tmp_path: Path) -> None:
    """The exporter transposes its weight for MatMul and gives the copy a name of its own."""
    module = Net(
        lambda s, x: s.block[1](torch.relu(s.block[0](x.permute(0, 2, 3, 1)))).mean((1, 2)),
        block=nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 4)),
    )
    (record,) = export(module, tmp_path)
    assert_names_follow(record.path, module)
    assert np.array_equal(tensors_of(record.path)["block.0.weight"], module.block[0].weight.detach().numpy().T)


def test_a_layer_used_twice_names_both_its_nodes(tmp_path: Path) -> None:
    module = Net(
        lambda s, x: s.head(pooled(s.conv(torch.relu(s.conv(s.stem(x)))))),
        stem=nn.Conv2d(3, 4, 1),
        conv=nn.Conv2d(4, 4, 3, padding=1),
        head=nn.Linear(4, 4),
    )
    (record,) = export(module, tmp_path)
    nodes = [n for n in onnx.load(record.path).graph.node if "conv.weight" in n.input]
    assert [n.op_type for n in nodes] == ["Conv", "Conv"]
    assert nodes[0].name == "conv"
    assert nodes[1].name.startswith("conv")
    assert len({n.name for n in nodes}) == 2


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_layers_of_equal_weights_keep_their_own_names(kind: str, tmp_path: Path) -> None:
    """Layers that start from zeros, or are copies of each other: masks are listed by name, and both must be found."""

    def layer() -> nn.Module:
        new = nn.Conv2d(4, 4, 3, padding=1) if kind == "conv" else nn.Linear(4, 4)
        nn.init.constant_(new.weight, 0.25)
        return new

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        x = s.stem(x)
        x = x if kind == "conv" else x.permute(0, 2, 3, 1)
        x = s.second(torch.relu(s.first(x)))
        return x.mean((2, 3) if kind == "conv" else (1, 2))

    module = Net(forward, stem=nn.Conv2d(3, 4, 1), first=layer(), second=layer())
    (record,) = export(module, tmp_path)
    assert_names_follow(record.path, module)
