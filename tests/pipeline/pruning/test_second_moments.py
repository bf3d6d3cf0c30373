"""Second moments compared with PyTorch's unfolding for all kinds of convolutions, and the effect of a BatchNorm."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.dataset import Split, batches
from maskplan.pipeline.masking.layerwise import output_error, unfold_weight
from maskplan.pipeline.models.layers import trace_layers
from maskplan.pipeline.pruning import second_moments as module_under_test
from maskplan.pipeline.pruning.second_moments import MomentOptions, SecondMoments, layers_before_norm, second_moments

HOW = Preprocessing(3, 12, 10, 0, "bilinear", (0.5,) * 3, (0.25,) * 3)
ALL = MomentOptions(images=9, batch=4, positions=1000)


class Noise:
    """Nine random images."""

    labels = np.zeros(9, np.int64)

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> bytes:
        buffer = io.BytesIO()
        pixels = np.random.default_rng(index).integers(0, 256, (12, 10, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()


TRAIN = Split("train", Noise(), np.arange(9))


def net(conv: nn.Module, *, norm: bool = True) -> nn.Sequential:
    """A layer of eight input channels, and what makes a classifier of it."""
    torch.manual_seed(0)
    last = nn.BatchNorm2d(6) if norm else nn.Identity()
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), conv, last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )


def found_of(module: nn.Module, name: str = "2.weight", options: MomentOptions = ALL) -> SecondMoments:
    layers = [layer for layer in trace_layers(module, HOW)[0] if layer.name == name]
    ((_, found),) = second_moments(module, layers, HOW, TRAIN, options)
    return found


def images() -> torch.Tensor:
    ((x, _),) = batches(TRAIN, HOW, 9)
    return torch.from_numpy(x)


def rows_of(module: nn.Sequential) -> npt.NDArray[np.float64]:
    """Inputs of the third layer by `F.unfold`, whose columns are channels of taps."""
    conv = module[2]
    with torch.no_grad():
        x = module[:2](images())
    columns = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    taps = columns.reshape(len(x), 8, -1, columns.shape[-1]).permute(0, 3, 2, 1)
    return taps.reshape(-1, taps.shape[2] * 8).double().numpy()


CONVS: dict[str, Callable[[], nn.Module]] = {
    "3x3": lambda: nn.Conv2d(8, 6, 3, padding=1),
    "1x1 strided": lambda: nn.Conv2d(8, 6, 1, stride=2),
    "oblong": lambda: nn.Conv2d(8, 6, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(2, 1), bias=False),
}


@pytest.mark.parametrize("kind", CONVS)
def test_moments_are_those_of_the_unfolded_inputs(kind: str) -> None:
    module = net(CONVS[kind]())
    found, rows = found_of(module), rows_of(module)
    mean = rows.mean(axis=0)
    assert found.rows == len(rows)
    assert found.mean == pytest.approx(mean, abs=1e-5)
    assert found.about_zero == pytest.approx(rows.T @ rows / len(rows), abs=1e-4)
    assert found.about_mean == pytest.approx((rows - mean).T @ (rows - mean) / len(rows), abs=1e-4)


@pytest.mark.parametrize("padding", ["zeros", "reflect", "circular"])
def test_moments_predict_the_output_error_of_changed_weights(padding: str) -> None:
    module = net(nn.Conv2d(8, 6, 3, padding="same", padding_mode=padding))
    found = found_of(module)
    other = copy.deepcopy(module)
    difference = torch.randn(6, 8, 3, 3)
    with torch.no_grad():
        other[2].weight += difference
        changed = (other[:3](images()) - module[:3](images())).movedim(1, 0).flatten(1).double()
    assert output_error(difference.numpy(), found.about_zero) == pytest.approx(
        changed.square().mean(1).numpy(), rel=1e-3
    )
    assert output_error(difference.numpy(), found.about_mean) == pytest.approx(
        changed.var(1, correction=0).numpy(), rel=1e-3
    )
    assert unfold_weight(difference.numpy()) @ found.mean == pytest.approx(changed.mean(1).numpy(), abs=1e-3)


def test_linear_layers_have_moments_too() -> None:
    module = net(nn.Conv2d(8, 6, 3))
    found = found_of(module, "6.weight")
    with torch.no_grad():
        rows = module[:6](images()).double().numpy()
    assert found.about_zero == pytest.approx(rows.T @ rows / 9, abs=1e-5)
    assert not found.before_norm


def test_before_a_batchnorm_the_moments_are_about_the_mean() -> None:
    plain = found_of(net(nn.Conv2d(8, 6, 3), norm=False))
    normed = found_of(net(nn.Conv2d(8, 6, 3)))
    assert (plain.before_norm, normed.before_norm) == (False, True)
    assert np.array_equal(normed.effective, normed.about_mean)
    assert np.array_equal(plain.effective, plain.about_zero)


def test_a_batchnorm_counts_only_directly_after_the_layer() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.added, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.bn1, self.bn2, self.loose = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.loose.track_running_stats = False
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.bn1(self.first(x))
            x = self.bn2(x + self.added(x))
            return self.head(self.loose(self.last(x)).mean((2, 3)))

    assert layers_before_norm(Branches(), HOW) == {"first.weight"}


def test_the_module_does_not_change() -> None:
    module = net(nn.Conv2d(8, 6, 3))
    before = copy.deepcopy(module.state_dict())
    found_of(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_sampled_positions_approximate_all_positions_reproducibly() -> None:
    module = net(nn.Conv2d(8, 6, 3, padding=1))
    few = MomentOptions(images=9, batch=9, positions=30)
    whole, some = found_of(module), found_of(module, options=few)
    assert some.rows == 9 * 30 < whole.rows
    relative = np.linalg.norm(some.about_zero - whole.about_zero) / np.linalg.norm(whole.about_zero)
    assert 0 < relative < 0.25
    assert np.array_equal(some.about_mean, found_of(module, options=few).about_mean)
    other = dataclasses.replace(few, seed=1)
    assert not np.array_equal(some.about_mean, found_of(module, options=other).about_mean)


def test_a_wide_layer_samples_more_positions() -> None:
    module = net(nn.Conv2d(8, 6, 3, padding=1))
    assert found_of(module, options=MomentOptions(images=9, positions=1)).rows == 72


def test_moments_do_not_depend_on_which_layers_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    module = net(nn.Conv2d(8, 6, 3, padding=1))
    layers = trace_layers(module, HOW)[0]
    options = MomentOptions(images=9, batch=4, positions=20)
    together = list(second_moments(module, layers, HOW, TRAIN, options))
    monkeypatch.setattr(module_under_test, "_MAX_BYTES", 1)
    alone = list(second_moments(module, layers, HOW, TRAIN, options))
    assert (
        [layer.name for layer, _ in together]
        == [layer.name for layer, _ in alone]
        == ["0.weight", "2.weight", "6.weight"]
    )
    for (_, a), (_, b) in zip(together, alone, strict=True):
        assert np.array_equal(a.about_mean, b.about_mean)


def test_a_layer_that_is_not_weight_times_inputs_is_an_error() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    class Padded(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(F.pad(x, (0, 1, 0, 1)))

    with pytest.raises(InputError, match="not its weight times its inputs"):
        found_of(net(Standardized(8, 6, 3)))
    with pytest.raises(InputError, match="do not match its stride and padding"):
        found_of(net(Padded(8, 6, 3)))


def test_activations_that_are_not_finite_are_an_error() -> None:
    module = net(nn.Conv2d(8, 6, 3))
    with torch.no_grad():
        module[0].weight.fill_(3e38)
    with pytest.raises(InputError, match=r"2\.weight: its inputs contain NaN or infinity"):
        found_of(module)


def test_no_images_are_an_error() -> None:
    module = net(nn.Conv2d(8, 6, 3))
    empty = Split("train", Noise(), np.arange(0))
    with pytest.raises(InputError, match="no images to average over"):
        list(second_moments(module, trace_layers(module, HOW)[0], HOW, empty, ALL))
