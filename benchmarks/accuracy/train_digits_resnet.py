"""Train the bundled digits_resnet and write its checkpoint.

    python benchmarks/accuracy/train_digits_resnet.py [DESTINATION]

Seeded; the same machine and library versions give the same bytes. The epoch is chosen on `select`; `val` is read once.
"""

from __future__ import annotations

import copy
import platform
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from maskplan.pipeline.core.artifacts import Provenance
from maskplan.pipeline.core.files import write_json
from maskplan.pipeline.data.dataset import Split, batches
from maskplan.pipeline.data.digits import CLASSES, PREPROCESSING, load_digits
from maskplan.pipeline.data.image_sets import identify
from maskplan.pipeline.models.checkpoint import save_checkpoint
from maskplan.pipeline.models.digits_resnet import DigitsResNet
from maskplan.pipeline.models.registry import BUNDLED_WEIGHTS
from maskplan.pipeline.models.state_dict import tensors_sha256

EPOCHS, BATCH, RATE, DECAY, SEED = 40, 64, 3e-3, 5e-2, 0


def shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift each image by up to one pixel along both axes, repeating the edge."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    height, width = images.shape[2:]
    offsets = torch.randint(0, 3, (len(images), 2), generator=generator).tolist()
    return torch.stack([p[:, y : y + height, x : x + width] for p, (y, x) in zip(padded, offsets, strict=True)])


def top1(module: torch.nn.Module, split: Split) -> float:
    """Accuracy over a split, percent."""
    module.eval()
    correct = 0
    with torch.no_grad():
        for x, labels in batches(split, PREPROCESSING, 256):
            correct += int((module(torch.from_numpy(x)).argmax(dim=1).numpy() == labels).sum())
    return 100 * correct / len(split)


def main(destination: Path) -> None:
    """Train, keep the best epoch on `select`, and write the checkpoint and its figures."""
    data = load_digits()
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    module = DigitsResNet(len(CLASSES))
    steps = EPOCHS * (len(data.train) // BATCH)
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(SEED)
    best, best_state = -1.0, copy.deepcopy(module.state_dict())
    for epoch in range(EPOCHS):
        module.train()
        order = np.random.default_rng((SEED, epoch)).permutation(len(data.train))
        for x, labels in batches(data.train, PREPROCESSING, BATCH, order[: len(order) // BATCH * BATCH]):
            loss = F.cross_entropy(
                module(shifted(torch.from_numpy(x), generator)),
                torch.from_numpy(labels),
                label_smoothing=0.05,
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        accuracy = top1(module, data.select)
        if accuracy >= best:
            best, best_state = accuracy, copy.deepcopy(module.state_dict())
    module.load_state_dict(best_state)
    provenance = Provenance(
        model="digits_resnet",
        trained=True,
        origin="bundled",
        dense_sha256=tensors_sha256(best_state),
        classes=len(CLASSES),
        labels=CLASSES,
        preprocessing=PREPROCESSING,
        image_sets=(identify(data.train), identify(data.select)),
    )
    written = save_checkpoint(best_state, provenance, destination)
    figures = {
        "command": "python benchmarks/accuracy/train_digits_resnet.py",
        "torch": torch.__version__,
        "machine": platform.machine(),
        "epochs": EPOCHS,
        "select_top1": best,
        "val_images": len(data.val),
        "val_top1": top1(module, data.val),
        "bytes": written.bytes,
        "sha256": written.sha256,
    }
    write_json(destination.with_suffix(".json"), figures)
    print(figures)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else BUNDLED_WEIGHTS)
