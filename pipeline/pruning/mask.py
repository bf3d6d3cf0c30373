"""The mask stage: selects the layers to mask and chooses their masks by one method."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

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
    Layout,
    MaskMethod,
)
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.validation import at_least
from maskplan.pipeline.data.dataset import Dataset
from maskplan.pipeline.learning.few_images import FEW_IMAGES, few_image_options, learns_from_few, require_images
from maskplan.pipeline.learning.options import LearnerFiles, LearnOptions, block_files
from maskplan.pipeline.masking.magnitude import magnitude_mask
from maskplan.pipeline.masking.maskset import (
    is_mask_file,
    load_masks,
    mask_problem,
    read_masks,
    require_fit,
    write_masks,
)
from maskplan.pipeline.masking.patterns import LAYOUTS, parse_pattern
from maskplan.pipeline.masking.policy import LINEAR, TOO_COSTLY, LayerPolicy, select_layers
from maskplan.pipeline.masking.transposable import transposable_masks
from maskplan.pipeline.models.key_matching import match_names
from maskplan.pipeline.models.layers import trace_layers
from maskplan.pipeline.models.state_dict import stored_masks, tensors_sha256
from maskplan.pipeline.pruning.layerwise_masks import layerwise_masks, layerwise_start
from maskplan.pipeline.pruning.method import NEED_IMAGES, require_known_method, resolve_method
from maskplan.pipeline.pruning.second_moments import MomentOptions

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

InitMethod = Literal["magnitude", "layerwise"]
INIT_METHODS: tuple[InitMethod, ...] = get_args(InitMethod)


@dataclass(frozen=True)
class MaskOptions:
    """How masks are chosen.

    Attributes:
        method: `learned`, `magnitude`, `layerwise` (smallest change of each layer's outputs on training images),
            `transposable` (N:M along C and along K at once), or `auto`: learned where there are images. `danhofer2024` is
            the recipe of Danhofer's semester report, for comparison only: it masks every convolution in the flat layout,
            and uses only the pattern and the epochs, batch, lr and seed of `learn`.
        pattern: N:M.
        layout: `channel` (TensorRT's) or `flat` (for comparison only).
        include_linear: Mask linear layers too.
        layers: Name patterns of the weights to mask, such as `layer3.*`; all eligible ones by default.
        min_channels: Leave convolutions with fewer input channels dense.
        keep_dense_budget: Percent of the maskable MACs that may stay dense, in the layers whose masks cost most accuracy.
        images: Number of training images for layer-wise masks, drawn with the seed of `learn`.
        init_method: Masks that learned ones start from: `magnitude` or `layerwise`.
        few_images: Learn in the setting for few images (`learning/few_images.py`), from layer-wise masks; None does so if
            they are few.
        learn: Options of learned masks.
        set_in_recipe: Names of the options in `learn` that a recipe sets, even to their defaults; the setting for few
            images keeps these, and `danhofer2024` takes `lr` if it is among them.
    """

    RENAMED_FIELDS: ClassVar[Mapping[str, str]] = {"prior": "init_method"}

    method: str = AUTO
    pattern: str = "2:4"
    layout: Layout = CHANNEL
    include_linear: bool = False
    layers: tuple[str, ...] = ()
    min_channels: int = 0
    keep_dense_budget: float = 0.0
    images: int = 512
    init_method: InitMethod = MAGNITUDE
    few_images: bool | None = None
    learn: LearnOptions = field(default_factory=LearnOptions)
    set_in_recipe: tuple[str, ...] = ()

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
        require_known_method(self.method)


def policy_of(options: MaskOptions, method: str) -> LayerPolicy:
    """The layer policy under a resolved method (not `auto`)."""
    return LayerPolicy(options.include_linear, options.layers, options.min_channels, method == TRANSPOSABLE)


def needs_images(options: MaskOptions, method: str) -> bool:
    """Whether a resolved method (not `auto`) reads images under these options."""
    return method in NEED_IMAGES or options.keep_dense_budget > 0


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
    """Choose a mask for every layer that the policy selects; the module's weights do not change.

    Args:
        module: The dense model.
        provenance: Of its weights.
        options: Method and pattern.
        out: The mask file to write.
        data: Required by learned and layer-wise masks, and by `keep_dense_budget`.
        image_sets: Digests of the images in `data`, recorded in the mask file.
        only: Names of the weights to mask, among those that the policy selects; all by default.
        init: Mask file, or checkpoint with pruning masks, to start learning from; only the layers it names are masked.
        files: Files of the learner; its checkpoint is deleted once the masks are written.
        device: Where the network runs for learned and layer-wise masks: `auto`, `cpu` or `cuda`.

    Raises:
        InputError: No layer can be masked, or the method needs images and there are none.
    """
    began = time.monotonic()
    method = resolve_method(options.method, has_images=data is not None)
    pattern = parse_pattern(options.pattern)
    weights_sha256 = tensors_sha256(module.state_dict())
    module = copy.deepcopy(module)  # a forward pass may change buffers
    layers, _ = trace_layers(module, provenance.preprocessing)
    if method == DANHOFER2024:
        assert data is not None  # checked by resolve_method
        return _danhofer(module, provenance, layers, pattern, options, out, data, image_sets)
    _require_supported(method, options, data)
    selection = select_layers(layers, pattern, policy_of(options, method))
    given = _load_fitting(init, layers, pattern) if init is not None else None
    only = only if given is None else given.keys()
    chosen = [layer for layer in selection.masked if only is None or layer.name in only]
    state = module.state_dict()
    weights = {layer.name: state[layer.name].detach().cpu().float().numpy() for layer in chosen}
    masks = {name: magnitude_mask(weight, pattern, options.layout) for name, weight in weights.items()}
    if method == LEARNED:
        assert data is not None  # checked above
        require_images(data)
        method, options = _strategy(module, provenance, options, masks, data, device, files, has_init=given is not None)
    dense = selection.dense
    if options.keep_dense_budget > 0:
        assert data is not None  # checked above
        from maskplan.pipeline.learning.sensitivity import costliest_layers

        costly = costliest_layers(
            module,
            masks,
            chosen,
            provenance.preprocessing,
            data,
            options.keep_dense_budget,
            options.learn,
            provenance.outputs,
        )
        dense += tuple(DenseLayer(x.name, x.shape, x.macs, TOO_COSTLY) for x in chosen if x.name in costly)
        chosen = [layer for layer in chosen if layer.name not in costly]
        if costly and not chosen:
            raise InputError(
                "no layer is left to mask",
                found=f"--keep-dense-budget {options.keep_dense_budget:g} leaves all {len(costly)} layers dense",
                fix="lower it",
            )
        weights, masks = ({k: v for k, v in d.items() if k not in costly} for d in (weights, masks))

    def layerwise(of: Sequence[Layer]) -> dict[str, npt.NDArray[np.bool_]]:
        assert data is not None  # checked above
        moments = MomentOptions(images=options.images, seed=options.learn.seed)
        return layerwise_masks(module, of, provenance.preprocessing, data.train, pattern, moments, device)

    if method == TRANSPOSABLE:
        masks = transposable_masks(weights, pattern)
    elif method == LAYERWISE:
        masks = layerwise(chosen)
    elif method == LEARNED and options.init_method == LAYERWISE and given is None:
        given = masks | layerwise_start(module, chosen, provenance.preprocessing, layerwise)
    learning = None
    if method == LEARNED:
        assert data is not None  # checked above
        from maskplan.pipeline.learning.trainer import learn_masks

        learn = options.learn
        if learn.budget_minutes is not None:
            learn = replace(learn, budget_minutes=max(learn.budget_minutes - (time.monotonic() - began) / 60, 0.0))
        masks, learning = learn_masks(
            module,
            masks if given is None else {name: given[name] for name in masks},
            pattern,
            provenance.preprocessing,
            data,
            learn,
            image_digests=tuple(s.key for s in image_sets),
            favor_start=given is not None,
            files=files,
            device=device,
            kinds=provenance.outputs,
        )
    mask_set = write_masks(
        out,
        masks,
        weights,
        chosen,
        dense,
        model=provenance.model,
        pattern=pattern,
        layout=options.layout,
        method=method,
        weights_sha256=weights_sha256,
        learning=learning,
        image_sets=image_sets if needs_images(options, method) else (),
        permutation=provenance.permutation,
    )
    if files is not None and files.checkpoint is not None:
        for checkpoint in (files.checkpoint, block_files(files).checkpoint):
            assert checkpoint is not None
            checkpoint.unlink(missing_ok=True)
        from maskplan.pipeline.learning.budget import strategy_file

        strategy_file(files.checkpoint).unlink(missing_ok=True)
    return mask_set


def _require_supported(method: MaskMethod, options: MaskOptions, data: Dataset | None) -> None:
    """Raise if the method cannot serve the layout, or a budget of dense layers has no images to measure on."""
    if options.layout != CHANNEL and method in (LEARNED, LAYERWISE, TRANSPOSABLE):
        raise InputError(f"{method} masks are chosen along C only", found=f"layout {options.layout}")
    if data is None and options.keep_dense_budget > 0:
        raise InputError("--keep-dense-budget needs images", fix="give --data DIR with train/ and val/")


def _strategy(
    module: nn.Module,
    provenance: Provenance,
    options: MaskOptions,
    masks: Mapping[str, npt.NDArray[np.bool_]],
    data: Dataset,
    device: str,
    files: LearnerFiles | None,
    *,
    has_init: bool,
) -> tuple[MaskMethod, MaskOptions]:
    """How masks are learned: the setting for few images where it applies, and what the time budget is enough for."""
    few = learns_from_few(options.few_images, data)
    if options.learn.budget_minutes is not None and masks and not has_init:
        from maskplan.pipeline.learning.budget import LAYERWISE_ONLY, SHORT, seconds_per_image, strategy_for_budget

        def measure() -> float:
            pattern, learn = parse_pattern(options.pattern), options.learn
            preprocessing, kinds = provenance.preprocessing, provenance.outputs
            return seconds_per_image(module, masks, pattern, preprocessing, data, learn, kinds, device)

        strategy = strategy_for_budget(options.learn, len(data.train), measure, files, few_images=few)
        if strategy == LAYERWISE_ONLY:
            return LAYERWISE, options
        if strategy == SHORT and options.few_images is None and not few:
            # Layer-wise masks of all images would take a large part of the time.
            learn = few_image_options(options.learn, len(data.train), options.set_in_recipe)
            return LEARNED, replace(options, learn=learn, init_method=LAYERWISE)
    if not few:
        return LEARNED, options
    log.info("%d images: masks are learned in the setting for few images", len(data.train) + len(data.select))
    learn = few_image_options(options.learn, len(data.train), options.set_in_recipe)
    images = max(options.images, min(len(data.train), FEW_IMAGES))
    return LEARNED, replace(options, learn=learn, init_method=LAYERWISE, images=images)


def _danhofer(
    module: nn.Module,
    provenance: Provenance,
    layers: Sequence[Layer],
    pattern: Pattern,
    options: MaskOptions,
    out: Path,
    data: Dataset,
    image_sets: tuple[ImageSet, ...],
) -> MaskSet:
    """Masks by the recipe of Danhofer (2024): every convolution, flat layout."""
    from maskplan.pipeline.learning.danhofer2024 import DanhoferOptions, danhofer_masks

    if provenance.outputs or not (data.train.labels >= 0).all():
        what = f"{DANHOFER2024} masks are learned from labels"
        raise InputError(what, fix="give a classifier and images in class folders, or choose learned masks")
    learn = options.learn
    # The report's rate, unless another one is asked for.
    asked = "lr" in options.set_in_recipe or learn.lr != LearnOptions().lr
    state = module.state_dict()
    chosen = [layer for layer in layers if layer.op == "Conv"]
    weights = {layer.name: state[layer.name].detach().cpu().float().numpy() for layer in chosen}
    masks, learning = danhofer_masks(
        module,
        {name: magnitude_mask(weight, pattern, FLAT) for name, weight in weights.items()},
        provenance.preprocessing,
        data,
        DanhoferOptions(learn.epochs, learn.batch, learn.lr if asked else DanhoferOptions().lr, seed=learn.seed),
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


def _load_fitting(path: Path, layers: Sequence[Layer], pattern: Pattern) -> dict[str, npt.NDArray[np.bool_]]:
    masks = checkpoint_masks(path, layers, pattern)
    if masks is not None:
        return masks
    masks = load_masks(path)
    require_fit(masks, layers, pattern, CHANNEL, where=path)
    return masks


def masks_from_file(
    module: nn.Module,
    provenance: Provenance,
    path: Path,
    *,
    deployable: bool = True,
    converted: Path | None = None,
) -> MaskSet:
    """Read the masks of a file and check them against the model.

    Args:
        module: The model.
        provenance: Of its weights.
        path: A mask file, or a checkpoint with pruning masks.
        deployable: Refuse the flat layout, which TensorRT does not accept.
        converted: The mask file to write if `path` is a checkpoint; without it, checkpoints are refused.

    Raises:
        InputError: The masks do not fit the model, or are not N:M.
    """
    layers, _ = trace_layers(module, provenance.preprocessing)
    state = module.state_dict()
    weights = {layer.name: state[layer.name].detach().cpu().float().numpy() for layer in layers}
    pattern = Pattern(2, 4)
    stored = checkpoint_masks(path, layers, pattern) if converted is not None else None
    if stored is None or converted is None:
        return read_masks(path, weights, layers, model=provenance.model, deployable=deployable)
    write_masks(
        converted,
        stored,
        weights,
        [layer for layer in layers if layer.name in stored],
        [],
        model=provenance.model,
        pattern=pattern,
        layout=CHANNEL,
        method=f"file {path.name}",
        weights_sha256="",
        permutation=provenance.permutation,
    )
    return read_masks(converted, weights, layers, model=provenance.model, deployable=deployable)


def checkpoint_masks(path: Path, layers: Sequence[Layer], pattern: Pattern) -> dict[str, npt.NDArray[np.bool_]] | None:
    """The N:M masks in a checkpoint of `torch.nn.utils.prune` or Apex ASP, by the model's names; None for other files.

    Masks that are not N:M or belong to layers that cannot be masked are left out, with a line in the log.

    Raises:
        InputError: The checkpoint has masks, but none can be used.
    """
    if not path.is_file() or is_mask_file(path):
        return None
    try:
        stored = stored_masks(path)
    except InputError:
        # A damaged mask file, for which `load_masks` has the message; a damaged checkpoint is named as such.
        if path.suffix == ".safetensors":
            return None
        raise
    if not stored:
        return None
    names = match_names(stored, [layer.name for layer in layers])
    known = {layer.name: layer for layer in layers}
    usable, left_out = {}, []
    for key, mask in stored.items():
        name = names.get(key, key)
        layer = known.get(name)
        if layer is not None and not mask_problem(mask, layer, pattern, CHANNEL):
            usable[name] = mask
        elif not mask.all():
            left_out.append(name)
    if not usable:
        raise InputError(
            f"the checkpoint has {len(stored)} pruning masks, but none is {pattern} along C of a layer that can be masked",
            where=path,
            found=listed(left_out),
            fix="for unstructured zeros, use maskplan convert, or choose layerwise masks, for which zeros cost nothing",
        )
    if left_out:
        log.info("%s: masks that are not %s are left out: %s", path.name, pattern, listed(left_out))
    log.info("%s: %d pruning masks are used", path.name, len(usable))
    return usable
