"""The mask stage: which layers, by which method."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import DenseLayer, ImageSet, Layer, MaskSet, Pattern, Provenance
from maskplan.pipeline.core.choices import (
    AUTO,
    CHANNEL,
    DANHOFER2024,
    FLAT,
    LAYERWISE,
    LEARNED,
    MAGNITUDE,
    TRANSPOSABLE,
)
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.progress import track
from maskplan.pipeline.core.validation import at_least
from maskplan.pipeline.data.dataset import Dataset
from maskplan.pipeline.learning.options import LearnerFiles, LearnOptions
from maskplan.pipeline.masking.layerwise import layerwise_mask
from maskplan.pipeline.masking.magnitude import magnitude_mask
from maskplan.pipeline.masking.maskset import load_masks, read_masks, require_fit, write_masks
from maskplan.pipeline.masking.patterns import LAYOUTS, parse_pattern
from maskplan.pipeline.masking.policy import LINEAR, TOO_COSTLY, LayerPolicy, select_layers
from maskplan.pipeline.masking.transposable import transposable_masks
from maskplan.pipeline.models.layers import trace_layers
from maskplan.pipeline.models.state_dict import tensors_sha256

if TYPE_CHECKING:
    from torch import nn

DEPLOYABLE = (LEARNED, MAGNITUDE, LAYERWISE, TRANSPOSABLE)
METHODS = (*DEPLOYABLE, DANHOFER2024)
INIT_METHODS = (MAGNITUDE, LAYERWISE)


@dataclass(frozen=True)
class MaskOptions:
    """How masks are chosen.

    Attributes:
        method: `learned`, `magnitude`, `layerwise` (changes each layer's outputs on training images least), `transposable`
            (N:M along C and along K at once), or `auto`: learned where there are images. `danhofer2024` is the semester report's
            recipe, for comparison only: every convolution, in the flat layout; of the other options only the pattern counts,
            and the epochs, batch, rate and seed of `learn`.
        pattern: N:M.
        layout: `channel` (TensorRT's) or `flat` (for comparison only).
        include_linear: Mask linear layers too.
        layers: Patterns of names of the weights to mask; all eligible ones by default.
        min_channels: Leave convolutions with fewer input channels dense.
        keep_dense_budget: Percent of the maskable MACs that may stay dense: those of the layers whose masking costs most.
        images: Training images that layer-wise masks are chosen on, drawn with the seed of `learn`.
        init_method: Masks that learned ones start from: `magnitude` or `layerwise`.
        learn: For learned masks.
    """

    RENAMED_FIELDS: ClassVar[Mapping[str, str]] = {"prior": "init_method"}

    method: str = AUTO
    pattern: str = "2:4"
    layout: str = CHANNEL
    include_linear: bool = False
    layers: tuple[str, ...] = ()
    min_channels: int = 0
    keep_dense_budget: float = 0.0
    images: int = 512
    init_method: str = MAGNITUDE
    learn: LearnOptions = field(default_factory=LearnOptions)

    def __post_init__(self) -> None:
        parse_pattern(self.pattern)
        at_least(0, min_channels=self.min_channels, keep_dense_budget=self.keep_dense_budget)
        at_least(1, images=self.images)
        if self.init_method not in INIT_METHODS:
            raise InputError(
                f"unknown init_method {self.init_method!r} of learned masks",
                fix=f"choose one of {', '.join(INIT_METHODS)}",
            )
        if self.layout not in LAYOUTS:
            raise InputError(f"unknown layout {self.layout!r}", fix=f"choose one of {', '.join(LAYOUTS)}")
        if self.method not in (AUTO, *METHODS):
            raise InputError(
                f"unknown mask method {self.method!r}",
                fix=f"choose one of {', '.join((AUTO, *METHODS))}, or give a mask file",
            )


def policy_of(options: MaskOptions, method: str) -> LayerPolicy:
    """Which layers the method would mask; `method` is not `auto`."""
    return LayerPolicy(options.include_linear, options.layers, options.min_channels, method == TRANSPOSABLE)


def method_for(asked: str, has_images: bool) -> str:
    """What `auto` means: learned masks where there are images to learn from."""
    return asked if asked != AUTO else LEARNED if has_images else MAGNITUDE


def needs_images(options: MaskOptions, method: str) -> bool:
    """Whether choosing masks so takes images; `method` is not `auto`."""
    return method in (LEARNED, LAYERWISE, DANHOFER2024) or options.keep_dense_budget > 0


def choose_masks(
    module: nn.Module,
    provenance: Provenance,
    options: MaskOptions,
    out: Path,
    data: Dataset | None = None,
    image_sets: tuple[ImageSet, ...] = (),
    only: Collection[str] | None = None,
    init: Path | None = None,
    files: LearnerFiles | None = None,
    device: str = "auto",
) -> MaskSet:
    """Choose a mask for every layer that the policy selects; the module's weights stay as they are.

    Args:
        module: The dense model.
        provenance: Of its weights.
        options: Method and pattern.
        out: The mask file to write.
        data: Needed by learned and by layer-wise masks.
        image_sets: Which images `data` holds, for the record.
        only: Names of the weights to mask, among those that the policy selects; all by default.
        init: Mask file to start learning from; it says which layers are masked.
        files: The learner's own; its checkpoint is removed when the masks are written.
        device: Where to learn, and to run the network for layer-wise masks: `auto`, `cpu` or `cuda`.

    Raises:
        InputError: Nothing can be masked, or masks that need data without it.
    """
    method = method_for(options.method, data is not None)
    pattern = parse_pattern(options.pattern)
    layers, _ = trace_layers(module, provenance.preprocessing)
    if method == DANHOFER2024:
        return _as_reported(module, provenance, layers, pattern, options.learn, out, data, image_sets)
    _require_images(method, options, data)
    selection = select_layers(layers, pattern, policy_of(options, method))
    given = _start(init, layers, pattern) if init is not None else None
    only = only if given is None else given.keys()
    chosen = [layer for layer in selection.masked if only is None or layer.name in only]
    state = module.state_dict()
    weights = {layer.name: state[layer.name].detach().cpu().float().numpy() for layer in chosen}
    masks = {name: magnitude_mask(weight, pattern, options.layout) for name, weight in weights.items()}
    dense = selection.dense
    if options.keep_dense_budget > 0:
        assert data is not None  # required above
        from maskplan.pipeline.learning.sensitivity import costliest_layers

        left = costliest_layers(
            module, masks, chosen, provenance.preprocessing, data, options.keep_dense_budget, options.learn
        )
        dense += tuple(DenseLayer(x.name, x.shape, x.macs, TOO_COSTLY) for x in chosen if x.name in left)
        chosen = [layer for layer in chosen if layer.name not in left]
        weights, masks = ({k: v for k, v in d.items() if k not in left} for d in (weights, masks))
    if method == TRANSPOSABLE:
        masks = transposable_masks(weights, pattern)
    elif method == LAYERWISE or (method == LEARNED and options.init_method == LAYERWISE and given is None):
        assert data is not None  # required above
        masks = _layerwise(module, provenance, chosen, weights, pattern, options, data, device)
        given = masks if method == LEARNED else None
    learning = None
    if method == LEARNED:
        assert data is not None  # required above
        from maskplan.pipeline.learning.trainer import learn_masks

        masks, learning = learn_masks(
            module,
            masks if given is None else {name: given[name] for name in masks},
            pattern,
            provenance.preprocessing,
            data,
            options.learn,
            images=tuple(s.sha256 for s in image_sets),
            given=given is not None,
            files=files,
            device=device,
        )
    written = write_masks(
        out,
        masks,
        weights,
        chosen,
        dense,
        model=provenance.model,
        pattern=pattern,
        layout=options.layout,
        method=method,
        weights_sha256=tensors_sha256(state),
        learning=learning,
        image_sets=image_sets if needs_images(options, method) else (),
        permutation=provenance.permutation,
    )
    if files is not None and files.state is not None:
        files.state.unlink(missing_ok=True)
    return written


def _require_images(method: str, options: MaskOptions, data: Dataset | None) -> None:
    """Raise unless what the method needs is there."""
    if options.layout != CHANNEL and method in (LEARNED, LAYERWISE, TRANSPOSABLE):
        raise InputError(f"{method} masks are chosen along C only", found=f"layout {options.layout}")
    if data is not None or not needs_images(options, method):
        return
    fix = "give --data DIR with train/ and val/"
    if method not in (LEARNED, LAYERWISE):
        raise InputError("--keep-dense-budget needs images", fix=fix)
    raise InputError(f"{method} masks need images", fix=f"{fix}, or choose --masks magnitude")


def _layerwise(
    module: nn.Module,
    provenance: Provenance,
    layers: Sequence[Layer],
    weights: Mapping[str, npt.NDArray[np.floating]],
    pattern: Pattern,
    options: MaskOptions,
    data: Dataset,
    device: str,
) -> dict[str, npt.NDArray[np.bool_]]:
    """One layer after the other, for their second moments are large."""
    from maskplan.pipeline.models.device import choose_device
    from maskplan.pipeline.pruning.second_moments import MomentOptions, second_moments

    how = MomentOptions(images=options.images, seed=options.learn.seed)
    running = copy.deepcopy(module).to(choose_device(device))
    moments = second_moments(running, layers, provenance.preprocessing, data.train, how)
    return {
        layer.name: layerwise_mask(weights[layer.name], found.effective, pattern, name=layer.name)
        for layer, found in track(moments, "layer-wise masks", len(layers))
    }


def _as_reported(
    module: nn.Module,
    provenance: Provenance,
    layers: Sequence[Layer],
    pattern: Pattern,
    learn: LearnOptions,
    out: Path,
    data: Dataset | None,
    image_sets: tuple[ImageSet, ...],
) -> MaskSet:
    if data is None:
        raise InputError("the report's recipe needs images", fix="give --data DIR with train/ and val/")
    from maskplan.pipeline.learning.danhofer2024 import DanhoferOptions, danhofer_masks

    state = module.state_dict()
    chosen = [layer for layer in layers if layer.op == "Conv"]
    weights = {layer.name: state[layer.name].detach().cpu().float().numpy() for layer in chosen}
    masks, learning = danhofer_masks(
        module,
        {name: magnitude_mask(weight, pattern, FLAT) for name, weight in weights.items()},
        provenance.preprocessing,
        data,
        DanhoferOptions(epochs=learn.epochs, batch=learn.batch, lr=learn.lr, seed=learn.seed),
        pattern,
    )
    return write_masks(
        out,
        masks,
        weights,
        chosen,
        [DenseLayer(x.name, x.shape, x.macs, LINEAR) for x in layers if x.op != "Conv"],
        model=provenance.model,
        pattern=pattern,
        layout=FLAT,
        method=DANHOFER2024,
        weights_sha256=tensors_sha256(state),
        learning=learning,
        image_sets=image_sets,
        permutation=provenance.permutation,
    )


def _start(path: Path, layers: Sequence[Layer], pattern: Pattern) -> dict[str, npt.NDArray[np.bool_]]:
    masks = load_masks(path)
    require_fit(masks, layers, pattern, CHANNEL, where=path)
    return masks


def masks_from_file(module: nn.Module, provenance: Provenance, path: Path, *, deployable: bool = True) -> MaskSet:
    """Take the masks of a file, held against the model.

    Raises:
        InputError: They do not fit it, or are not N:M.
    """
    layers, _ = trace_layers(module, provenance.preprocessing)
    state = module.state_dict()
    weights = {layer.name: state[layer.name].detach().cpu().float().numpy() for layer in layers}
    return read_masks(path, weights, layers, model=provenance.model, deployable=deployable)
