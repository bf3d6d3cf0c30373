"""A model's answers in a file, so that the dense side of a gate runs once for any number of sparse ones."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maskplan.pipeline.core.artifacts import ImageSet, Preprocessing
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.files import readable, write_atomically
from maskplan.pipeline.core.serialization import decode, encode
from maskplan.pipeline.data.dataset import Split
from maskplan.pipeline.models.state_dict import METADATA_KEY
from maskplan.pipeline.parity.model_outputs import ModelOutputs

_FIXED, _FIRST, _TOP5 = "fixed", "first", "in_top5"
_TYPES = {_FIXED: np.float32, _FIRST: np.int32, _TOP5: np.bool_}


@dataclass(frozen=True)
class OutputsKey:
    """What answers belong to: none of it may differ where they are used again.

    Attributes:
        model_sha256: Digest of the model's file.
        preprocessing: Of the images.
        images_sha256: Digest of the image set, their order and their labels; `noise` without images.
        fixed_images: How many were asked for.
    """

    model_sha256: str
    preprocessing: Preprocessing
    images_sha256: str
    fixed_images: int


def outputs_key(
    model_sha256: str, preprocessing: Preprocessing, images: Split | None, image_set: ImageSet | None, fixed_images: int
) -> OutputsKey:
    """The key of a model's answers to these images; `image_set` is their digest."""
    if images is None or image_set is None:
        return OutputsKey(model_sha256, preprocessing, "noise", fixed_images)
    digest = hashlib.sha256(image_set.sha256.encode())
    for index, label in zip(images.indices.tolist(), images.labels.tolist(), strict=True):
        digest.update(f"\n{images.images.name(index)}\t{label}".encode())
    return OutputsKey(model_sha256, preprocessing, digest.hexdigest(), fixed_images)


def save_outputs(path: Path, asked: OutputsKey, said: ModelOutputs) -> None:
    """Write answers with what they belong to, as safetensors.

    Raises:
        HostError: The file cannot be written.
    """
    import safetensors.numpy

    header = {"answers": encode(asked), "finite": said.finite}
    tensors = {_FIXED: said.fixed, _FIRST: said.first, _TOP5: said.in_top5}
    data = safetensors.numpy.save(
        {name: np.ascontiguousarray(value) for name, value in tensors.items()},
        {METADATA_KEY: json.dumps(header, sort_keys=True)},
    )
    write_atomically(path, data, option="--save-dense")


def load_outputs(path: Path, asked: OutputsKey) -> ModelOutputs:
    """Read answers that belong to this model, these images and this preprocessing.

    Raises:
        InputError: The file is missing or no such file, or it belongs to something else; every difference is named.
    """
    import safetensors.numpy
    from safetensors import SafetensorError, safe_open

    with readable(path), path.open("rb"):
        pass
    try:
        with safe_open(path, "np") as file:
            header = json.loads((file.metadata() or {})[METADATA_KEY])
        saved, finite = decode(OutputsKey, header["answers"]), header["finite"]
        tensors = safetensors.numpy.load_file(path)
        fixed, first, in_top5 = (tensors[name] for name in (_FIXED, _FIRST, _TOP5))
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise _no_answers(path, str(error).partition("\n")[0]) from error
    well_formed = fixed.ndim == 2 and first.ndim == 1 and first.shape == in_top5.shape and isinstance(finite, bool)
    if not well_formed or any(tensors[name].dtype != kind for name, kind in _TYPES.items()):
        raise _no_answers(path, {name: (str(t.dtype), t.shape) for name, t in tensors.items()})
    told = {
        "model_sha256": "the dense model is another file",
        "preprocessing": "images are preprocessed otherwise",
        "images_sha256": "the images or their labels are others",
        "fixed_images": f"{asked.fixed_images} fixed images are asked for, {saved.fixed_images} were",
    }
    differences = [text for name, text in told.items() if getattr(saved, name) != getattr(asked, name)]
    if differences:
        raise InputError(
            "the saved results belong to something else",
            where=path,
            found="; ".join(differences),
            fix="run once more with --save-dense, without --dense-results",
        )
    return ModelOutputs(fixed, first, in_top5, finite)


def _no_answers(path: Path, found: object) -> InputError:
    return InputError("not a file of saved results", where=path, found=found, fix="make one with --save-dense")
