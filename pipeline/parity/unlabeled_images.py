"""A folder of images without classes: models can be held against each other on it, not against the truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from maskplan.pipeline.data.dataset import ImageFiles, Split
from maskplan.pipeline.parity.model_outputs import UNLABELED


def open_unlabeled(folder: Path) -> Split | None:
    """The images that lie in a folder, or in its `val/`, without class folders; None where there are none such.

    Images next to folders are left to `open_val`, which says what is wrong with the layout.
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
