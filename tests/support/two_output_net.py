"""A small U-Net with two named outputs, its trained weights and loose images without classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

SIZE, MEAN, STD = 16, 0.5, 0.25

SOURCE = """
import torch
from torch import nn

PREPROCESSING = {"height": 16, "width": 16, "resize": 0, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, 2, 1)
        self.up, self.head, self.depth = nn.ConvTranspose2d(12, 8, 2, 2), nn.Conv2d(16, 4, 3, padding=1), nn.Conv2d(16, 1, 1)

    def forward(self, x):
        whole = torch.relu(self.stem(x))
        joined = torch.cat([self.up(torch.relu(self.down(whole))), whole], 1)
        return {"classes": self.head(joined), "depth": self.depth(joined)}


def unet():
    return UNet()
"""


def write_inputs(folder: Path, images: int = 30) -> tuple[str, ...]:
    """Write the network, its weights, images and a recipe.

    Returns:
        Words of `maskplan engine` for them.
    """
    (folder / "nets.py").write_text(SOURCE)
    (folder / "recipe.toml").write_text("[time]\nseconds = 0.02\nbatches = [1]\nwarm_up = 1\n")
    torch.manual_seed(0)
    torch.save(module({}).state_dict(), folder / "w.pth")
    (folder / "data").mkdir()
    generator = np.random.default_rng(0)
    for i in range(images):
        # Patches of one color, so that neighboring inputs are alike.
        pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(4, axis=0).repeat(4, axis=1)
        Image.fromarray(pixels).save(folder / "data" / f"{i:02}.png")
    recipe = ("--recipe", str(folder / "recipe.toml"))
    return (f"{folder}/nets.py:unet", "--weights", f"{folder}/w.pth", "--data", str(folder / "data"), *recipe)


def module(state: dict[str, Any]) -> nn.Module:
    """The network, with a state if there is one."""
    namespace: dict[str, Any] = {}
    exec(SOURCE, namespace)
    net: nn.Module = namespace["unet"]()
    if state:
        net.load_state_dict(state)
    return net.eval()


def read_images(paths: list[Path]) -> torch.Tensor:
    """(N, 3, H, W), as the network takes them."""
    pixels = np.stack([np.asarray(Image.open(path), np.float32) for path in paths]) / 255
    return torch.from_numpy(((pixels - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32))
