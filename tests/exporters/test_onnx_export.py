"""PyTorch to ONNX: what the file computes, its names, and that its bytes hold the model and nothing of this host."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from maskplan.exporters.metadata import read_provenance
from maskplan.exporters.onnx_export import ExportOptions, export_onnx
from maskplan.pipeline.core.artifacts import OnnxModel, Preprocessing, Provenance
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.dataset import batches
from maskplan.pipeline.data.digits import PREPROCESSING as DIGITS
from maskplan.pipeline.data.digits import load_digits
from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint

Array = npt.NDArray[Any]

HOW = Preprocessing(3, 16, 16, 0, "bilinear", (0.0,) * 3, (1.0,) * 3)
MADE = Provenance("net", True, "test", "0" * 64, 4, (), HOW)
# The exporter's notes, and what paths of this host look like.
TRACES = (b"stack_trace", b"site-packages", b'File "', b"torch_version", b"name_scopes", b"/home/", b".py")


def export(
    module: nn.Module, folder: Path, precisions: Iterable[str] = ("fp32",), name: str = "net"
) -> list[OnnxModel]:
    outs = {precision: folder / f"{name}.{precision}.onnx" for precision in precisions}
    return list(export_onnx(module.eval(), MADE, ExportOptions(), outs))


def run(path: Path, x: Array) -> Array:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"input": x})
    return logits


def eager(module: nn.Module, x: Array) -> Array:
    with torch.no_grad():
        return module.eval()(torch.from_numpy(x)).numpy()


def images(batch: int, channels: int = 3, size: int = 16) -> npt.NDArray[np.float32]:
    return np.random.default_rng(batch).normal(size=(batch, channels, size, size)).astype(np.float32)


def tensors_of(path: Path) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def graphs_of(graph: onnx.GraphProto) -> Iterable[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs_of(attribute.g)


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


class Net(nn.Module):
    """A forward pass given as a function, with layers by name."""

    def __init__(self, function: Callable[[Any, torch.Tensor], torch.Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def pooled(x: torch.Tensor) -> torch.Tensor:
    return x.mean((2, 3))


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


def tiny(spec: str) -> tuple[nn.Module, Provenance]:
    module, made = open_checkpoint(ModelOptions(spec, "random"))
    return settled(module), made


def test_both_precisions_compute_what_eager_does_at_any_batch(tiny_spec: str, tmp_path: Path) -> None:
    module, made = tiny(tiny_spec)
    outs = {"fp32": tmp_path / "net.onnx", "fp16": tmp_path / "net.fp16.onnx"}
    full, half = export_onnx(module, made, ExportOptions(), outs)
    for batch in (1, 2, 5):
        x = images(batch)
        expected = eager(module, x)
        assert expected.shape == (batch, 3)
        assert np.allclose(run(full.path, x), expected, atol=1e-5)
        assert np.allclose(run(half.path, x), expected, atol=2e-2 * np.abs(expected).max())
    assert run(half.path, images(1)).dtype == np.float32


def test_the_files_are_as_the_design_says(tiny_spec: str, tmp_path: Path) -> None:
    module, made = tiny(tiny_spec)
    outs = {"fp32": tmp_path / "net.onnx", "fp16": tmp_path / "net.fp16.onnx"}
    for record, precision in zip(export_onnx(module, made, ExportOptions(), outs), outs, strict=True):
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
        assert read_provenance(model, record.path) == made == record.provenance
        assert (record.precision, record.sha256) == (precision, hashlib.sha256(record.path.read_bytes()).hexdigest())
        assert_names_follow(record.path, module)


def test_batchnorm_is_folded_into_the_weight_and_zeros_stay(tiny_spec: str, tmp_path: Path) -> None:
    module, _ = tiny(tiny_spec)
    conv, norm = module.wide, module.bn2
    with torch.no_grad():
        conv.weight[:, ::2] = 0
    (record,) = export(module, tmp_path)
    scale = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach().numpy()
    folded = tensors_of(record.path)["wide.weight"]
    assert np.allclose(folded, conv.weight.detach().numpy() * scale[:, None, None, None], atol=1e-6)
    assert np.array_equal(folded == 0, conv.weight.detach().numpy() == 0)
    assert "BatchNormalization" not in {n.op_type for n in onnx.load(record.path).graph.node}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_folding_with_a_negative_gamma_leaves_no_minus_zero(precision: str, tmp_path: Path) -> None:
    module = Net(
        lambda s, x: s.head(pooled(torch.relu(s.norm(s.conv(s.stem(x)))))),
        stem=nn.Conv2d(3, 8, 1),
        conv=nn.Conv2d(8, 8, 3, padding=1, bias=False),
        norm=nn.BatchNorm2d(8),
        head=nn.Linear(8, 4),
    ).eval()
    weight, gamma = module.conv.weight, module.norm.weight
    with torch.no_grad():
        gamma.fill_(-0.75)
        weight[:, [1, 2, 5, 6]] = 0
        # What the fold alone makes of the pruned zeros.
        assert torch.signbit(weight * gamma.reshape(-1, 1, 1, 1))[:, [1, 2, 5, 6]].all()
    (record,) = export(module, tmp_path, [precision])
    pruned = 0
    for value in tensors_of(record.path).values():
        if value.dtype.kind == "f":
            zeros = value[value == 0]
            pruned += zeros.size
            assert not np.signbit(zeros).any()
    assert pruned >= 8 * 4 * 9
    x = images(3)
    assert np.allclose(run(record.path, x), eager(module, x), atol=1e-2)


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


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_bytes_hold_nothing_of_this_host(precision: str, tiny_spec: str, tmp_path: Path) -> None:
    module, made = tiny(tiny_spec)
    (record,) = export_onnx(module, made, ExportOptions(), {precision: tmp_path / "net.onnx"})
    # "tiny.py:build" is known as tiny_build, without its folder.
    assert json.loads(onnx.load(record.path).metadata_props[0].value)["model"] == "tiny_build"
    assert_nothing_of_this_host(record.path.read_bytes(), tmp_path, Path.home())


def branching() -> nn.Module:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        def light(y: torch.Tensor) -> torch.Tensor:
            return s.head(pooled(y))

        def dark(y: torch.Tensor) -> torch.Tensor:
            return s.head(pooled(-y)) + 1

        return torch.cond(x.sum() > 0, light, dark, (x,))

    return Net(forward, head=nn.Linear(3, 4))


def test_branches_in_the_graph_hold_nothing_of_this_host_either(tmp_path: Path) -> None:
    (record,) = export(branching(), tmp_path)
    assert len(list(graphs_of(onnx.load(record.path).graph))) == 3
    assert_nothing_of_this_host(record.path.read_bytes(), tmp_path, Path.home())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_model_with_branches_is_exported_in_both_precisions(precision: str, tmp_path: Path) -> None:
    module = branching()
    (record,) = export(module, tmp_path, [precision])
    for x in (images(3) + 1, images(3) - 1):
        assert np.allclose(run(record.path, x), eager(module, x), atol=1e-2)


def test_the_bytes_do_not_depend_on_folder_process_or_hash_seed(tiny_spec: str, tmp_path: Path) -> None:
    first = tmp_path / "first"
    first.mkdir()
    module, made = open_checkpoint(ModelOptions(tiny_spec, "random"))
    outs = {p: first / f"{p}.onnx" for p in ("fp32", "fp16")}
    expected = [record.sha256 for record in export_onnx(module, made, ExportOptions(), outs)]
    elsewhere = tmp_path / "some" / "where else"
    elsewhere.mkdir(parents=True)
    shutil.copy(tiny_spec.removesuffix(":build"), elsewhere / "tiny.py")
    for seed, (precision, digest) in zip(("1", "2"), zip(outs, expected, strict=True), strict=True):
        command = [sys.executable, "-m", "maskplan.pipeline", "export", "tiny.py:build", "--weights", "random"]
        done = subprocess.run(
            [*command, "--precision", precision, "-o", f"{precision}.onnx"],
            cwd=elsewhere,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert hashlib.sha256((elsewhere / f"{precision}.onnx").read_bytes()).hexdigest() == digest


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


def test_a_second_export_of_the_same_module_is_the_same(tmp_path: Path) -> None:
    module = Net(lambda s, x: s.head(pooled(s.stem(x))), stem=nn.Conv2d(3, 8, 3), head=nn.Linear(8, 4))
    (first,), (second,) = export(module, tmp_path, name="a"), export(module, tmp_path, name="b")
    assert first.sha256 == second.sha256


def test_the_exported_module_is_left_as_it_was(tmp_path: Path) -> None:
    module = Net(lambda s, x: s.head(pooled(s.norm(s.stem(x)))), stem=nn.Conv2d(3, 8, 3), norm=nn.BatchNorm2d(8))
    module.add_module("head", nn.Linear(8, 4))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    export(module, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


# Names where they are not the exporter's own.


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
        made = nn.Conv2d(4, 4, 3, padding=1) if kind == "conv" else nn.Linear(4, 4)
        nn.init.constant_(made.weight, 0.25)
        return made

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        x = s.stem(x)
        x = x if kind == "conv" else x.permute(0, 2, 3, 1)
        x = s.second(torch.relu(s.first(x)))
        return x.mean((2, 3) if kind == "conv" else (1, 2))

    module = Net(forward, stem=nn.Conv2d(3, 4, 1), first=layer(), second=layer())
    (record,) = export(module, tmp_path)
    assert_names_follow(record.path, module)


# What is refused.


def nothing(folder: Path) -> bool:
    return not [p for p in folder.iterdir() if "onnx" in p.name]


def data_dependent() -> nn.Module:
    return Net(lambda s, x: s.head(pooled(x if x.sum() > 0 else -x)), head=nn.Linear(3, 4))


def unsupported() -> nn.Module:
    return Net(lambda s, x: s.head(torch.linalg.svdvals(x).mean(2)), head=nn.Linear(3, 4))


def in_double() -> nn.Module:
    """ONNX Runtime has no convolution in double precision."""
    return Net(lambda s, x: pooled(s.conv(x.double())).float(), conv=nn.Conv2d(3, 4, 3, bias=False).to(torch.float64))


@pytest.mark.parametrize("make", [data_dependent, unsupported, in_double])
def test_a_model_that_cannot_be_exported_is_an_input_error_without_files(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        export(make(), tmp_path, ["fp32", "fp16"])
    assert len(str(caught.value).splitlines()) <= 4
    assert nothing(tmp_path)


def test_the_command_says_so_in_one_message_and_nothing_else(maskplan: Callable[..., Any], tmp_path: Path) -> None:
    """The exporter's own reports, with the model's source in them, stay unsaid."""
    (tmp_path / "picky.py").write_text(
        "import torch\nfrom torch import nn\n"
        'PREPROCESSING = {"height": 16, "width": 16, "resize": 0}\n'
        "class Picky(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 3)\n"
        "    def forward(self, x):\n        x = x if x.sum() > 0 else -x\n"
        "        return self.head(self.conv(self.stem(x)).mean((2, 3)))\n"
        "def build():\n    return Picky()\n"
    )
    ran = maskplan("export", "picky.py:build", "--weights", "random", "-o", "out/picky.onnx", cwd=tmp_path)
    assert ran.code == 3
    assert ran.out == ""
    lines = ran.err.splitlines()
    assert lines[0] == "error: PyTorch cannot export the model to ONNX"
    assert [line.strip().partition(":")[0] for line in lines[1:]] == ["where", "found", "fix"]
    assert {p.name for p in tmp_path.iterdir()} - {"__pycache__"} == {"picky.py"}


class Counting(nn.Module):
    """Gives another answer at every call, which no graph can."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.calls = nn.Linear(3, 4), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.head(pooled(x)) * self.calls


class Noisy(nn.Module):
    """Dropout that stays on."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(pooled(x)) + torch.rand(x.shape[0], 4)


class Undefined(nn.Module):
    """Infinity from everything."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(pooled(x)) / torch.zeros(4)


@pytest.mark.parametrize("kind", [Counting, Noisy, Undefined])
def test_a_file_that_computes_something_else_than_eager_is_refused(kind: type[nn.Module], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="outputs of the exported model differ"):
        export(kind(), tmp_path)
    assert nothing(tmp_path)


def test_a_tighter_tolerance_refuses_what_a_wider_one_lets_pass(tmp_path: Path) -> None:
    module = Net(lambda s, x: s.head(pooled(s.stem(x))), stem=nn.Conv2d(3, 8, 3), head=nn.Linear(8, 4)).eval()
    outs = {"fp16": tmp_path / "net.onnx"}
    with pytest.raises(InputError, match="outputs of the exported model differ"):
        export_onnx(module, MADE, ExportOptions(tolerance_fp16=1e-7), outs)
    assert nothing(tmp_path)
    export_onnx(module, MADE, ExportOptions(tolerance_fp16=1e-1), outs)
    assert outs["fp16"].is_file()


def test_layers_whose_activations_overflow_in_half_stay_fp32_and_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = Net(
        lambda s, x: s.head(s.down(pooled(s.up(x)))),
        up=nn.Conv2d(3, 4, 1, bias=False),
        down=nn.Linear(4, 4),
        head=nn.Linear(4, 4),
    )
    with torch.no_grad():
        module.up.weight.copy_(torch.full((4, 3, 1, 1), 6e4) * torch.tensor([1, -1, 1, -1]).reshape(4, 1, 1, 1))
        module.down.weight.mul_(1e-4)
    full, half = export(module, tmp_path, ["fp32", "fp16"])
    assert half.path.name in caplog.text
    assert "up (Conv) makes" in caplog.text
    assert "head (" not in caplog.text
    kinds = {t.name: t.data_type for t in onnx.load(half.path).graph.initializer}
    assert kinds["up.weight"] == TensorProto.FLOAT
    assert kinds["head.weight"] == TensorProto.FLOAT16
    x = images(2)
    assert np.allclose(run(half.path, x), run(full.path, x), atol=1e-2 * np.abs(run(full.path, x)).max())
    caplog.clear()
    export(module, tmp_path, ["fp32"], name="alone")
    assert not caplog.records


def test_weights_that_overflow_in_half_are_named(tmp_path: Path) -> None:
    module = Net(lambda s, x: s.head(pooled(x)), head=nn.Linear(3, 4))
    with torch.no_grad():
        module.head.weight.fill_(1e5)
    with pytest.raises(InputError, match=r"head\.weight"):
        export(module, tmp_path, ["fp16"])
    assert nothing(tmp_path)


def test_the_command_writes_the_precision_asked_for(cli: Callable[..., Any], tiny_spec: str, tmp_path: Path) -> None:
    for precision, kind in (("fp32", TensorProto.FLOAT), ("fp16", TensorProto.FLOAT16)):
        out = tmp_path / f"{precision}.onnx"
        ran = cli("export", tiny_spec, "--weights", "random", "--precision", precision, "-o", out)
        assert ran.code == 0, ran.err
        assert precision in ran.out
        (head,) = [t for t in onnx.load(out).graph.initializer if t.name == "head.weight"]
        assert head.data_type == kind
    ran = cli("export", tiny_spec, "--weights", "random", "--precision", "int3", "-o", tmp_path / "no.onnx")
    assert (ran.code, (tmp_path / "no.onnx").exists()) == (3, False)


def test_an_out_folder_that_cannot_be_made_is_a_clear_error(
    cli: Callable[..., Any], tiny_spec: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    ran = cli("export", tiny_spec, "--weights", "random", "-o", tmp_path / "file" / "net.onnx")
    assert ran.code == 3
    assert "error: " in ran.err
    assert (tmp_path / "file").read_text() == "in the way"
