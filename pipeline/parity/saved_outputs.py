"""Save a model's outputs to a file, so that the dense model runs once for any number of comparisons."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maskplan.pipeline.core.artifacts import ImageSet, Preprocessing
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.files import readable, write_atomically
from maskplan.pipeline.core.serialization import decode, encode, parse_json
from maskplan.pipeline.data.dataset import Split
from maskplan.pipeline.models.state_dict import METADATA_KEY
from maskplan.pipeline.parity.model_outputs import ModelOutputs

# Names of the tensors in the file.
_FIXED, _TOP1, _TOP5 = "fixed", "first", "in_top5"
_TYPES = {_FIXED: np.float32, _TOP1: np.int32, _TOP5: np.bool_}


@dataclass(frozen=True)
class OutputsKey:
    """What saved outputs depend on: they are reused only if all of it is the same.

    Attributes:
        model_sha256: Digest of the model's file.
        preprocessing: Preprocessing of the images.
        images_sha256: Digest of the image set, its order and its labels; `noise` without images.
        fixed_images: Number of fixed images requested.
    """

    model_sha256: str
    preprocessing: Preprocessing
    images_sha256: str
    fixed_images: int


def outputs_key(
    model_sha256: str, preprocessing: Preprocessing, images: Split | None, image_set: ImageSet | None, fixed_images: int
) -> OutputsKey:
    """The key of a model's outputs on these images; `image_set` holds their digest."""
    if images is None or image_set is None:
        return OutputsKey(model_sha256, preprocessing, "noise", fixed_images)
    digest = hashlib.sha256(image_set.sha256.encode())
    for index, label in zip(images.indices.tolist(), images.labels.tolist(), strict=True):
        digest.update(f"\n{images.images.name(index)}\t{label}".encode())
    return OutputsKey(model_sha256, preprocessing, digest.hexdigest(), fixed_images)


def save_outputs(path: Path, key: OutputsKey, outputs: ModelOutputs) -> None:
    """Write outputs and their key as safetensors.

    Raises:
        HostError: The file cannot be written.
    """
    import safetensors.numpy

    header = {"answers": encode(key), "finite": outputs.finite}
    tensors = {_FIXED: outputs.fixed_logits, _TOP1: outputs.top1, _TOP5: outputs.in_top5}
    data = safetensors.numpy.save(
        {name: np.ascontiguousarray(value) for name, value in tensors.items()},
        {METADATA_KEY: json.dumps(header, sort_keys=True)},
    )
    write_atomically(path, data, option="--save-dense")


def load_outputs(path: Path, key: OutputsKey) -> ModelOutputs:
    """Read the outputs that were saved under this key: the same model, images and preprocessing.

    Raises:
        InputError: The file is missing, damaged or of another kind, or its key differs; every difference is listed.
    """
    import safetensors.numpy
    from safetensors import SafetensorError, safe_open

    with readable(path), path.open("rb"):
        pass
    try:
        with safe_open(path, "np") as file:
            header = parse_json((file.metadata() or {})[METADATA_KEY])
        saved, finite = decode(OutputsKey, header["answers"]), header["finite"]
        tensors = safetensors.numpy.load_file(path)
        fixed, top1, in_top5 = (tensors[name] for name in (_FIXED, _TOP1, _TOP5))
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise _invalid_file(path, str(error).partition("\n")[0]) from error
    well_formed = fixed.ndim == 2 and top1.ndim == 1 and top1.shape == in_top5.shape and isinstance(finite, bool)
    if not well_formed or any(tensors[name].dtype != kind for name, kind in _TYPES.items()):
        raise _invalid_file(path, {name: (str(t.dtype), t.shape) for name, t in tensors.items()})
    descriptions = {
        "model_sha256": "the dense model is a different file",
        "preprocessing": "the preprocessing is different",
        "images_sha256": "the images or their labels are different",
        "fixed_images": f"{key.fixed_images} fixed images are requested, {saved.fixed_images} are saved",
    }
    differences = [text for name, text in descriptions.items() if getattr(saved, name) != getattr(key, name)]
    if differences:
        raise InputError(
            "the saved results belong to a different comparison",
            where=path,
            found="; ".join(differences),
            fix="run once more with --save-dense, without --dense-results",
        )
    return ModelOutputs(fixed, top1, in_top5, finite)


def _invalid_file(path: Path, found: object) -> InputError:
    return InputError("not a file of saved results", where=path, found=found, fix="create one with --save-dense")
