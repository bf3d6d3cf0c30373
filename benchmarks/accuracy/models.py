"""Networks for 32x32 images: CIFAR ResNets, VGG-16 with BatchNorm, ShuffleNetV2.

Each family has its full width and a narrow variant that two CPU cores can train. On the command line:
`benchmarks/accuracy/models.py:resnet20`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import ShuffleNetV2

PREPROCESSING = {
    "channels": 3,
    "height": 32,
    "width": 32,
    "resize": 0,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A): every other pixel, new channels zero."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.added = stride, channels - channels_in

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.added:
            half = self.added // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.added - half))
        return torch.relu(x + y)


class CifarResNet(nn.Module):
    """He et al. 2015, section 4.2: a stem, three stages of `blocks` blocks, and a linear head."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = Block(channels_in, channels, stride)
        return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class CifarVGG(nn.Module):
    """VGG-16's convolutions with BatchNorm and one linear layer, as is usual for 32x32 images."""

    def __init__(self, width: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels_in = 3
        for i, (count, full) in enumerate(((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))):
            channels = int(full * width)
            for _ in range(count):
                layers += [nn.Conv2d(channels_in, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
                channels_in = channels
            if i < 4:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels_in, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def _shufflenet(channels: list[int]) -> ShuffleNetV2:
    """torchvision's, without the two early downsamplings, which 32x32 images are too small for."""
    net = ShuffleNetV2([4, 8, 4], channels, num_classes=10)
    net.conv1[0].stride = (1, 1)
    net.maxpool = nn.Identity()
    return net


def resnet20() -> nn.Module:
    """0.27 M parameters."""
    return CifarResNet(3)


def resnet56() -> nn.Module:
    """0.85 M parameters."""
    return CifarResNet(9)


def vgg16_bn() -> nn.Module:
    """14.7 M parameters."""
    return CifarVGG(1.0)


def vgg16_bn_quarter() -> nn.Module:
    """0.92 M parameters: every width divided by four."""
    return CifarVGG(0.25)


def shufflenet_v2_x0_5() -> nn.Module:
    """0.35 M parameters; 48, 96 and 192 channels, so that every pointwise convolution is eligible."""
    return _shufflenet([24, 48, 96, 192, 1024])


def shufflenet_v2_x1_0() -> nn.Module:
    """1.3 M parameters; the 58 channels of a branch are not a multiple of four."""
    return _shufflenet([24, 116, 232, 464, 1024])
