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
    PREPROCESSING,
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


def test_an_unsupported_operator_pins_only_its_own_channels() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, self.two(functional.relu(self.one(x))).cumsum(1))

    axes = stays(drawn(Net(forward, one=conv(3, 8), two=conv(8, 12), head=head(12))))
    assert sizes(axes) == {"one": 8}
    assert reasons(axes) == {
        "two": "the operator cumsum is not supported",
        "head": "it is combined with values that cannot move",
    }


def test_a_change_of_type_pins_nothing() -> None:
    """Export asserts the type that it starts from."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, self.one(x).double().to(x.dtype))

    assert sizes(find_groups(drawn(Net(forward, one=conv(3, 8), head=head(8))), PREPROCESSING)) == {"one": 8}


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
def test_channels_combined_with_varying_constants_are_pinned(constant: Callable[[], torch.Tensor]) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.head((self.one(x).flatten(2) * constant()).mean(2))  # type: ignore[no-any-return]

    axes = find_groups(drawn(Net(forward, one=conv(3, 8), head=head(8))), PREPROCESSING)
    assert not axes.movable
    assert reasons(axes) == {"one": "it is combined with values that cannot move"}


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
def test_channels_combined_with_a_uniform_constant_move(constant: Callable[[], torch.Tensor]) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.head((self.one(x).permute(0, 2, 3, 1) * constant()).mean((1, 2)))  # type: ignore[no-any-return]

    assert sizes(find_groups(drawn(Net(forward, one=conv(3, 8), head=head(8))), PREPROCESSING)) == {"one": 8}


@pytest.mark.parametrize(
    "position", [lambda x: x.max(1, keepdim=True)[1], lambda x: x.argmin(1, keepdim=True), lambda x: x.argmax()]
)
def test_indices_of_channels_as_a_result_pin_them(position: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        return pooled(self, x * position(x))

    axes = find_groups(drawn(Net(forward, one=conv(3, 8), head=head(8))), PREPROCESSING)
    assert reasons(axes) == {"one": "its index is a result"}


def test_a_mean_over_everything_pins_nothing() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        return pooled(self, x * x.mean())

    assert sizes(stays(drawn(Net(forward, one=conv(3, 8), head=head(8))))) == {"one": 8}


def test_channels_used_as_sampling_grid_are_pinned() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        grid = torch.tanh(self.two(x)).permute(0, 2, 3, 1)
        return pooled(self, functional.grid_sample(self.one(x), grid, align_corners=False))

    axes = stays(drawn(Net(forward, one=conv(3, 8), two=conv(3, 2), head=head(8))))
    assert sizes(axes) == {"one": 8}
    assert reasons(axes) == {"two": "it is used as an index"}


@pytest.mark.parametrize(
    ("look", "reason"),
    [
        (lambda self: self.table[self.numbers], "it is used as an index"),
        (
            lambda self: torch.zeros(16, 16).index_put((self.numbers, self.numbers.t()), self.table[0].float()),
            "the operator index_put is not supported",
        ),
    ],
)
def test_tensors_used_as_indices_are_pinned(look: Callable[[Any], torch.Tensor], reason: str) -> None:
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
        (lambda x: functional.avg_pool2d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2), "it is pooled"),
        (lambda x: functional.pad(x, (0, 0, 0, 0, -1, 1)), "padded or cropped in part"),
        (lambda x: functional.pad(x.unflatten(1, (2, 4)), (0, 0, 0, 0, 1, 0)).flatten(1, 2)[:, 1:9], "padded or crop"),
        (lambda x: torch.cat([x.unflatten(1, (2, 4))] * 2, 2).flatten(1, 2)[:, 4:12], "a concatenation splits it"),
        (lambda x: torch.cat([x[:, :4], x.cumsum(1)[:, :4]], 1), "the operator cumsum is not supported"),
    ],
)
def test_channels_of_which_parts_are_used_are_pinned(
    change: Callable[[torch.Tensor], torch.Tensor], reason: str
) -> None:
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
def test_channels_that_are_combined_move_together(forward: Any, two: nn.Module, found: dict[str, int]) -> None:
    module = drawn(Net(forward, one=conv(3, 8), two=two, head=head(found["one"])))
    axes = find_groups(module, PREPROCESSING)
    assert moved(module, axes.movable, PREPROCESSING) < 1e-9
    assert any("two.weight" in {p.tensor for p in g.places} and g.size == found["one"] for g in axes.movable)


def test_channels_split_by_a_matrix_product_are_pinned() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        rows = functional.relu(self.one(x)).mean((2, 3)).unflatten(1, (2, 4))
        return self.head((rows @ self.mix).flatten(1))  # type: ignore[no-any-return]

    net = Net(forward, one=conv(3, 8), head=head(8))
    net.register_parameter("mix", nn.Parameter(torch.randn(4, 4)))
    axes = find_groups(drawn(net), PREPROCESSING)
    assert moved(net, axes.movable, PREPROCESSING) < 1e-9
    assert reasons(axes)["one"] == "a matrix product splits it"


def test_a_matrix_per_channel_pins_the_channels() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, torch.einsum("nchw,cwv->nchv", self.one(x), self.mix))

    net = Net(forward, one=conv(3, 8), two=conv(3, 8), head=head(8))
    net.register_parameter("mix", nn.Parameter(torch.randn(8, 16, 16)))
    axes = find_groups(drawn(net), PREPROCESSING)
    assert moved(net, axes.movable, PREPROCESSING) < 1e-9
    assert reasons(axes)["one"] == "a matrix product splits it"


def test_a_non_persistent_buffer_pins_its_channels() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, self.one(x) * self.factor)

    net = Net(forward, one=conv(3, 8), head=head(8))
    net.register_buffer("factor", torch.linspace(1, 2, 8).view(1, -1, 1, 1), persistent=False)
    assert reasons(find_groups(drawn(net), PREPROCESSING)) == {
        "one": "it is tied to a tensor that checkpoints do not store"
    }


def test_a_channel_selected_individually_is_pinned() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        return pooled(self, x * torch.sigmoid(x[:, 2:3]))

    axes = stays(drawn(Net(forward, one=conv(3, 8), head=head(8))))
    assert sizes(axes) == {"one": 7}
    assert reasons(axes) == {"one": "it is selected individually"}


def test_a_layer_with_two_names_moves_under_both() -> None:
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


def outer(self: Any, x: torch.Tensor) -> torch.Tensor:
    one, two = (layer(x).flatten(2) for layer in (self.one, self.two))
    return self.head((one @ two.transpose(1, 2)).flatten(1))  # type: ignore[no-any-return]


def test_one_side_of_a_flattened_outer_product_moves() -> None:
    """Each of its columns is a pair of channels."""
    axes = stays(drawn(Net(outer, one=conv(3, 4), two=conv(3, 6), head=head(24))))
    assert sizes(axes) == {"one": 4}
    assert reasons(axes) == {"two": "it is combined with channels in a different order"}


def test_an_outer_product_of_channels_with_themselves_pins_them() -> None:
    one = conv(3, 4)
    axes = find_groups(drawn(Net(outer, one=one, two=one, head=head(16))), PREPROCESSING)
    assert not axes.movable
    assert set(reasons(axes).values()) == {"it is combined with channels in a different order"}


NORMS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]] = {
    "of all channels": (lambda x: functional.group_norm(x, 1), 1),
    "of two groups": (lambda x: functional.group_norm(x, 2), 2),
    "of each row": (functional.instance_norm, 4),
    "of each layer": (lambda x: functional.layer_norm(x, (3, 256)), 4),
    "of a softmax": (lambda x: x.softmax(2), 4),
    "of a softmax in rows of rows": (lambda x: x.unflatten(1, (2, 2)).softmax(3), 4),
}


@pytest.mark.parametrize("name", NORMS)
def test_channels_along_two_dimensions_stay_within_their_statistics(name: str) -> None:
    norm, parts = NORMS[name]

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, norm(self.one(x).unflatten(1, (4, 3)).flatten(3)).reshape(-1, 12, 16, 16))

    axes = stays(drawn(Net(forward, one=conv(3, 12), head=head(12))))
    assert list(sizes(axes).values()) == [12 // parts] * parts


def test_channels_summed_in_parts_stay_in_their_parts() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.head(functional.relu(self.one(x)).unflatten(1, (4, 3)).sum((2, 3, 4)))  # type: ignore[no-any-return]

    axes = stays(drawn(Net(forward, one=conv(3, 12), head=head(4))))
    assert list(sizes(axes).values()) == [3] * 4


def test_as_strided_with_another_layout_pins_the_channels() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        return pooled(self, x.contiguous().as_strided(x.shape, (4096, 16, 256, 1)))

    axes = find_groups(drawn(Net(forward, one=conv(3, 16), head=head(16))), PREPROCESSING)
    assert reasons(axes)["one"] == "the operator as_strided is not supported"


def test_channels_pass_through_selection_along_other_dimensions() -> None:
    """Between indices, channels come behind what is picked; a table's columns come out as they are."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(8)
        between = self.one(x).unsqueeze(2)[:, :, :, rows, rows].transpose(1, 2)[:, 0]
        behind = self.two(x).permute(0, 2, 3, 1)[:, rows, rows].transpose(1, 2)
        apart = self.three(x).unsqueeze(3)[:, :, rows, :, rows].squeeze(3).permute(1, 2, 0)
        return self.head((between * behind + apart).mean(2))  # type: ignore[no-any-return]

    axes = stays(drawn(Net(forward, one=conv(3, 8), two=conv(3, 8), three=conv(3, 8), head=head(8))))
    assert sizes(axes) == {"one": 8}


def test_channels_pass_through_a_roll_of_positions() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, functional.relu(torch.roll(self.one(x), (1, 2), (2, 3)) + self.two(x)))

    assert sizes(stays(drawn(Net(forward, one=conv(3, 8), two=conv(3, 8), head=head(8))))) == {"one": 8}


def test_results_of_an_unsupported_operator_have_their_own_shapes() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        _, _, vectors = torch.linalg.svd(self.two.weight[:1, :, 0, 0])
        return self.head(self.one(x).mean((2, 3)) @ vectors)  # type: ignore[no-any-return]

    axes = find_groups(drawn(Net(forward, one=conv(3, 8), two=conv(8, 8), head=head(8))), PREPROCESSING)
    assert "one" not in sizes(axes)
    assert reasons(axes)["one"] == "it is combined with values that cannot move"


@pytest.mark.parametrize(
    "pick",
    [lambda x: x[:, torch.tensor([3, 1, 0, 2])], lambda x: x.index_select(1, torch.tensor([3, 1, 0, 2]))],
)
def test_channels_selected_by_index_are_pinned(pick: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, pick(self.one(x)))

    axes = find_groups(drawn(Net(forward, one=conv(3, 4), head=head(4))), PREPROCESSING)
    assert reasons(axes) == {"one": "it is selected by index", "head": "it is combined with values that cannot move"}


def in_one_memory(view: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, self.again(functional.relu(self.two(functional.relu(self.one(self.stem(x)))))))

    net = Net(forward, stem=conv(3, 8), one=conv(8, 8), two=conv(8, 8), again=conv(8, 8), head=head(8))
    net.get_parameter("again.weight").data = view(net.get_parameter("one.weight").data)
    return drawn(net)


def test_parameters_that_share_memory_move_together() -> None:
    axes = find_groups(in_one_memory(lambda weight: weight), PREPROCESSING)
    for group in axes.movable:
        own = {(place.tensor, place.axis) for place in group.places}
        assert (("one.weight", 0) in own) == (("again.weight", 0) in own)
        assert (("one.weight", 1) in own) == (("again.weight", 1) in own)
    assert sizes(axes) == {"stem": 8, "one": 8}


def test_parameters_that_share_memory_in_another_layout_are_pinned() -> None:
    axes = find_groups(in_one_memory(lambda weight: weight.transpose(0, 1)), PREPROCESSING)
    assert not axes.movable
    assert set(reasons(axes).values()) == {"another tensor shares its memory in a different layout"}


def test_pixel_shuffle_pins_the_channels_it_splits() -> None:
    axes = find_groups(drawn(Net(unfolded, one=conv(3, 16), two=conv(4, 8), head=head(8))), PREPROCESSING)
    assert sizes(axes) == {"two": 8}
    assert set(reasons(axes)) == {"one", "two"}
