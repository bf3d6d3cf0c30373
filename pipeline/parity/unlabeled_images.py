"""A folder of images without classes: it shows how far two models agree, not how accurate they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from maskplan.pipeline.data.dataset import ImageFiles, Split
from maskplan.pipeline.parity.model_outputs import UNLABELED


def open_unlabeled(folder: Path) -> Split | None:
    """The images directly in a folder, or in its `val/`; None if there are none or there are class folders.

    A mix of images and folders is left to `open_val`, which reports what is wrong with the layout.
    """
    from PIL import Image

    opened = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    root = folder / "val" if (folder / "val").is_dir() else folder
    if not root.is_dir() or any(p.is_dir() for p in root.iterdir()):
        return None
    names = tuple(sorted(p.name for p in root.iterdir() if p.suffix.lower() in opened and p.is_file()))
    if not names:
        return None
    files = ImageFiles(root, names, np.full(len(names), UNLABELED, np.int64))
    return Split("val", files, np.arange(len(names)))
