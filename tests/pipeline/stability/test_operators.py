"""Operators of networks as read: they compute what torch does, their constants are right, and others are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from operator_cases import CASES
from random_nets import ALL_CASES, architecture, case
from torch import nn
from torch.nn import functional as F

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.models.aten import export_aten
from maskplan.pipeline.stability.bounds import difference_norms, max_image_norm, observe, pair_of, worst_case
from maskplan.pipeline.stability.network import Network, Node, Operator, affine_maps, apply_node
from maskplan.pipeline.stability.reader import ACCEPTED_OPERATORS, _Reader, read_network
from tests.support.moving_nets import Net

NETWORKS = range(ALL_CASES)
ACTIVATIONS = ("relu", "relu6", "hardtanh", "tanh", "sigmoid", "hardsigmoid", "hardswish", "silu", "gelu", "leaky_relu")


def computed(network: Network, state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    maps = affine_maps(network, state)
    values: list[torch.Tensor] = []
    with torch.no_grad():
        for i, node in enumerate(network.nodes):
            values.append(x if node.op is None else apply_node(node, maps.get(i), [values[j] for j in node.inputs]))
            assert tuple(values[-1].shape[1:]) == node.shape
    return values[-1]


def test_the_random_networks_contain_exactly_the_accepted_operators() -> None:
    assert frozenset().union(*(architecture(number)[2] for number in NETWORKS)) == ACCEPTED_OPERATORS


@pytest.mark.parametrize("number", NETWORKS)
def test_random_networks_as_read_compute_what_torch_does(number: int) -> None:
    _, network, _ = architecture(number)
    drawn = case(number, 0, images=5)
    for state in (drawn.first, drawn.second):
        torch.testing.assert_close(computed(network, state, drawn.images), drawn.logits(state), rtol=1e-9, atol=1e-9)


def operators() -> Iterator[tuple[str, Operator, Node, Node]]:
    """Operators without weights in the random networks: label, operator, its node and the node that it reads."""
    for number in NETWORKS:
        _, network, _ = architecture(number)
        for i, node in enumerate(network.nodes):
            if isinstance(node.op, Operator):
                label = f"{node.op.target} {node.op.args} (network {number}, node {i})"
                yield label, node.op, node, network.nodes[node.inputs[0]]


def test_constants_of_operators_are_right() -> None:
    generator = torch.Generator().manual_seed(0)
    count = 0
    for label, op, node, source in operators():
        count += 1

        def run(x: torch.Tensor, node: Node = node) -> torch.Tensor:
            return apply_node(node, None, [x]).flatten(1)

        x, y = (3 * torch.randn(40, *source.shape, generator=generator, dtype=torch.float64) for _ in range(2))
        slack = 1 + 1e-9
        zero = run(torch.zeros(1, *source.shape, dtype=torch.float64))
        assert zero.abs().max() <= op.at_zero + 1e-12, label
        if op.at_zero == 0 and torch.allclose(run(x + y), run(x) + run(y), atol=1e-9):
            # Linear: the norm is that of the matrix.
            size = x[0].numel()
            norm = float(
                torch.linalg.matrix_norm(run(torch.eye(size, dtype=torch.float64).view(size, *source.shape)), 2)
            )
            assert norm <= op.lipschitz * slack, label
            assert op.lipschitz <= 2.5 * norm, label
            continue
        # Pairs at all distances, and images that differ in one value.
        spikes = torch.zeros_like(x).flatten(1)
        spikes[torch.arange(40), torch.randint(spikes.shape[1], (40,), generator=generator)] = 2.0
        for other in (y, x + 1e-3 * y, x + spikes.view_as(x), -x):
            change, moved = (run(x) - run(other)).norm(dim=1), (x - other).flatten(1).norm(dim=1)
            assert (change <= op.lipschitz * moved * slack + 1e-9).all(), label
        assert (
            run(x).norm(dim=1) <= op.lipschitz * x.flatten(1).norm(dim=1) + op.at_zero * zero.numel() ** 0.5 + 1e-9
        ).all()
        if op.is_rectifier:
            assert not run(-x.abs()).any(), label
    assert count > 60


def single(forward: Callable[..., torch.Tensor], size: int = 9) -> Operator:
    """The operator of a network that has only one."""
    preprocessing = Preprocessing(1, size, size, 0, "bilinear", (0.0,), (1.0,))
    (op,) = (
        node.op
        for node in read_network(Net(lambda self, x: forward(x)), preprocessing).nodes
        if isinstance(node.op, Operator)
    )
    return op


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        (nn.MaxPool2d(3, 2, 1), 2.0),
        (nn.MaxPool2d(3, 2, dilation=2), 3.0),
        (nn.MaxPool2d((1, 3), (1, 1)), 3**0.5),
    ],
)
def test_the_constant_of_max_pooling_is_attained(pool: nn.MaxPool2d, expected: float) -> None:
    """By a single value in as many windows as possible."""
    assert single(pool).lipschitz == pytest.approx(expected)
    spikes = torch.eye(81, dtype=torch.float64).view(81, 1, 9, 9)
    assert float(pool(spikes).flatten(1).norm(dim=1).max()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("pool", "size"),
    [
        # The smallest windows decide: one value in a corner, where a whole window would give 1/2 or 1/3.
        (nn.AvgPool2d(2, 2, 1, count_include_pad=False), 8),
        (nn.AvgPool2d(2, 2, ceil_mode=True), 9),
        (nn.AvgPool2d(2, divisor_override=3), 8),
        (nn.AvgPool2d(3), 9),
        (nn.AdaptiveAvgPool2d(1), 9),
        (nn.AdaptiveAvgPool2d(9), 9),
    ],
)
def test_the_constant_of_average_pooling_without_overlap_is_its_matrix_norm(pool: nn.Module, size: int) -> None:
    matrix = pool(torch.eye(size**2, dtype=torch.float64).view(-1, 1, size, size)).flatten(1)
    assert single(pool, size).lipschitz == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-9)


def test_activations_are_never_steeper_than_their_constant_nor_much_flatter() -> None:
    x = torch.linspace(-12, 12, 480_001, dtype=torch.float64)
    elementwise = {
        name: factory(1, 1, 1)
        for name, factory in CASES.items()
        if name.partition(",")[0] in ACTIVATIONS and "in place" not in name
    }
    assert {name.partition(",")[0] for name in elementwise} == set(ACTIVATIONS)
    bank = Net(
        lambda self, x: torch.cat(
            [torch.flatten(self.get_submodule(str(i))(x), 1) for i in range(len(elementwise))], 1
        ),
        **{str(i): module for i, module in enumerate(elementwise.values())},
    )
    network = read_network(bank, Preprocessing(1, 1, 1, 0, "bilinear", (0.0,), (1.0,)))
    ops = [node.op for node in network.nodes if isinstance(node.op, Operator)]
    assert len(ops) == len(elementwise)
    for name, op in zip(elementwise, ops, strict=True):
        y = op.target(x, *op.args, **dict(op.kwargs))
        steepest = float(((y[1:] - y[:-1]) / (x[1:] - x[:-1])).abs().max())
        assert steepest <= op.lipschitz * (1 + 1e-6) <= 1.01 * steepest, name
        zero = torch.zeros(1, dtype=torch.float64)
        assert op.at_zero == abs(float(op.target(zero, *op.args, **dict(op.kwargs)))), name


@pytest.mark.parametrize("limits", [(1.0, 5.0), (-5.0, -1.0)])
def test_the_worst_case_covers_activations_that_do_not_map_zero_to_zero(limits: tuple[float, float]) -> None:
    """The image that is zero behind the first layer has the largest values behind `hardtanh(1, 5)`."""
    preprocessing = Preprocessing(1, 2, 2, 0, "bilinear", (0.0,), (1.0,))
    module = Net(
        lambda self, x: self.head(torch.flatten(F.hardtanh(self.body(x), *limits), 1)),
        body=nn.Conv2d(1, 1, 1, bias=False),
        head=nn.Linear(4, 2, bias=False),
    )
    network = read_network(module, preprocessing)
    state = {"body.weight": torch.full((1, 1, 1, 1), 0.01), "head.weight": torch.ones(2, 4)}
    first, second = (affine_maps(network, state | {"head.weight": w}) for w in (torch.ones(2, 4), torch.zeros(2, 4)))
    pair = pair_of(network, first, second)
    observed = observe(pair, torch.zeros(1, 1, 2, 2))
    worst = worst_case(pair, difference_norms(network, first, second), max_image_norm(preprocessing))
    assert observed.changes[-1, 0] == pytest.approx(4 * 2**0.5)
    assert worst.changes[-1] >= observed.changes[-1, 0]
    assert (worst.sizes_first >= observed.sizes_first[:, 0]).all()


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "product": (lambda self, x: x * torch.sigmoid(x), "mul at cases.product (of two tensors)"),
    "quotient": (lambda self, x: x / (1 + x), "div at cases.quotient (of two tensors)"),
    "floor": (lambda self, x: torch.div(x, 2, rounding_mode="floor"), "div at cases.floor (it rounds)"),
    "by_zero": (lambda self, x: x / 0.0, "div at cases.by_zero (it divides by zero)"),
    "infinite": (lambda self, x: x * float("inf"), "mul at cases.infinite (of the number inf)"),
    "alpha": (lambda self, x: torch.add(x, x, alpha=float("nan")), "add at cases.alpha (of the number nan)"),
    "broadcast": (lambda self, x: x + x.mean(1, keepdim=True), "add at cases.broadcast (it broadcasts"),
    "parameter": (lambda self, x: x - self.bias, "sub at cases.parameter (of two tensors)"),
    "constant": (lambda self, x: torch.cat([x, torch.ones_like(x)], 1), "cases.constant"),
    "batch_mean": (lambda self, x: x - x.mean(0, keepdim=True), "mean at cases.batch_mean (it mixes images)"),
    "whole_mean": (lambda self, x: x + x.mean(), "mean at cases.whole_mean"),
    "mean_dtype": (
        lambda self, x: x.mean(1, dtype=torch.float64),
        "mean at cases.mean_dtype (it changes the data type)",
    ),
    "bits": (lambda self, x: x.view(torch.int32), "view at cases.bits (it reinterprets the bits"),
    "double_precision": (lambda self, x: x.double(), "cases.double_precision"),
    "reflect": (lambda self, x: F.pad(x, (1, 1, 1, 1), "reflect"), "pad"),
    "pad_ones": (lambda self, x: F.pad(x, (1, 1), value=1.0), "cases.pad_ones (other than with zeros)"),
    # Unbounded slopes, or steps.
    "square_root": (lambda self, x: x.sqrt(), "sqrt"),
    "power": (lambda self, x: x**3, "pow"),
    "shrink": (lambda self, x: F.hardshrink(x), "where at cases.shrink"),
    "upsample": (lambda self, x: F.interpolate(x, scale_factor=2), "upsample"),
    "softmax": (lambda self, x: F.softmax(x, 1), "softmax"),
    "layer_norm": (lambda self, x: F.layer_norm(x, x.shape[1:]), "layer_norm"),
    "matmul": (lambda self, x: x @ x.transpose(2, 3), "matmul"),
    "computed": (
        lambda self, x: F.conv2d(x, self.conv.weight * 2),
        "conv2d at cases.computed (its weight is computed)",
    ),
    "transposed": (lambda self, x: self.transposed(x), "conv_transpose2d"),
    "channels_are_images": (
        lambda self, x: F.conv2d(x[:, 0], self.two_channels),
        "conv2d at cases.channels_are_images (it mixes images)",
    ),
    "features_are_images": (
        lambda self, x: F.linear(x.mean((1, 2, 3)), self.two_by_two),
        "linear at cases.features_are_images (it mixes images)",
    ),
    "batch_statistics": (lambda self, x: self.batch(x), "cases.batch_statistics"),
    "random": (lambda self, x: F.dropout(x, 0.5, training=True), "cases.random"),
    "permute": (lambda self, x: x.permute(1, 0, 2, 3), "permute at cases.permute (it mixes images)"),
    "transpose": (lambda self, x: x.transpose(0, 1), "transpose at cases.transpose (it mixes images)"),
    "flip": (lambda self, x: x.flip(0), "flip at cases.flip (it mixes images)"),
    "cat": (lambda self, x: torch.cat([x, x]), "cat at cases.cat (it mixes images)"),
    "one_image": (lambda self, x: x[:1], "slice at cases.one_image (it mixes images)"),
    "select": (lambda self, x: x[0], "select at cases.select (it mixes images)"),
    "split": (lambda self, x: x.split(1)[0], "cases.split (it mixes images)"),
    "merged": (lambda self, x: x.flatten(0, 1), "view at cases.merged (it mixes images)"),
    "even_same": (
        lambda self, x: F.conv2d(x, self.even, padding="same"),
        "cases.even_same (its padding is not the same on both sides)",
    ),
    "indices": (lambda self, x: F.max_pool2d(x, 2, return_indices=True)[0], "max_pool2d_with_indices"),
    "assignment": (lambda self, x: _with_zero_channel(x), "cases.assignment"),
    "unsaved": (
        lambda self, x: F.batch_norm(x, self.unsaved, self.unsaved),
        "cases.unsaved (its weight is not part of the state dict)",
    ),
}


def _with_zero_channel(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, 0] = 0
    return x


class Refused(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.conv, self.transposed = nn.Conv2d(3, 3, 1), nn.ConvTranspose2d(3, 3, 2)
        self.batch = nn.BatchNorm2d(3, track_running_stats=False)
        self.bias = nn.Parameter(torch.ones(3, 4, 4))
        self.two_channels = nn.Parameter(torch.ones(2, 2, 1, 1))
        self.two_by_two = nn.Parameter(torch.ones(2, 2))
        self.even = nn.Parameter(torch.ones(3, 3, 2, 2))
        self.register_buffer("unsaved", torch.ones(3), persistent=False)

    def forward(self, x: torch.Tensor) -> Any:
        return REFUSED[self.name][0](self, x)


class AllRefused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cases = nn.ModuleDict({name: Refused(name) for name in REFUSED})

    def forward(self, x: torch.Tensor) -> Any:
        return tuple(refused(x) for refused in self.cases.values())


@pytest.fixture(scope="module")
def refusals() -> list[str]:
    """What the reader says of all refused uses, exported at once."""
    program = export_aten(
        AllRefused(), Preprocessing(3, 4, 4, 0, "bilinear", (0.0,) * 3, (1.0,) * 3), whole_layers=True
    )
    reader = _Reader(program)
    for node in program.graph.nodes:
        reader.read(node)
    return reader.uncovered


@pytest.mark.parametrize("name", REFUSED)
def test_uses_without_a_bound_are_refused_by_name(name: str, refusals: list[str]) -> None:
    said = [text for text in refusals if f"cases.{name}" in text]
    assert any(REFUSED[name][1] in text for text in said), said


def test_more_than_one_output_is_refused(refusals: list[str]) -> None:
    assert f"{len(REFUSED)} outputs instead of one" in refusals


def test_results_in_a_given_tensor_are_read_or_refused() -> None:
    """`out=` never reaches the graph unnoticed."""
    module = Net(lambda self, x: torch.add(x, x, alpha=3, out=torch.empty_like(x)))
    program = export_aten(module, Preprocessing(1, 2, 2, 0, "bilinear", (0.0,), (1.0,)), whole_layers=True)
    reader = _Reader(program)
    for node in program.graph.nodes:
        reader.read(node)
    x = torch.randn(4, 1, 2, 2, dtype=torch.float64)
    if not reader.uncovered:
        torch.testing.assert_close(computed(reader.network(), {}, x), 4 * x)
