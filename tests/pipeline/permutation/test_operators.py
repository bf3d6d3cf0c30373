"""What operators do to channels: which move through them together, and which they hold, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from maskplan.pipeline.permutation.groups import find_groups
from tests.support.moving_nets import (
    HOW,
    Net,
    conv,
    drawn,
    head,
    moved,
    pooled,
    reasons,
    sizes,
    stays,
)


def beside(self: Any, x: torch.Tensor) -> torch.Tensor:
    one = self.one(x)
    return self.head(torch.cat([one, self.two(x), torch.zeros_like(one), one[:, :, :0]], 2).mean((2, 3)))  # type: ignore[no-any-return]


def unfolded(self: Any, x: torch.Tensor) -> torch.Tensor:
    return pooled(self, self.two(functional.pixel_shuffle(self.one(x), 2)))


def test_an_unknown_operator_holds_its_channels_only() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, self.two(functional.relu(self.one(x))).cumsum(1))

    axes = stays(drawn(Net(forward, one=conv(3, 8), two=conv(8, 12), head=head(12))))
    assert sizes(axes) == {"one": 8}
    assert reasons(axes) == {"two": "the operator cumsum is not known", "head": "it meets values that cannot move"}


def test_a_change_of_type_holds_nothing() -> None:
    """Export asserts the type that it starts from."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, self.one(x).double().to(x.dtype))

    assert sizes(find_groups(drawn(Net(forward, one=conv(3, 8), head=head(8))), HOW)) == {"one": 8}


@pytest.mark.parametrize(
    "constant",
    [
        lambda: torch.linspace(1, 2, 8).view(1, -1, 1),
        lambda: torch.linspace(1, 2, 8)[:, None].expand(8, 256),
        lambda: torch.linspace(1, 2, 8).view(1, -1, 1) + torch.ones(1, 8, 256),
        lambda: torch.ones(2, 1, 1) * torch.linspace(1, 2, 8)[:, None],
        lambda: torch.linspace(1, 2, 8).expand(256, 8).t(),
    ],
)
def test_channels_that_meet_constants_are_held(constant: Callable[[], torch.Tensor]) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.head((self.one(x).flatten(2) * constant()).mean(2))  # type: ignore[no-any-return]

    axes = find_groups(drawn(Net(forward, one=conv(3, 8), head=head(8))), HOW)
    assert not axes.movable
    assert reasons(axes) == {"one": "it meets values that cannot move"}


@pytest.mark.parametrize(
    "constant",
    [
        lambda: torch.ones(8),
        lambda: torch.zeros(16, 16, 8),
        lambda: torch.tensor([1.5] * 8),
        lambda: torch.ones(8, 16).t().contiguous(),
        lambda: torch.linspace(1, 2, 16)[:, None] * torch.ones(8),
        lambda: torch.linspace(1, 2, 16).view(1, 16, 1, 1).expand(1, 16, 1, 8),
    ],
)
def test_channels_that_meet_one_value_everywhere_move(constant: Callable[[], torch.Tensor]) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.head((self.one(x).permute(0, 2, 3, 1) * constant()).mean((1, 2)))  # type: ignore[no-any-return]

    assert sizes(find_groups(drawn(Net(forward, one=conv(3, 8), head=head(8))), HOW)) == {"one": 8}


@pytest.mark.parametrize(
    "position", [lambda x: x.max(1, keepdim=True)[1], lambda x: x.argmin(1, keepdim=True), lambda x: x.argmax()]
)
def test_positions_of_channels_as_an_output_hold_them(position: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        return pooled(self, x * position(x))

    axes = find_groups(drawn(Net(forward, one=conv(3, 8), head=head(8))), HOW)
    assert reasons(axes) == {"one": "its position is an output"}


def test_a_mean_of_all_holds_nothing() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        return pooled(self, x * x.mean())

    assert sizes(stays(drawn(Net(forward, one=conv(3, 8), head=head(8))))) == {"one": 8}


def test_channels_that_say_where_to_look_stay() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        grid = torch.tanh(self.two(x)).permute(0, 2, 3, 1)
        return pooled(self, functional.grid_sample(self.one(x), grid, align_corners=False))

    axes = stays(drawn(Net(forward, one=conv(3, 8), two=conv(3, 2), head=head(8))))
    assert sizes(axes) == {"one": 8}
    assert reasons(axes) == {"two": "it tells positions"}


@pytest.mark.parametrize(
    ("look", "reason"),
    [
        (lambda self: self.table[self.numbers], "it tells positions"),
        (
            lambda self: torch.zeros(16, 16).index_put((self.numbers, self.numbers.t()), self.table[0].float()),
            "the operator index_put is not known",
        ),
    ],
)
def test_numbers_of_positions_stay(look: Callable[[Any], torch.Tensor], reason: str) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, self.one(x) * (look(self).to(x) + 1))

    net = Net(forward, one=conv(3, 8), head=head(8))
    net.register_buffer("numbers", torch.arange(256).view(16, 16) % 7)
    net.register_buffer("table", torch.linspace(1, 2, 7))
    axes = stays(drawn(net))
    assert sizes(axes) == {"one": 8}
    assert reasons(axes) == {"numbers": reason}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: functional.avg_pool2d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2), "positions are pooled"),
        (lambda x: functional.pad(x, (0, 0, 0, 0, -1, 1)), "padded or cropped in parts"),
        (lambda x: functional.pad(x.unflatten(1, (2, 4)), (0, 0, 0, 0, 1, 0)).flatten(1, 2)[:, 1:9], "padded or crop"),
        (lambda x: torch.cat([x.unflatten(1, (2, 4))] * 2, 2).flatten(1, 2)[:, 4:12], "concatenated in parts"),
        (lambda x: torch.cat([x[:, :4], x.cumsum(1)[:, :4]], 1), "the operator cumsum is not known"),
    ],
)
def test_channels_that_are_taken_in_parts_stay(change: Callable[[torch.Tensor], torch.Tensor], reason: str) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, self.two(change(self.one(x))))

    axes = stays(drawn(Net(forward, one=conv(3, 8), two=conv(8, 6), head=head(6))))
    assert sizes(axes) == {"two": 6}
    assert reason in reasons(axes)["one"]


@pytest.mark.parametrize(
    ("forward", "two", "found"),
    [
        (beside, conv(3, 8), {"one": 8}),
        (lambda self, x: pooled(self, self.one(x) + torch.cat([x[:, :0], self.two(x)], 1)), conv(3, 8), {"one": 8}),
        (lambda self, x: self.head((self.one(x)[:, ::2] * self.two(x)).mean((2, 3))), conv(3, 4), {"one": 4}),
    ],
)
def test_channels_that_meet_move_together(forward: Any, two: nn.Module, found: dict[str, int]) -> None:
    module = drawn(Net(forward, one=conv(3, 8), two=two, head=head(found["one"])))
    axes = find_groups(module, HOW)
    assert moved(module, axes.movable, HOW) < 1e-9
    assert any("two.weight" in {p.tensor for p in g.places} and g.size == found["one"] for g in axes.movable)


class Computed(nn.Module):
    """A convolution whose filters are made from parameters on the way."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], weight: Callable[[Any], torch.Tensor], groups: int) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.bias = nn.Parameter(torch.randn(8))
        self._weight, self._groups = weight, groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, self._weight(self), self.bias, padding=1, groups=self._groups)


COMPUTED: dict[str, tuple[dict[str, tuple[int, ...]], Callable[[Any], torch.Tensor], int, dict[str, int]]] = {
    "one filter for each channel": ({"w": (1, 1, 3, 3)}, lambda m: m.w.expand(8, 1, 3, 3), 8, {"one": 8, "three": 4}),
    "an even filter": ({}, lambda m: torch.ones(8, 1, 3, 3).to(m.bias), 8, {"one": 8, "three": 4}),
    "unknown filters": ({"w": (8, 1, 3, 3)}, lambda m: m.w.cumsum(0), 8, {"three": 4}),
    "filters that are less their mean": (
        {"w": (8, 1, 3, 3)},
        lambda m: m.w - m.w.mean(0, keepdim=True),
        8,
        {"one": 8, "three": 4},
    ),
    "filters of rows of a matrix": ({"w": (64, 9)}, lambda m: m.w.view(8, 8, 3, 3), 1, {"three": 4}),
    "filters with weighted columns": (
        {"w": (8, 8, 3, 3), "rows": (1, 3)},
        lambda m: m.w * m.rows,
        1,
        {"one": 8, "two.w": 8, "three": 4},
    ),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_filters_that_are_computed_hold_what_does_not_follow(name: str) -> None:
    torch.manual_seed(0)
    shapes, weight, groups, found = COMPUTED[name]

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, self.three(functional.relu(self.two(functional.relu(self.one(x))))))

    two = Computed(shapes, weight, groups)
    assert sizes(stays(drawn(Net(forward, one=conv(3, 8), two=two, three=conv(8, 4), head=head(4))))) == found


def test_a_blurring_filter_that_checkpoints_do_not_hold_lets_channels_pass() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, functional.conv2d(self.one(x), self.blur, groups=8))

    net = Net(forward, one=conv(3, 8), head=head(8))
    net.register_buffer("blur", torch.tensor([1.0, 2, 1]).expand(8, 1, 3, 3).clone(), persistent=False)
    assert sizes(stays(drawn(net))) == {"one": 8}


def test_channels_that_nothing_is_known_of_hold_what_filters_them() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, self.two(self.one(x).cumsum(1)))

    axes = stays(drawn(Net(forward, one=conv(3, 8), two=conv(8, 8, 3, groups=8), three=conv(8, 4), head=head(8))))
    assert "two" not in sizes(axes)
    assert reasons(axes)["two"] == "it meets values that cannot move"


@pytest.mark.parametrize(("groups", "made"), [(8, 8), (2, 2)])
def test_a_transposed_depthwise_convolution_lets_channels_pass(groups: int, made: int) -> None:
    """Filters of one channel each do so, if they also read one each."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, self.three(self.two(self.one(x))))

    two = nn.ConvTranspose2d(8, made, 2, 2, groups=groups)
    axes = stays(drawn(Net(forward, one=conv(3, 8), two=two, three=conv(made, 4), head=head(4))))
    assert sizes(axes) == ({"one": 8, "three": 4} if groups == 8 else {"three": 4})


def test_rows_of_channels_that_are_multiplied_stay() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        rows = functional.relu(self.one(x)).mean((2, 3)).unflatten(1, (2, 4))
        return self.head((rows @ self.mix).flatten(1))  # type: ignore[no-any-return]

    net = Net(forward, one=conv(3, 8), head=head(8))
    net.register_parameter("mix", nn.Parameter(torch.randn(4, 4)))
    axes = find_groups(drawn(net), HOW)
    assert moved(net, axes.movable, HOW) < 1e-9
    assert reasons(axes)["one"] == "a product takes it in parts"


def test_matrices_for_each_channel_hold_them() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, torch.einsum("nchw,cwv->nchv", self.one(x), self.mix))

    net = Net(forward, one=conv(3, 8), two=conv(3, 8), head=head(8))
    net.register_parameter("mix", nn.Parameter(torch.randn(8, 16, 16)))
    axes = find_groups(drawn(net), HOW)
    assert moved(net, axes.movable, HOW) < 1e-9
    assert reasons(axes)["one"] == "a product takes it in parts"


def test_a_buffer_that_checkpoints_do_not_hold_fixes_its_channels() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, self.one(x) * self.factor)

    net = Net(forward, one=conv(3, 8), head=head(8))
    net.register_buffer("factor", torch.linspace(1, 2, 8).view(1, -1, 1, 1), persistent=False)
    assert reasons(find_groups(drawn(net), HOW)) == {"one": "a tensor that checkpoints do not hold goes with it"}


def test_a_channel_used_alone_stays() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        return pooled(self, x * torch.sigmoid(x[:, 2:3]))

    axes = stays(drawn(Net(forward, one=conv(3, 8), head=head(8))))
    assert sizes(axes) == {"one": 7}
    assert reasons(axes) == {"one": "it is used alone"}


def test_one_layer_under_two_names_moves_under_both() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, self.again(functional.relu(self.one(x))) + self.two(x))

    shared = conv(8, 8)
    net = Net(forward, one=conv(3, 8), first=shared, again=shared, two=conv(3, 8), head=head(8))
    axes = stays(drawn(net))
    tensors = {place.tensor for group in axes.movable for place in group.places}
    assert {"first.weight", "again.weight"} <= tensors


def test_a_layer_used_twice_in_a_row_ties_its_two_sides() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, self.one(functional.relu(self.one(self.stem(x)))))

    assert sizes(stays(drawn(Net(forward, stem=conv(3, 8), one=conv(8, 8), head=head(8))))) == {"stem": 8}


def test_weights_that_are_standardized_before_use_move() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = self.weight.view(1, self.out_channels, -1)
            weight = functional.batch_norm(flat, None, None, training=True).view_as(self.weight)
            return functional.conv2d(x, weight, self.bias, padding=1)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, self.two(functional.relu(self.one(x))))

    net = Net(forward, one=Standardized(3, 8, 3), two=Standardized(8, 12, 3), head=head(12))
    assert sizes(stays(drawn(net))) == {"one": 8, "two": 12}


def outer(self: Any, x: torch.Tensor) -> torch.Tensor:
    one, two = (layer(x).flatten(2) for layer in (self.one, self.two))
    return self.head((one @ two.transpose(1, 2)).flatten(1))  # type: ignore[no-any-return]


def test_of_a_flattened_outer_product_one_side_moves() -> None:
    """Each of its columns is a pair of channels."""
    axes = stays(drawn(Net(outer, one=conv(3, 4), two=conv(3, 6), head=head(24))))
    assert sizes(axes) == {"one": 4}
    assert reasons(axes) == {"two": "it meets channels that lie otherwise"}


def test_an_outer_product_of_channels_with_themselves_holds_them() -> None:
    one = conv(3, 4)
    axes = find_groups(drawn(Net(outer, one=one, two=one, head=head(16))), HOW)
    assert not axes.movable
    assert set(reasons(axes).values()) == {"it meets channels that lie otherwise"}


def test_a_transposed_grouped_convolution_holds_what_it_reads_and_makes() -> None:
    """Its weight is (C, K / groups), and its bias K long."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, self.three(self.two(self.one(x))))

    two = nn.ConvTranspose2d(8, 12, 2, 2, groups=2)
    axes = stays(drawn(Net(forward, one=conv(3, 8), two=two, three=conv(12, 4), head=head(4))))
    assert sizes(axes) == {"three": 4}
    assert reasons(axes)["one"] == "a grouped convolution reads it"
    assert reasons(axes)["two"] in ("a grouped convolution reads it", "a transposed grouped convolution makes it")
    assert reasons(axes)["three"] == "it meets values that cannot move"


def test_a_bias_added_to_channels_that_stay_stays() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        other = functional.conv2d(x, self.one.weight.cumsum(0), self.two.bias)
        return pooled(self, self.three(self.two(x)) * self.four(other))

    net = Net(forward, one=conv(3, 8), two=conv(3, 8), three=conv(8, 4), four=conv(8, 4), head=head(4))
    axes = stays(drawn(net))
    assert sizes(axes) == {"three": 4}
    assert reasons(axes)["two"] == "it meets values that cannot move"


NORMS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]] = {
    "of all channels": (lambda x: functional.group_norm(x, 1), 1),
    "of two groups": (lambda x: functional.group_norm(x, 2), 2),
    "of each row": (functional.instance_norm, 4),
    "of each layer": (lambda x: functional.layer_norm(x, (3, 256)), 4),
    "of a softmax": (lambda x: x.softmax(2), 4),
    "of a softmax in rows of rows": (lambda x: x.unflatten(1, (2, 2)).softmax(3), 4),
}


@pytest.mark.parametrize("name", NORMS)
def test_channels_along_two_dimensions_stay_where_statistics_are_taken(name: str) -> None:
    norm, parts = NORMS[name]

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, norm(self.one(x).unflatten(1, (4, 3)).flatten(3)).reshape(-1, 12, 16, 16))

    axes = stays(drawn(Net(forward, one=conv(3, 12), head=head(12))))
    assert list(sizes(axes).values()) == [12 // parts] * parts


def test_channels_that_are_summed_in_parts_stay_in_their_parts() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.head(functional.relu(self.one(x)).unflatten(1, (4, 3)).sum((2, 3, 4)))  # type: ignore[no-any-return]

    axes = stays(drawn(Net(forward, one=conv(3, 12), head=head(4))))
    assert list(sizes(axes).values()) == [3] * 4


def test_a_view_in_another_layout_holds_its_channels() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        return pooled(self, x.contiguous().as_strided(x.shape, (4096, 16, 256, 1)))

    axes = find_groups(drawn(Net(forward, one=conv(3, 16), head=head(16))), HOW)
    assert reasons(axes)["one"] == "the operator as_strided is not known"


def test_channels_pass_by_what_indices_pick() -> None:
    """Between indices, channels come behind what is picked; a table's columns come out as they are."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(8)
        between = self.one(x).unsqueeze(2)[:, :, :, rows, rows].transpose(1, 2)[:, 0]
        behind = self.two(x).permute(0, 2, 3, 1)[:, rows, rows].transpose(1, 2)
        apart = self.three(x).unsqueeze(3)[:, :, rows, :, rows].squeeze(3).permute(1, 2, 0)
        return self.head((between * behind + apart).mean(2))  # type: ignore[no-any-return]

    axes = stays(drawn(Net(forward, one=conv(3, 8), two=conv(3, 8), three=conv(3, 8), head=head(8))))
    assert sizes(axes) == {"one": 8}


def test_channels_pass_where_positions_are_rolled() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, functional.relu(torch.roll(self.one(x), (1, 2), (2, 3)) + self.two(x)))

    assert sizes(stays(drawn(Net(forward, one=conv(3, 8), two=conv(3, 8), head=head(8))))) == {"one": 8}


def test_results_of_an_unknown_operator_have_their_own_shapes() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        _, _, vectors = torch.linalg.svd(self.two.weight[:1, :, 0, 0])
        return self.head(self.one(x).mean((2, 3)) @ vectors)  # type: ignore[no-any-return]

    axes = find_groups(drawn(Net(forward, one=conv(3, 8), two=conv(8, 8), head=head(8))), HOW)
    assert "one" not in sizes(axes)
    assert reasons(axes)["one"] == "it meets values that cannot move"


@pytest.mark.parametrize(
    "pick",
    [lambda x: x[:, torch.tensor([3, 1, 0, 2])], lambda x: x.index_select(1, torch.tensor([3, 1, 0, 2]))],
)
def test_channels_that_are_picked_by_number_stay(pick: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, pick(self.one(x)))

    axes = find_groups(drawn(Net(forward, one=conv(3, 4), head=head(4))), HOW)
    assert reasons(axes) == {"one": "places are picked by number", "head": "it meets values that cannot move"}


def in_one_memory(view: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, self.again(functional.relu(self.two(functional.relu(self.one(self.stem(x)))))))

    net = Net(forward, stem=conv(3, 8), one=conv(8, 8), two=conv(8, 8), again=conv(8, 8), head=head(8))
    net.get_parameter("again.weight").data = view(net.get_parameter("one.weight").data)
    return drawn(net)


def test_parameters_in_one_memory_move_as_one() -> None:
    axes = find_groups(in_one_memory(lambda weight: weight), HOW)
    for group in axes.movable:
        own = {(place.tensor, place.axis) for place in group.places}
        assert (("one.weight", 0) in own) == (("again.weight", 0) in own)
        assert (("one.weight", 1) in own) == (("again.weight", 1) in own)
    assert sizes(axes) == {"stem": 8, "one": 8}


def test_parameters_that_lie_otherwise_in_one_memory_stay() -> None:
    axes = find_groups(in_one_memory(lambda weight: weight.transpose(0, 1)), HOW)
    assert not axes.movable
    assert set(reasons(axes).values()) == {"another tensor lies in the same memory"}


def test_pixel_shuffle_holds_what_it_takes_apart() -> None:
    axes = find_groups(drawn(Net(unfolded, one=conv(3, 16), two=conv(4, 8), head=head(8))), HOW)
    assert sizes(axes) == {"two": 8}
    assert set(reasons(axes)) == {"one", "two"}
