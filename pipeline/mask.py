"""The mask stage: which layers, by which method."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.artifacts import ImageSet, MaskSet, Provenance
from pipeline.data import Dataset
from pipeline.errors import InputError
from pipeline.layers import survey
from pipeline.learning.recipes import LearnOptions
from pipeline.masking.magnitude import magnitude_mask
from pipeline.masking.maskset import read_masks, write_masks
from pipeline.masking.patterns import CHANNEL, LAYOUTS, parse_pattern
from pipeline.masking.policy import select_layers
from pipeline.weights import tensors_sha256

if TYPE_CHECKING:
    from torch import nn

LEARNED, MAGNITUDE = "learned", "magnitude"
METHODS = (LEARNED, MAGNITUDE)
AUTO = "auto"


@dataclass(frozen=True)
class MaskOptions:
    """How masks are chosen.

    Attributes:
        method: `learned`, `magnitude`, or `auto`: learned where there are images.
        pattern: N:M.
        layout: `channel` (TensorRT's) or `flat` (for comparison only).
        learn: For learned masks.
    """

    method: str = AUTO
    pattern: str = "2:4"
    layout: str = CHANNEL
    learn: LearnOptions = field(default_factory=LearnOptions)

    def __post_init__(self) -> None:
        parse_pattern(self.pattern)
        if self.layout not in LAYOUTS:
            raise InputError(f"unknown layout {self.layout!r}", fix=f"choose one of {', '.join(LAYOUTS)}")
        if self.method not in (AUTO, *METHODS):
            raise InputError(
                f"unknown mask method {self.method!r}",
                fix=f"choose one of {', '.join((AUTO, *METHODS))}, or give a mask file",
            )


def method_for(asked: str, has_images: bool) -> str:
    """What `auto` means: learned masks where there are images to learn from."""
    return asked if asked != AUTO else LEARNED if has_images else MAGNITUDE


def choose_masks(
    module: nn.Module,
    provenance: Provenance,
    options: MaskOptions,
    out: Path,
    data: Dataset | None = None,
    image_sets: tuple[ImageSet, ...] = (),
    only: Collection[str] | None = None,
    progress: Path | None = None,
    log: Path | None = None,
) -> MaskSet:
    """Choose a mask for every layer that the policy selects; the module's weights stay as they are.

    Args:
        module: The dense model.
        provenance: Of its weights.
        options: Method and pattern.
        out: The mask file to write.
        data: Needed by learned masks.
        image_sets: Which images `data` holds, for the record.
        only: Names of the weights to mask, among those that the policy selects; all by default.
        progress: Checkpoint of the learner, to go on from if it is there; removed when the masks are written.
        log: Folder for the learner's metrics.

    Raises:
        InputError: Nothing can be masked, or learned masks without data.
    """
    method = method_for(options.method, data is not None)
    pattern = parse_pattern(options.pattern)
    layers, _ = survey(module, provenance.preprocessing)
    selection = select_layers(layers, pattern)
    chosen = [layer for layer in selection.masked if only is None or layer.name in only]
    state = module.state_dict()
    weights = {layer.name: state[layer.name].detach().cpu().float().numpy() for layer in chosen}
    masks = {name: magnitude_mask(weight, pattern, options.layout) for name, weight in weights.items()}
    learning = None
    if method == LEARNED:
        if data is None:
            raise InputError(
                "learned masks need images",
                fix="give --data DIR with train/ and val/, or choose --masks magnitude",
            )
        if options.layout != CHANNEL:
            raise InputError("masks are learned along C only", found=f"layout {options.layout}")
        from pipeline.learning.trainer import LearnFiles, learn_masks

        masks, learning = learn_masks(
            module,
            masks,
            pattern,
            provenance.preprocessing,
            data,
            options.learn,
            images=tuple(s.sha256 for s in image_sets),
            files=LearnFiles(progress, log),
        )
    written = write_masks(
        out,
        masks,
        weights,
        chosen,
        selection.dense,
        model=provenance.model,
        pattern=pattern,
        layout=options.layout,
        method=method,
        weights_sha256=tensors_sha256(state),
        learning=learning,
        image_sets=image_sets if learning else (),
    )
    if progress is not None:
        progress.unlink(missing_ok=True)
    return written


def given_masks(module: nn.Module, provenance: Provenance, path: Path, *, deployable: bool = True) -> MaskSet:
    """Take the masks of a file, held against the model.

    Raises:
        InputError: They do not fit it, or are not N:M.
    """
    layers, _ = survey(module, provenance.preprocessing)
    state = module.state_dict()
    weights = {layer.name: state[layer.name].detach().cpu().float().numpy() for layer in layers}
    return read_masks(path, weights, layers, model=provenance.model, deployable=deployable)
