"""Every operator with uncommon arguments (keywords, swapped operands, alpha, in place, out): what moves changes nothing.

A network has a branch for each case: a convolution, the case, and a layer that reads every position of the result, so that
one export covers many cases. All groups that can move are shuffled at once, in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from maskplan.pipeline.permutation.groups import find_groups
from tests.support.moving_nets import PREPROCESSING, drawn, moved
from tests.support.operator_cases import CASES, Factory, Function, aten, of_one, of_two, with_layer

SIZE = 8


def _out(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    result = torch.empty_like(x)
    torch.sub(x, y, alpha=2, out=result)
    return result


def _square(function: Any) -> Factory:
    """A function of the input as (N, C, H*W) and of a second one."""
    return of_two(lambda x, y: function(x.flatten(2), y.flatten(2)).unsqueeze(3))


MORE: dict[str, Factory] = {
    "sub, out": of_two(_out),
    "div, of two": of_two(lambda x, y: x / (y * y + 1)),
    "div, floor": of_two(lambda x, y: torch.div(other=y * y + 1, input=x * 9, rounding_mode="floor") + x),
    "div, trunc": of_two(lambda x, y: torch.div(9 * x, y * y + 1, rounding_mode="trunc") + y),
    "remainder": of_two(lambda x, y: torch.remainder(x, y * y + 1)),
    "pow": of_two(lambda x, y: torch.pow(exponent=y, input=x * x + 1)),
    "atan2": of_two(lambda x, y: torch.atan2(other=x, input=y)),
    "where": of_two(lambda x, y: torch.where(y > 0, 1.5, x)),
    "clamp": of_two(lambda x, y: torch.clamp(x, max=y, min=y - 0.3)),
    "lerp": of_two(lambda x, y: torch.lerp(y, x, x * 0.3)),
    "addcmul": of_two(lambda x, y: torch.addcmul(x, y, x, value=-0.3)),
    "addcdiv": of_two(lambda x, y: torch.addcdiv(y, x, x * x + 1, value=2)),
    "maximum": of_two(lambda x, y: torch.max(x, y) - torch.min(input=y, other=x * 2)),
    "glu": of_one(lambda x: F.glu(x, 1)),
    "masked_fill": of_two(lambda x, y: x.masked_fill(y > 0, -1.0)),
    "prelu": with_layer(lambda c, h, w: nn.PReLU(c), lambda layer, x: layer(x)),
    "prelu, overload": with_layer(lambda c, h, w: nn.PReLU(c), lambda layer, x: aten.prelu(x, layer.weight)),
    "celu": of_one(lambda x: F.celu(x, alpha=0.3)),
    "softplus": of_one(lambda x: F.softplus(x, beta=2, threshold=1)),
    "sum, by keyword": of_one(lambda x: x * torch.sum(dim=(1, -1), input=x, keepdim=True)),
    "sum, of all": of_one(lambda x: x * x.sum()),
    "amax": of_one(lambda x: x - torch.amax(x, dim=-3, keepdim=True)),
    "max, channels": of_one(lambda x: x - x.max(1, keepdim=True)[0]),
    "max, index": of_one(lambda x: x + x.max(1, keepdim=True)[1]),
    "min, rows, index": of_one(lambda x: x + x.min(2, keepdim=True).indices),
    "argmax": of_one(lambda x: x * torch.argmax(x, dim=1, keepdim=True)),
    "var_mean": of_one(lambda x: x * torch.var_mean(x, (1, 2), correction=0, keepdim=True)[0]),
    "std, of all": of_one(lambda x: x / (1 + x.std())),
    "std, without keepdim": of_one(lambda x: x + torch.std(x, 2, unbiased=False).unsqueeze(2)),
    "logsumexp": of_one(lambda x: x - torch.logsumexp(x, dim=[1], keepdim=True)),
    "norm": of_one(lambda x: F.normalize(x, p=1.0, dim=1)),
    "norm, of all": of_one(lambda x: x / torch.linalg.vector_norm(x)),
    "prod": of_one(lambda x: x * torch.prod(torch.cos(x), dim=1, keepdim=True)),
    "softmax": of_one(lambda x: torch.softmax(dim=-3, input=x)),
    "log_softmax, columns": of_one(lambda x: F.log_softmax(x, dim=3)),
    "group_norm": with_layer(lambda c, h, w: nn.GroupNorm(2, c), lambda layer, x: layer(x)),
    "group_norm, by keyword": of_one(lambda x: F.group_norm(num_groups=4, input=x, eps=0.1)),
    "layer_norm": of_one(lambda x: F.layer_norm(x, x.shape[1:])),
    "layer_norm, rows": with_layer(lambda c, h, w: nn.LayerNorm([h, w]), lambda layer, x: layer(x)),
    "instance_norm": of_one(lambda x: F.instance_norm(x, eps=0.2)),
    "batch_norm, of the batch": of_one(lambda x: F.batch_norm(x, None, None, training=True)),
    "batch_norm, of flattened channels": of_one(
        lambda x: F.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2)
    ),
    "bmm": _square(lambda x, y: torch.bmm(x, y.transpose(1, 2))),
    "bmm, swapped": _square(lambda x, y: torch.bmm(mat2=y, input=x.transpose(1, 2))),
    "baddbmm": _square(lambda x, y: torch.baddbmm(x[:, :, :8], x, y.transpose(1, 2), beta=-0.3, alpha=2)),
    "baddbmm, by keyword": _square(
        lambda x, y: torch.baddbmm(batch2=x, batch1=y.transpose(1, 2), input=x[:, :1].transpose(1, 2), beta=2)
    ),
    "einsum": _square(lambda x, y: torch.einsum("ncp,ncq->npq", x, y)),
    "matmul, of one": _square(lambda x, y: (x @ y.mean((0, 1))).unsqueeze(2)),
    "repeat": of_one(lambda x: x.repeat(1, 2, 1, 3)),
    "repeat_interleave": of_one(lambda x: torch.repeat_interleave(x, 2, dim=1)),
    "expand": of_one(lambda x: x.mean(1, keepdim=True).expand(-1, 5, -1, -1)),
    "stack": of_two(lambda x, y: torch.stack([y, x], dim=2).flatten(1, 2)),
    "hstack": of_two(lambda x, y: torch.hstack([x, y])),
    "tile, of more dimensions": of_one(lambda x: x.tile(2, 1, 1, 1, 1)[0]),
    "movedim": of_one(lambda x: x.movedim(source=1, destination=-1)),
    "roll": of_one(lambda x: torch.roll(x, dims=(1, 2), shifts=(1, 3))),
    "roll, rows": of_one(lambda x: torch.roll(x, 1, 2)),
    "rot90": of_one(lambda x: torch.rot90(x, 1, (1, 2))),
    "index": of_one(lambda x: x[:, :, torch.tensor([3, 1, 0])]),
    "index, channels": of_one(lambda x: x[:, torch.tensor([3, 1, 0])]),
    "index_select, negative": of_one(lambda x: x.index_select(dim=-3, index=torch.tensor([2, 2, 5]))),
    "gather": of_one(lambda x: torch.gather(x, 1, torch.zeros_like(x).long() + 1)),
    "cumsum": of_one(lambda x: x.cumsum(1)),
    "sort": of_one(lambda x: x.sort(1)[0]),
    "topk": of_one(lambda x: x.topk(2, dim=1)[0]),
    "tril": of_one(lambda x: x.tril(1)),
    "unfold": of_one(lambda x: F.unfold(x, 2).unsqueeze(3)),
    "pixel_shuffle": of_one(lambda x: F.pixel_shuffle(x, 2)),
    "pixel_unshuffle": of_one(lambda x: F.pixel_unshuffle(x, 2)),
    "channel_shuffle": of_one(lambda x: F.channel_shuffle(x, 4)),
    "view, as integers": of_one(lambda x: x + x.float().view(torch.int32).remainder(2)),
    "view, as shorter": of_one(lambda x: x + x.float().view(torch.int16).sum(3, keepdim=True).remainder(2)),
    "complex": of_one(lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(3, (4, 2)).float())).flatten(3)),
    "max_pool1d": of_one(lambda x: F.max_pool1d(x.flatten(2), 3, 2).unsqueeze(3)),
    "max_pool2d, indices": of_one(lambda x: F.max_pool2d(x, 2, return_indices=True)[1].to(x.dtype)),
    "max_pool3d, over channels": of_one(lambda x: F.max_pool3d(x, 2, 1)),
    "avg_pool3d, over channels": of_one(lambda x: F.avg_pool3d(x, (3, 1, 1), 1)),
    "lp_pool2d": of_one(lambda x: F.lp_pool2d(x.abs() + 0.1, 2.0, 2)),
    "interpolate": of_one(lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear", align_corners=True)),
    "interpolate, nearest": of_one(lambda x: F.interpolate(size=(5, 7), input=x)),
    "pad, reflect": of_one(lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect")),
    "pad, circular": of_one(lambda x: F.pad(x, (1, 2, 0, 1), mode="circular")),
    "conv1d": with_layer(lambda c, h, w: nn.Conv1d(c, 6, 3), lambda layer, x: layer(x.flatten(2)).unsqueeze(3)),
    "conv1d, one image": with_layer(
        lambda c, h, w: nn.Conv1d(c, 6, 3), lambda layer, x: layer(x[0].flatten(1)).expand(2, -1, -1).unsqueeze(3)
    ),
    "conv3d": with_layer(lambda c, h, w: nn.Conv3d(c, 6, (1, 3, 3)), lambda layer, x: layer(x.unsqueeze(2)).squeeze(2)),
    "conv3d, grouped": with_layer(
        lambda c, h, w: nn.Conv3d(c, 6, 1, groups=2), lambda layer, x: layer(x.unsqueeze(2)).squeeze(2)
    ),
    "conv3d, along channels": with_layer(
        lambda c, h, w: nn.Conv3d(1, 2, 3, padding=1), lambda layer, x: layer(x.unsqueeze(1)).flatten(1, 2)
    ),
    "conv_transpose1d": with_layer(
        lambda c, h, w: nn.ConvTranspose1d(c, 6, 2), lambda layer, x: layer(x.flatten(2)).unsqueeze(3)
    ),
    "conv_transpose2d, by keyword": with_layer(
        lambda c, h, w: nn.ConvTranspose2d(c, 6, 2),
        lambda layer, x: F.conv_transpose2d(weight=layer.weight, bias=layer.bias, stride=2, input=x),
    ),
    "conv2d, of two": of_two(lambda x, y: F.conv2d(x, weight=y[:1, :, :3, :3])),
    "bilinear": with_layer(
        lambda c, h, w: nn.Bilinear(c, c, 6),
        lambda layer, x: layer(x.movedim(1, -1).contiguous(), x.movedim(1, -1).contiguous()).movedim(-1, 1),
    ),
    "multi-head attention": with_layer(
        lambda c, h, w: nn.MultiheadAttention(c, 2, batch_first=True),
        lambda layer, x: layer(*[x.flatten(2).transpose(1, 2)] * 3, need_weights=False)[0].transpose(1, 2).unsqueeze(3),
    ),
    "gru": with_layer(
        lambda c, h, w: nn.GRU(c, 5, batch_first=True),
        lambda layer, x: layer(x[:, :, 0].transpose(1, 2))[0].unsqueeze(3),
    ),
}
# Cases whose channels must be free to move, so that the test does not pass by pinning everything.
ELEMENTWISE = (
    "add, alpha", "add, by keyword", "sub, in place", "rsub", "rsub, alpha", "sub, out", "div, of two", "div, floor",
    "div, trunc", "remainder", "pow", "atan2", "where", "clamp", "lerp", "addcmul", "maximum", "masked_fill", "prelu",
    "prelu, overload", "hardtanh", "celu", "softmax", "max, channels", "norm", "conv1d", "conv3d", "conv_transpose1d",
    "var_mean", "logsumexp", "conv2d, by keyword", "batch_norm", "max_pool2d", "roll, rows", "interpolate",
)  # fmt: skip
ALL = {**CASES, **MORE}
BATCHES = [tuple(list(ALL)[first::5]) for first in range(5)]


class Branches(nn.Module):
    """A convolution, a case and a layer that reads the whole result, for each case."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.stems, self.cases, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for name in names:
            stem, case = nn.Conv2d(3, SIZE, 1), ALL[name](SIZE, SIZE, SIZE)
            with torch.no_grad():
                made = case.eval()(stem(torch.randn(2, 3, SIZE, SIZE)))
            self.stems.append(stem)
            self.cases.append(case)
            self.heads.append(nn.Linear(made[0].numel(), 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.adaptive_avg_pool2d(x, SIZE)
        branches = zip(self.stems, self.cases, self.heads, strict=True)
        return torch.stack([head(case(stem(x)).to(x).flatten(1)) for stem, case, head in branches], 1)


@pytest.mark.parametrize(
    "names",
    [pytest.param(names, id=f"part {i}", marks=pytest.mark.slow if i > 1 else ()) for i, names in enumerate(BATCHES)],
)
def test_groups_of_each_operator_leave_its_outputs_unchanged(names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    module = drawn(Branches(names))
    axes = find_groups(module, PREPROCESSING)
    movable = {group.name.split(".")[1].split("#")[0] for group in axes.movable if group.name.startswith("stems")}
    pinned = [name for i, name in enumerate(names) if str(i) not in movable and name in ELEMENTWISE]
    assert not pinned
    if moved(module, axes.movable, PREPROCESSING) > 1e-9:
        wrong = {
            (group.name, *(names[int(p.tensor.split(".")[1])] for p in group.places))
            for group in axes.movable
            if moved(module, (group,), PREPROCESSING) > 1e-9
        }
        pytest.fail(f"misread: {wrong}")


def test_every_case_is_in_a_batch() -> None:
    assert sorted(name for names in BATCHES for name in names) == sorted(ALL)
    assert set(ELEMENTWISE) <= set(ALL)
    assert isinstance(MORE["sub, out"](SIZE, SIZE, SIZE), Function)
