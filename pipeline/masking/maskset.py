"""Mask files: written with their provenance, validated when read."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError

from maskplan.pipeline.core.artifacts import DenseLayer, ImageSet, Layer, Learning, MaskedLayer, MaskSet, Pattern
from maskplan.pipeline.core.choices import CHANNEL, FLAT, Layout
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.files import sha256_of, write_atomically
from maskplan.pipeline.core.serialization import decode, encode
from maskplan.pipeline.masking.eligibility import ineligible_reason
from maskplan.pipeline.masking.magnitude import kept_magnitude, magnitude_mask
from maskplan.pipeline.masking.patterns import count_violations, group, parse_layout, parse_pattern
from maskplan.pipeline.masking.policy import COMPUTED, UNUSED
from maskplan.pipeline.models.state_dict import METADATA_KEY, read_metadata

Masks = Mapping[str, npt.NDArray[np.bool_]]
Weights = Mapping[str, npt.NDArray[np.floating]]

NOT_IN_FILE = "not_in_mask_file"


def write_masks(
    out: Path,
    masks: Masks,
    weights: Weights,
    layers: Sequence[Layer],
    dense: Sequence[DenseLayer],
    *,
    model: str,
    pattern: Pattern,
    layout: Layout,
    method: str,
    weights_sha256: str,
    learning: Learning | None = None,
    image_sets: tuple[ImageSet, ...] = (),
    permutation: str | None = None,
) -> MaskSet:
    """Write a mask file: one bool tensor per masked weight, with pattern, layout, method and digests in its metadata.

    Args:
        out: The file to write.
        masks: Bool masks by weight name, each shaped like its weight.
        weights: The weights that the masks were made for, by name.
        layers: The masked layers.
        dense: The layers that stay dense, with reasons.
        model: Name of the model.
        pattern: N:M.
        layout: Layout of the groups.
        method: Method that made the masks.
        weights_sha256: Digest of the model's state dict.
        learning: Record of learning, for learned masks.
        image_sets: Image sets that the masks depend on.
        permutation: Digest of the channel permutation of the weights, if any.

    Raises:
        HostError: The file cannot be written.
    """
    mask_set = MaskSet(
        path=out,
        sha256="",
        model=model,
        pattern=pattern,
        layout=layout,
        method=method,
        weights_sha256=weights_sha256,
        masked=describe(masks, weights, layers, pattern, layout),
        dense=tuple(dense),
        learning=learning,
        image_sets=image_sets,
        permutation=permutation,
    )
    return _write(mask_set, masks)


def exclude_layers(masks: MaskSet, names: Collection[str], reason: str, out: Path) -> MaskSet:
    """Write a copy of a mask file without the masks of some layers, which are then listed as dense with a reason.

    Raises:
        InputError: The file of `masks` is missing or damaged.
    """
    excluded = tuple(DenseLayer(m.name, m.shape, m.macs, reason) for m in masks.masked if m.name in names)
    kept = tuple(m for m in masks.masked if m.name not in names)
    tensors = {name: mask for name, mask in load_masks(masks.path).items() if name not in names}
    return _write(replace(masks, path=out, masked=kept, dense=masks.dense + excluded), tensors)


def _write(mask_set: MaskSet, masks: Masks) -> MaskSet:
    """Write the masks to the record's path; returns the record with the file's digest."""
    header = {
        "model": mask_set.model,
        "pattern": str(mask_set.pattern),
        "layout": mask_set.layout,
        "method": mask_set.method,
        "weights_sha256": mask_set.weights_sha256,
        "image_sets": encode(mask_set.image_sets),
        "permutation": mask_set.permutation,
    }
    tensors = {name: np.ascontiguousarray(mask) for name, mask in masks.items()}
    data = safetensors.numpy.save(tensors, {METADATA_KEY: json.dumps(header, sort_keys=True)})
    return replace(mask_set, sha256=write_atomically(mask_set.path, data))


def load_masks(path: Path) -> dict[str, npt.NDArray[np.bool_]]:
    """Read all masks of a file, by weight name.

    Raises:
        InputError: The file is missing, damaged or empty, or has tensors that are not bool.
    """
    if not path.is_file():
        raise InputError(
            "mask file not found", where=path, fix="check the path, or choose a method: learned or magnitude"
        )
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            wrong = [
                f"{name} is {kind}"
                for name in file.keys()  # noqa: SIM118 (no dict)
                if (kind := file.get_slice(name).get_dtype()) != "BOOL"
            ]
        masks = {} if wrong else safetensors.numpy.load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(
            "the mask file cannot be read",
            where=path,
            found=error,
            fix="give a file that `maskplan mask` wrote",
        ) from error
    if wrong or not masks:
        raise InputError(
            "not a mask file",
            where=path,
            found=listed(wrong) or "no tensors",
            fix="masks are bool tensors, one for each masked weight",
        )
    return masks


def is_mask_file(path: Path) -> bool:
    """Whether a file is safetensors and holds bool tensors only."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return all(file.get_slice(name).get_dtype() == "BOOL" for name in file.keys())  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError, ValueError):
        return False


def read_masks(
    path: Path, weights: Weights, layers: Sequence[Layer], *, model: str, deployable: bool = True
) -> MaskSet:
    """Read a mask file and check it against the model it is meant for.

    Args:
        path: A file of maskplan, or of any tool that writes bool tensors under the weights' names (read as 2:4 along C).
        weights: The model's weights by name.
        layers: The model's layers.
        model: Its name, for files that do not record one.
        deployable: Refuse the flat layout, which TensorRT does not accept.

    Raises:
        InputError: Masks of another model, of the wrong shape, for layers that cannot be N:M, or not N:M themselves; all
            invalid masks are counted.
    """
    masks = load_masks(path)
    header: dict[str, Any] = read_metadata(path) or {}
    pattern = parse_pattern(str(header.get("pattern", "2:4")))
    layout = parse_layout(str(header.get("layout", CHANNEL)))
    if deployable and layout != CHANNEL:
        raise InputError(
            f"masks in the layout {layout!r} cannot be deployed",
            where=path,
            found="groups along the flattened C*R*S axis",
            fix="TensorRT takes groups along C: make the masks with layout 'channel'",
        )
    require_fit(masks, layers, pattern, layout, where=path)
    known = {layer.name: layer for layer in layers}
    dense = [
        DenseLayer(
            layer.name,
            layer.shape,
            layer.macs,
            ineligible_reason(layer.op, layer.shape[1], layer.groups, pattern.m)
            or (UNUSED if layer.position is None else COMPUTED if layer.computed else NOT_IN_FILE),
        )
        for layer in layers
        if layer.name not in masks
    ]
    return MaskSet(
        path=path,
        sha256=sha256_of(path),
        model=str(header.get("model", model)),
        pattern=pattern,
        layout=layout,
        method=str(header.get("method", f"file {path.name}")),
        weights_sha256=str(header.get("weights_sha256", "")),
        masked=describe(masks, weights, [known[name] for name in masks], pattern, layout),
        dense=tuple(dense),
        image_sets=_image_sets(header),
        permutation=header.get("permutation"),
    )


def require_fit(masks: Masks, layers: Sequence[Layer], pattern: Pattern, layout: Layout, *, where: object) -> None:
    """Raise unless every mask belongs to an eligible layer, has its shape, and is N:M.

    Raises:
        InputError: Otherwise; all invalid masks are counted.
    """
    known = {layer.name: layer for layer in layers}
    unknown = [name for name in masks if name not in known]
    if unknown:
        raise InputError(
            "the masks are for another model",
            where=where,
            found=f"{len(unknown)} of {len(masks)} names are not layers of this model: {listed(unknown)}",
            fix="give the masks that were made for this model",
        )
    problems = []
    for name, mask in masks.items():
        problem = mask_problem(mask, known[name], pattern, layout)
        if problem is not None:
            problems.append(f"{name}: {problem}")
    if problems:
        raise InputError(
            f"{len(problems)} of {len(masks)} masks cannot be used",
            where=where,
            found=listed(problems, 3),
            fix=f"make {pattern} masks along C for this model",
        )


def mask_problem(mask: npt.NDArray[np.bool_], layer: Layer, pattern: Pattern, layout: Layout) -> str | None:
    """Why a mask cannot be used for a layer; None if it can."""
    if mask.shape != layer.shape:
        return f"shape {mask.shape}, but the weight has {layer.shape}"
    # The flat layout fits any weight: its rows are padded.
    reason = ineligible_reason(layer.op, layer.shape[1], layer.groups, pattern.m) if layout == CHANNEL else None
    if reason is None and layer.computed:
        reason = COMPUTED
    if reason is not None:
        return f"the layer cannot be {pattern} ({reason})"
    count = count_violations(mask, pattern, layout)
    return f"{count} groups keep more than {pattern.n} of {pattern.m}" if count else None


def describe(
    masks: Masks, weights: Weights, layers: Sequence[Layer], pattern: Pattern, layout: Layout
) -> tuple[MaskedLayer, ...]:
    """Per masked layer, in forward order: groups, MACs, the kept share of magnitude and the highest share possible."""
    described = []
    for layer in sorted(layers, key=lambda layer: (layer.position is None, layer.position or 0)):
        weight, mask = weights[layer.name], masks[layer.name]
        best = kept_magnitude(weight, magnitude_mask(weight, pattern, layout))
        groups = group(mask, pattern.m, layout, pad=layout == FLAT).size // pattern.m
        described.append(MaskedLayer(layer.name, layer.shape, groups, layer.macs, kept_magnitude(weight, mask), best))
    return tuple(described)


def _image_sets(header: Mapping[str, Any]) -> tuple[ImageSet, ...]:
    try:
        return tuple(decode(ImageSet, values) for values in header.get("image_sets", []))
    except (TypeError, ValueError) as error:
        raise InputError("the mask file's metadata cannot be read", found=error, fix="recreate the masks") from error
