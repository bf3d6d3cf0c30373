"""Modules as people have them: reparametrized, wrapped, lazy, in other types, with unusual layers and forward passes.

`SOURCE` is a Python file of factories for maskplan (`file.py:factory`) on images (3, 16, 16) of three classes. `WORKING` are
those that every command takes; `REFUSED` names a part of the message for the others.
"""

from __future__ import annotations

from collections.abc import Mapping

import odd_layers

WRAPPED = '''
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

PREPROCESSING = {"height": 16, "width": 16, "resize": 0, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


class Net(nn.Module):
    def __init__(self, conv=nn.Conv2d, classes=3):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.wide, self.last = conv(8, 12, 3, padding=1), conv(12, 16, 1)
        self.head = nn.Linear(16, classes)

    def features(self, x):
        return torch.relu(self.last(torch.relu(self.wide(torch.relu(self.bn(self.stem(x)))))))

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def changed(change, *names):
    net = Net()
    for name in names or ("wide", "last", "head"):
        change(getattr(net, name))
    return net


def plain():
    return Net()


# --- reparametrized

def weight_norm_hooks():
    return changed(nn.utils.weight_norm)


def weight_norm_of_all():
    return changed(lambda m: nn.utils.weight_norm(m, dim=None))


def weight_norm_parametrized():
    return changed(parametrizations.weight_norm)


def spectral_norm_hooks():
    return changed(nn.utils.spectral_norm)


def spectral_norm_parametrized():
    return changed(parametrizations.spectral_norm)


def orthogonal():
    return changed(parametrizations.orthogonal, "last")


def pruned():
    return changed(lambda m: prune.l1_unstructured(m, "weight", 0.5))


def pruned_globally():
    net = Net()
    prune.global_unstructured([(net.wide, "weight"), (net.last, "weight")], prune.L1Unstructured, amount=0.5)
    return net


def pruned_biases():
    return changed(lambda m: prune.random_unstructured(m, "bias", 0.5))


class Squared(nn.Module):
    def forward(self, weight):
        return weight * weight.abs()


def own_parametrization():
    return changed(lambda m: parametrize.register_parametrization(m, "weight", Squared()))


def own_hook():
    def hook(layer, inputs):
        layer.weight = layer.raw / layer.raw.norm()

    net = Net()
    net.last.raw = nn.Parameter(net.last.weight.detach().clone())
    del net.last.weight
    net.last.weight = net.last.raw.detach()
    net.last.register_forward_pre_hook(hook)
    return net


def asp():
    net = Net()
    mask = torch.zeros(12, 8, 3, 3, dtype=torch.bool)
    mask[:, ::2] = True
    net.wide.register_buffer("__weight_mma_mask", mask)
    return net


# --- computed weights

class StdConv(nn.Conv2d):
    def forward(self, x):
        std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias, self.stride, self.padding)


class StdConvSame(nn.Conv2d):
    """Pads itself, with an odd pixel at the end."""

    def forward(self, x):
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, self.bias)


class Gained(nn.Conv2d):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 0.5))

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.gain, self.bias)


class Modulated(nn.Conv2d):
    """The weight depends on the image."""

    def forward(self, x):
        return F.conv2d(x, self.weight * torch.sigmoid(x.mean()), self.bias, padding=self.padding)


def standardized():
    return Net(StdConv)


def standardized_same():
    return Net(StdConvSame)


def gained():
    return Net(Gained)


def modulated():
    return Net(Modulated)


class Functional(Net):
    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(F.conv2d(x, self.wide.weight, self.wide.bias, padding=1))
        return F.linear(F.conv2d(x, self.last.weight).mean((2, 3)), self.head.weight, self.head.bias)


class FunctionalStandardized(Net):
    def forward(self, x):
        x = torch.relu(self.wide(torch.relu(self.bn(self.stem(x)))))
        weight = self.last.weight - self.last.weight.mean((1, 2, 3), keepdim=True)
        return self.head(F.conv2d(x, weight).mean((2, 3)))


class Bare(nn.Module):
    def __init__(self, c, k, r, padding=0):
        super().__init__()
        self.weight, self.padding = nn.Parameter(torch.randn(k, c, r, r) / 8), padding

    def forward(self, x):
        return F.conv2d(x, self.weight, padding=self.padding)


def functional():
    return Functional()


def functional_standardized():
    return FunctionalStandardized()


def bare_parameters():
    return Net(Bare)


# --- wrapped and moved

class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = Net()

    def forward(self, x):
        return self.module(x)


def held_as_module():
    return Holder()


def data_parallel():
    return nn.DataParallel(Net())


def data_parallel_part():
    net = Net()
    net.wide = nn.DataParallel(net.wide)
    return net


def compiled():
    return torch.compile(Net())


def averaged():
    return torch.optim.swa_utils.AveragedModel(Net())


def channels_last():
    return Net().to(memory_format=torch.channels_last)


def tied_channels_last():
    net = Net()
    net.wide = nn.Conv2d(8, 8, 3, padding=1)
    net.again = nn.Conv2d(8, 8, 3, padding=1)
    net.last = nn.Sequential(net.again, nn.Conv2d(8, 16, 1))
    net.again.weight = net.wide.weight
    return net.to(memory_format=torch.channels_last)


def meta():
    with torch.device("meta"):
        return Net()


def scripted():
    return torch.jit.trace(Net().eval(), torch.zeros(1, 3, 16, 16))


def scripted_inside_wrapper():
    return nn.DataParallel(scripted())


def scripted_part():
    net = Net()
    net.act = torch.jit.script(nn.BatchNorm2d(8))
    return net


def quantized():
    return torch.ao.quantization.quantize_dynamic(Net(), {nn.Linear})


# --- types

def half():
    return Net().half()


def bfloat16():
    return Net().bfloat16()


def double():
    return Net().double()


class Halving(Net):
    def forward(self, x):
        return super().forward(x.half())


def halving():
    return Halving()
'''

SOURCE = WRAPPED + odd_layers.SOURCE

WORKING = (
    *("plain", "weight_norm_hooks", "weight_norm_of_all", "weight_norm_parametrized", "spectral_norm_hooks"),
    *("spectral_norm_parametrized", "orthogonal", "pruned", "pruned_globally", "pruned_biases", "own_parametrization"),
    *("own_hook", "asp", "standardized", "standardized_same", "gained", "held_as_module", "data_parallel"),
    *(
        "data_parallel_part",
        "compiled",
        "averaged",
        "channels_last",
        "tied_channels_last",
        "half",
        "bfloat16",
        "double",
    ),
    *("lazy", "sequences", "five_axes", "transposed", "reused", "attention", "unused", "circular", "zeros", "frozen"),
    *("outputs", "in_place", "plain_tensor", "functional", "functional_standardized", "bare_parameters", "volumes"),
)

REFUSED: Mapping[str, str] = {
    "modulated": "no layer of the model can be masked",
    "bare_layer": "no layer of the model can be masked",
    "no_parameters": "no layer of the model can be masked",
    "only_linear": "no layer of the model can be masked",
    "meta": "'meta'",
    "scripted": "TorchScript",
    "scripted_inside_wrapper": "the whole model",
    "scripted_part": "TorchScript, or parts of it are",
    "quantized": "quantized already",
    "halving": "another type than float32",
    "lazy_unused": "lazy layers are not initialized",
    "two_inputs": "takes 2 arguments",
    "keyword_only": "takes 2 arguments",
    "no_forward": "no forward pass",
    "to_cuda": "another device",
    "with_arguments": "needs no arguments",
    "exits": "SystemExit",
    "returns_class": "does not return a torch module",
}
"""A part of the message of `mask`."""
