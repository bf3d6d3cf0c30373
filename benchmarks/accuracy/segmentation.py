"""Learned 2:4 masks of a segmentation network, against the dense network and magnitude masks, on held-out scenes.

    python benchmarks/accuracy/segmentation.py

A scene is a textured picture with two to four of scikit-learn's handwritten digits in it, each with a size, a color and a
place of its own, and with straight strokes. A pixel belongs to a digit, to a stroke or to the background. Scenes of `val`
are made from digits that no other scene has. A small U-Net (with ConvTranspose) is trained on them; then masks are learned
against it without labels, and magnitude masks are recalibrated beside them. `val` is read once, at the end: mean
intersection over union of the three areas, with paired bootstrap intervals over scenes. Everything is seeded; the result
goes to segmentation.json next to this script.
"""

from __future__ import annotations

import argparse
import copy
import io
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from maskplan.pipeline.core.artifacts import OutputKind, Pattern, Preprocessing
from maskplan.pipeline.core.files import write_json
from maskplan.pipeline.core.serialization import encode
from maskplan.pipeline.data.dataset import UNLABELED, Dataset, Split, batches, dataset_from_train_val
from maskplan.pipeline.data.digits import load_digits
from maskplan.pipeline.learning.evaluate import fraction_changed
from maskplan.pipeline.learning.masked_net import Masks
from maskplan.pipeline.learning.options import LearnOptions
from maskplan.pipeline.learning.trainer import learn_masks
from maskplan.pipeline.masking.magnitude import magnitude_mask
from maskplan.pipeline.masking.policy import select_layers
from maskplan.pipeline.models.batchnorm import RecalibrateOptions, dense_statistics, update_statistics
from maskplan.pipeline.models.layers import trace_layers
from maskplan.pipeline.report.write import versions
from maskplan.pipeline.timing.compare_latency import cpu_name

SIZE, AREAS = 32, 3
BACKGROUND, DIGIT, STROKE = range(AREAS)
HOW = Preprocessing(3, SIZE, SIZE, 0, "bilinear", (0.5,) * 3, (0.25,) * 3)
PATTERN, KINDS = Pattern(2, 4), (OutputKind("output", "logits"),)
BATCH, RATE, SEED = 32, 4e-3, 0
RESAMPLES = 2000

Counts = npt.NDArray[np.int64]


class UNet(nn.Module):
    """Three scales, two of them joined again."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down1, self.down2 = block(3, width), block(width, 2 * width)
        self.bottom = block(2 * width, 4 * width)
        self.up2, self.up1 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.joined2, self.joined1 = block(4 * width, 2 * width), block(2 * width, width)
        self.head = nn.Conv2d(width, AREAS, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) to logits (N, areas, H, W)."""
        whole = self.down1(x)
        half = self.down2(F.max_pool2d(whole, 2))
        quarter = self.bottom(F.max_pool2d(half, 2))
        half = self.joined2(torch.cat([self.up2(quarter), half], 1))
        whole = self.joined1(torch.cat([self.up1(half), whole], 1))
        logits: torch.Tensor = self.head(whole)
        return logits


def block(channels: int, filters: int) -> nn.Sequential:
    """Two convolutions with BatchNorm."""
    layers: list[nn.Module] = []
    for given in (channels, filters):
        layers += [nn.Conv2d(given, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Scenes:
    """Pictures as PNG files, and the area that each pixel belongs to: (scenes, H, W) uint8, 0 for the background."""

    role: str
    files: tuple[bytes, ...]
    areas: npt.NDArray[np.uint8]

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """None of the scenes has a class."""
        return np.full(len(self.files), UNLABELED, np.int64)

    def name(self, index: int) -> str:
        return f"{self.role} scene {index}"

    def read(self, index: int) -> bytes:
        return self.files[index]


def scenes(role: str, digits: Split, count: int, seed: int) -> Scenes:
    """Make scenes from the digits of one split."""
    shapes = [np.asarray(Image.open(io.BytesIO(digits.images.read(int(i)))), np.float32) / 255 for i in digits.indices]
    files, areas = [], np.zeros((count, SIZE, SIZE), np.uint8)
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        picture = texture(rng)
        for _ in range(int(rng.integers(2, 5))):
            stroke(picture, areas[number], rng)
        for _ in range(int(rng.integers(2, 5))):
            place(picture, areas[number], shapes[int(rng.integers(len(shapes)))], rng)
        picture += rng.normal(0, 0.04, picture.shape)
        buffer = io.BytesIO()
        Image.fromarray((255 * picture.clip(0, 1)).round().astype(np.uint8)).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return Scenes(role, tuple(files), areas)


def texture(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Colored clouds, (H, W, 3) in [0, 1]."""
    small = (255 * rng.uniform(0.1, 0.6, (5, 5, 3))).astype(np.uint8)
    large = Image.fromarray(small).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(large, np.float64) / 255


def stroke(picture: npt.NDArray[np.float64], areas: npt.NDArray[np.uint8], rng: np.random.Generator) -> None:
    """Draw a straight line with a digit's contrast, in place."""
    ends = rng.uniform(0, SIZE - 1, (2, 2))
    for at in np.linspace(0, 1, 2 * SIZE):
        y, x = (ends[0] + at * (ends[1] - ends[0])).round().astype(int)
        picture[y, x] = 0.3 * picture[y, x] + 0.7 * rng.uniform(0.5, 1)
        areas[y, x] = STROKE


def place(
    picture: npt.NDArray[np.float64],
    areas: npt.NDArray[np.uint8],
    shape: npt.NDArray[np.float32],
    rng: np.random.Generator,
) -> None:
    """Draw a digit over what is there, in place; its pixels are those that are more than half covered."""
    side = int(rng.integers(10, 17))
    drawn = Image.fromarray((255 * shape).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    cover = np.asarray(drawn, np.float64)[..., None] / 255
    y, x = rng.integers(0, SIZE - side + 1, 2)
    window = np.s_[y : y + side, x : x + side]
    picture[window] = (1 - cover) * picture[window] + cover * rng.uniform(0.55, 1, 3)
    areas[window][cover[..., 0] > 0.5] = DIGIT


def train(data: Dataset, areas: npt.NDArray[np.uint8], epochs: int) -> UNet:
    """A dense network of the last epoch; `areas` belong to the scenes of `data.train`, in their own numbers."""
    torch.manual_seed(SEED)
    net = UNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = epochs * max(len(data.train) // BATCH, 1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for epoch in range(epochs):
        order = np.random.default_rng((SEED, epoch)).permutation(len(data.train))[: steps // epochs * BATCH]
        net.train()
        for number, (x, _) in enumerate(batches(data.train, HOW, BATCH, order)):
            chosen = data.train.indices[order[number * BATCH :][: len(x)]]
            images = torch.from_numpy(x).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(net(images), torch.from_numpy(areas[chosen]).long())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return net.eval()


def pruned(dense: nn.Module, masks: Mapping[str, npt.NDArray[np.bool_]], data: Dataset) -> nn.Module:
    """A copy under masks, with BatchNorm statistics recalibrated on `train`."""
    net = copy.deepcopy(dense)
    with torch.no_grad():
        for name, mask in masks.items():
            net.get_parameter(name).masked_fill_(~torch.from_numpy(mask), 0.0)
    options = RecalibrateOptions()
    update_statistics(net, data.train, HOW, options, dense_statistics(dense, data.train, HOW, options))
    return net.eval()


def confusion(net: nn.Module, split: Split, areas: npt.NDArray[np.uint8]) -> Counts:
    """Pixels by their own and their predicted area, for each scene: (scenes, areas, areas)."""
    found = []
    with torch.no_grad():
        for start, (x, _) in enumerate(batches(split, HOW, 200)):
            predicted = net(torch.from_numpy(x)).argmax(1).numpy()
            own = areas[split.indices[start * 200 :][: len(x)]].astype(np.int64)
            pairs = (AREAS * own + predicted).reshape(len(x), -1)
            found += [np.bincount(row, minlength=AREAS**2).reshape(AREAS, AREAS) for row in pairs]
    return np.stack(found)


def mean_iou(counts: Counts) -> float:
    """Percent, of a summed confusion (areas, areas), over the areas that occur."""
    hit = np.diagonal(counts)
    union = counts.sum(0) + counts.sum(1) - hit
    return 100 * float((hit[union > 0] / union[union > 0]).mean())


def interval(first: Counts, second: Counts, seed: int = SEED) -> dict[str, Any]:
    """Points of mean IoU that the second network loses against the first; 95%: paired bootstrap over scenes."""
    rng = np.random.default_rng(seed)
    drops = []
    for _ in range(RESAMPLES):
        weight = np.bincount(rng.integers(0, len(first), len(first)), minlength=len(first))
        drops.append(mean_iou(np.tensordot(weight, first, 1)) - mean_iou(np.tensordot(weight, second, 1)))
    low, high = np.percentile(drops, (2.5, 97.5))
    drop = mean_iou(first.sum(0)) - mean_iou(second.sum(0))
    return {"drop": round(drop, 3), "ci95": [round(float(low), 3), round(float(high), 3)]}


def run(count: int, val_count: int, epochs: int, learn: LearnOptions) -> dict[str, Any]:
    """Train, mask and compare."""
    digits = load_digits()
    pictures, held_out = scenes("train", digits.train, count, 1), scenes("val", digits.val, val_count, 2)
    data = dataset_from_train_val(pictures, held_out, (), SEED)
    started, cpu = time.monotonic(), time.process_time()
    dense = train(data, pictures.areas, epochs)
    trained, trained_cpu = time.monotonic(), time.process_time()
    layers, _ = trace_layers(dense, HOW)
    chosen = select_layers(layers, PATTERN).masked
    magnitude: Masks = {x.name: magnitude_mask(dense.get_parameter(x.name).detach().numpy(), PATTERN) for x in chosen}
    learned, learning = learn_masks(dense, magnitude, PATTERN, HOW, data, learn, kinds=KINDS, device="cpu")
    found = {
        "dense": confusion(dense, data.val, held_out.areas),
        "magnitude, recalibrated": confusion(pruned(dense, magnitude, data), data.val, held_out.areas),
        "learned, recalibrated": confusion(pruned(dense, learned, data), data.val, held_out.areas),
    }
    against = found["dense"]
    rows = {
        name: {
            "mean_iou": round(mean_iou(counts.sum(0)), 3),
            "pixel_accuracy": round(100 * float(np.trace(counts.sum(0)) / counts.sum()), 3),
            **({} if counts is against else {"against_dense": interval(against, counts)}),
        }
        for name, counts in found.items()
    }
    masked_macs = sum(layer.macs for layer in chosen)
    return {
        "scenes": {"train": len(data.train), "select": len(data.select), "val": len(data.val)},
        "train_epochs": epochs,
        "train_seconds": round(trained - started, 1),
        "train_cpu_seconds": round(trained_cpu - cpu, 1),
        "parameters": sum(p.numel() for p in dense.parameters()),
        "masked_layers": len(chosen),
        "masked_macs_percent": round(100 * masked_macs / sum(layer.macs for layer in layers), 1),
        "groups_changed_percent": round(100 * fraction_changed(magnitude, learned, PATTERN.m), 1),
        "learning": encode(learning),
        "rows": rows,
        "learned_against_magnitude": interval(found["learned, recalibrated"], found["magnitude, recalibrated"]),
        "bootstrap_resamples": RESAMPLES,
    }


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=4000, help="to train on (default: %(default)s)")
    parser.add_argument("--val", type=int, default=1000, help="held-out scenes (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=12, help="of training (default: %(default)s)")
    parser.add_argument("--learn-epochs", type=int, default=12, help="of learning masks (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".json"), metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = run(args.scenes, args.val, args.epochs, LearnOptions(epochs=args.learn_epochs, batch=BATCH, seed=SEED))
    given = {"--scenes": args.scenes, "--val": args.val, "--epochs": args.epochs, "--learn-epochs": args.learn_epochs}
    changed = [f"{flag} {value}" for flag, value in given.items() if value != parser.get_default(_name(flag))]
    command = " ".join(["python benchmarks/accuracy/segmentation.py", *changed])
    write_json(args.results, {"command": command, "cpu": cpu_name(), "threads": 1, **versions(), **result})
    for name, row in result["rows"].items():
        print(name, row)


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


if __name__ == "__main__":
    main()
