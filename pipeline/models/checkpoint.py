"""The load stage: from a model's name and a choice of weights to a dense `Checkpoint`, and from a checkpoint to a module."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from maskplan.pipeline.core.artifacts import Checkpoint, OutputKind, Preprocessing, Provenance, TensorSpec
from maskplan.pipeline.core.choices import LOGITS, VALUES
from maskplan.pipeline.core.errors import HostError, InputError, listed
from maskplan.pipeline.core.files import sha256_of, write_atomically
from maskplan.pipeline.core.output_kinds import guess_kinds, parse_kinds
from maskplan.pipeline.core.serialization import decode, encode
from maskplan.pipeline.core.validation import at_least
from maskplan.pipeline.data.digits import BUNDLED_MODEL
from maskplan.pipeline.models.computed_weights import fold_computed_weights, fold_computed_with_note
from maskplan.pipeline.models.fusing import fusable_blocks, fuse_blocks, note_fusable
from maskplan.pipeline.models.key_matching import match_keys
from maskplan.pipeline.models.layers import trace_layers
from maskplan.pipeline.models.module_outputs import INPUT, classes_of
from maskplan.pipeline.models.registry import BUNDLED_WEIGHTS, Architecture, build_model
from maskplan.pipeline.models.state_dict import (
    fit_weights,
    fold_with_note,
    read_metadata,
    read_state,
    serialize,
    tensors_sha256,
)
from maskplan.pipeline.models.state_selection import StateDict

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelOptions:
    """Which model and weights.

    Attributes:
        model: `resnet50`, `timm/NAME`, `path/to/file.py:factory` or `digits_resnet`.
        weights: `auto`, `pretrained`, `random` or a file.
        classes: Number of classes; None keeps the model's own.
        seed: For random weights.
        ema: Take the averaged weights of a file (True) or its raw ones (False); None prefers raw ones.
        fuse: Fuse the training branches of re-parameterizable blocks (RepVGG, MobileOne).
        outputs: What outputs hold where the guess from their shapes is wrong, as `parse_kinds` reads it.
    """

    model: str
    weights: str = "auto"
    classes: int | None = None
    seed: int = 0
    ema: bool | None = None
    fuse: bool = False
    outputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least(1, classes=self.classes)
        at_least(0, seed=self.seed)


def load_checkpoint(options: ModelOptions, out: Path) -> Checkpoint:
    """Write a model's dense weights to one safetensors file.

    Raises:
        InputError: Unknown model, or weights that cannot be read or do not fit.
        HostError: Pretrained weights are requested and not available.
    """
    architecture, provenance = _load(options)
    return save_checkpoint(architecture.module.state_dict(), provenance, out)


def open_checkpoint(options: ModelOptions) -> tuple[nn.Module, Provenance]:
    """As `load_checkpoint`, without writing: the module with its weights, and their provenance."""
    architecture, provenance = _load(options)
    return architecture.module, provenance


def save_checkpoint(state: Mapping[str, torch.Tensor], provenance: Provenance, out: Path) -> Checkpoint:
    """Write a state dict with its provenance in the header."""
    data = serialize(state, encode(provenance))
    return Checkpoint(out, write_atomically(out, data), len(data), provenance)


def read_checkpoint(path: Path) -> Checkpoint:
    """The record of a checkpoint that maskplan wrote.

    Raises:
        InputError: The file cannot be read or was written by another tool.
    """
    provenance = _read_provenance(path)
    if provenance is None:
        raise InputError("not a checkpoint of maskplan", where=path, fix="give its MODEL, and this file with --weights")
    return Checkpoint(path, sha256_of(path), path.stat().st_size, provenance)


def load_module(options: ModelOptions, checkpoint: Checkpoint) -> nn.Module:
    """The model with a checkpoint's weights, in evaluation mode."""
    return load_architecture(options, checkpoint).module


def load_architecture(options: ModelOptions, checkpoint: Checkpoint) -> Architecture:
    """As `load_module`, with the preprocessing and the labels that the model's code gives now."""
    architecture = build_model(options.model, seed=options.seed, classes=options.classes)
    _load_own(architecture, checkpoint.provenance, read_state(checkpoint.path), checkpoint.path)
    return architecture


def rebuild_module(checkpoint: Checkpoint) -> nn.Module:
    """The model that a checkpoint's provenance names, with its weights, in evaluation mode.

    Raises:
        InputError: It cannot be built: the provenance of a model in a Python file does not contain the folder.
    """
    provenance = checkpoint.provenance
    try:
        return load_module(ModelOptions(provenance.model, classes=provenance.classes or None), checkpoint)
    except InputError as error:
        raise InputError(
            "the checkpoint's model cannot be built",
            where=checkpoint.path,
            found=f"{provenance.model}: {error.what}",
            fix="for a model in your own file, give an ONNX file: maskplan export FILE.py:factory --weights ...",
        ) from error


def _load(options: ModelOptions) -> tuple[Architecture, Provenance]:
    file = weights_file(options)
    recorded = None if file is None else _read_provenance(file)
    architecture, origin, trained = _build_with_weights(options, file, recorded)
    folded = recorded.folded if recorded is not None else ()
    if options.fuse and (recorded is None or fusable_blocks(architecture.module)):
        count = fuse_blocks(architecture.module, architecture.preprocessing, architecture.name)
        log.info("%s: %d blocks are fused", architecture.name, count)
    elif not options.fuse:
        note_fusable(architecture.module, architecture.name)
    if not folded:
        folded = fold_computed_with_note(architecture.module, architecture.preprocessing, architecture.name)
    if recorded is not None and not options.outputs:
        return architecture, replace(recorded, folded=folded)
    _, outputs = trace_layers(architecture.module, architecture.preprocessing)
    kinds = _kinds(options, architecture.preprocessing, outputs)
    classes = classes_of(outputs, kinds)
    if recorded is not None:
        return architecture, replace(recorded, folded=folded, classes=classes, outputs=() if classes else kinds)
    _require_classes(options, outputs, kinds)
    if classes and architecture.labels and len(architecture.labels) != classes:
        raise InputError(
            "LABELS does not name the model's classes",
            where=options.model,
            found=f"{len(architecture.labels)} names, {classes} outputs",
            fix="list each class once, in the order of the outputs",
        )
    provenance = Provenance(
        model=architecture.name,
        trained=trained,
        origin=origin,
        dense_sha256=tensors_sha256(architecture.module.state_dict()),
        classes=classes,
        labels=architecture.labels if classes else (),
        preprocessing=architecture.preprocessing,
        folded=folded,
        outputs=() if classes else kinds,
    )
    return architecture, provenance


def _kinds(
    options: ModelOptions, preprocessing: Preprocessing, outputs: tuple[TensorSpec, ...]
) -> tuple[OutputKind, ...]:
    """What the outputs hold: guessed by their shapes, unless the options say it."""
    image = TensorSpec(INPUT, "float32", (None, preprocessing.channels, preprocessing.height, preprocessing.width))
    guessed = [
        kind if spec.shape[:1] == (None,) else OutputKind(spec.name, VALUES)
        for spec, kind in zip(outputs, guess_kinds([image], outputs), strict=True)
    ]
    kinds = parse_kinds(options.outputs, guessed, where=options.model)
    wrong = [
        f"{kind} of {spec.dtype} with {len(spec.shape)} axes"
        for spec, kind in zip(outputs, kinds, strict=True)
        if kind.kind == LOGITS and (kind.axis >= len(spec.shape) or not spec.dtype.startswith("float"))
    ]
    if wrong:
        fix = "logits are floats; the axis of their classes is counted from 0, which is the batch"
        raise InputError("invalid --outputs", where=options.model, found=listed(wrong), fix=fix)
    return kinds


def _require_classes(options: ModelOptions, outputs: tuple[TensorSpec, ...], kinds: tuple[OutputKind, ...]) -> None:
    """Raise if the model does not have the number of classes that was asked for."""
    shapes = {spec.name: spec.shape for spec in outputs}
    sizes = {shapes[k.name][k.axis] for k in kinds if k.kind == LOGITS and k.axis < len(shapes[k.name])}
    # A single score for each image is no class, but was asked for as one.
    sizes |= {spec.shape[1] for spec in outputs if len(outputs) == 1 and len(spec.shape) == 2}
    if options.classes is not None and options.classes not in sizes:
        found = ", ".join(sorted(map(str, sizes - {None}))) or "none"
        raise InputError(
            "the model has another number of classes",
            where=options.model,
            found=f"{found} outputs, --classes {options.classes}",
            fix="omit --classes, and set the number of classes where the model is built",
        )


def _load_own(architecture: Architecture, provenance: Provenance, state: StateDict, path: Path) -> None:
    """Load a checkpoint that maskplan wrote: its weights are plain, and so is the module afterwards."""
    fold_with_note(architecture.module, architecture.name)
    is_fused = match_keys(state.tensors, architecture.module.state_dict(), where=path) is None
    if is_fused and fusable_blocks(architecture.module):
        fuse_blocks(architecture.module, architecture.preprocessing, architecture.name)
    if provenance.folded:
        fold_computed_weights(architecture.module, architecture.preprocessing, provenance.folded)
    fit_weights(architecture.module, state, where=path)


def weights_file(options: ModelOptions) -> Path | None:
    """The file with the requested weights; None for random weights and those that a library downloads."""
    if options.weights not in ("auto", "pretrained", "random"):
        return Path(options.weights)
    if options.model == BUNDLED_MODEL and options.classes is None and options.weights != "random":
        return BUNDLED_WEIGHTS
    return None


def _build_with_weights(
    options: ModelOptions, file: Path | None, recorded: Provenance | None
) -> tuple[Architecture, str, bool]:
    """The module with the requested weights, their origin, and whether they are trained."""

    def build(pretrained: bool = False) -> Architecture:
        return build_model(options.model, seed=options.seed, classes=options.classes, pretrained=pretrained)

    def folded(architecture: Architecture) -> Architecture:
        fold_with_note(architecture.module, architecture.name)
        return architecture

    if file is not None:
        state = read_state(file, ema=options.ema)
        architecture = build()
        if recorded is not None:
            _load_own(architecture, recorded, state, file)
        else:
            fit_weights(architecture.module, state, where=file, ema=options.ema)
        return architecture, file.name, True
    if options.ema is not None:
        raise InputError("--ema and --no-ema choose between the weights of a file", fix="give --weights FILE")
    if options.weights == "pretrained":
        return folded(build(pretrained=True)), "pretrained", True
    if options.weights == "auto":
        try:
            if options.classes is not None:
                raise HostError("pretrained weights have their own classes")
            return folded(build(pretrained=True)), "pretrained", True
        except HostError as error:
            log.warning("%s; using random weights: suitable for timing only, not for accuracy", error.what)
    return folded(build()), f"random, seed {options.seed}", False


def _read_provenance(path: Path) -> Provenance | None:
    # A missing file has its own message, from `read_state`.
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    metadata = read_metadata(path)
    if metadata is None:
        return None
    try:
        return decode(Provenance, metadata)
    except ValueError as error:
        raise InputError(
            "the checkpoint's metadata cannot be read",
            where=path,
            found=error,
            fix="write it again with this maskplan",
        ) from error
