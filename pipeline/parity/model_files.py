"""Open what is compared: engines, ONNX files and checkpoints, and the images that they are compared on."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maskplan.engines.base import Classifier, Engine, is_classifier
from maskplan.engines.build import open_engine
from maskplan.engines.ort import OrtEngine
from maskplan.engines.sidecar import read_engine, sidecar_path
from maskplan.exporters.metadata import describe_onnx, load_onnx, read_provenance
from maskplan.exporters.onnx_export import ExportOptions, export_onnx
from maskplan.exporters.run_shapes import baked_batch
from maskplan.pipeline.core.artifacts import Preprocessing, Profile, Provenance
from maskplan.pipeline.core.choices import GPU_BACKENDS
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.image_shape import image_shape
from maskplan.pipeline.data.dataset import Split
from maskplan.pipeline.data.samples import ImageOptions, is_channels_last
from maskplan.pipeline.data.source import find_val
from maskplan.pipeline.models.checkpoint import read_checkpoint, rebuild_module
from maskplan.pipeline.parity.unlabeled_images import open_unlabeled


@dataclass(frozen=True)
class OpenedModel:
    """An opened model; `provenance` is None for a file that other tools wrote."""

    classifier: Classifier
    provenance: Provenance | None

    @property
    def classes(self) -> int:
        """Number of outputs; found by a run if the graph does not declare it."""
        shape = self.classifier.output.shape
        known = shape[-1] if shape else None
        if known is not None:
            return known
        one = tuple(d or 1 for d in self.classifier.input.shape)
        return int(self.classifier.logits(np.zeros(one, np.float32)).shape[-1])


@dataclass(frozen=True)
class OpenedNetwork:
    """An opened network of any kind; `provenance` is None for a file that other tools wrote."""

    engine: Engine
    name: str
    profiles: tuple[Profile, ...]
    provenance: Provenance | None

    @property
    def classifies_images(self) -> bool:
        """Whether it has one float image input, channels first, and one output of logits."""
        if not is_classifier(self.engine.inputs, self.engine.outputs):
            return False
        spec = self.engine.inputs[0]
        return spec.shape[1] in (1, 3, None) and not is_channels_last(spec)


@contextlib.contextmanager
def open_model(path: Path) -> Iterator[OpenedModel]:
    """Open a classifier.

    Raises:
        InputError: As `open_network`, or it is no classifier.
    """
    with open_network(path) as opened:
        yield as_classifier(opened)


def as_classifier(network: OpenedNetwork) -> OpenedModel:
    """The classifier on an opened network, which stays the owner of the engine.

    Raises:
        InputError: It is no classifier.
    """
    return OpenedModel(Classifier(network.engine, network.name, network.profiles), network.provenance)


@contextlib.contextmanager
def open_network(path: Path) -> Iterator[OpenedNetwork]:
    """Open a file by its kind; a checkpoint is exported to a temporary ONNX file, which needs PyTorch.

    Raises:
        InputError: The file is missing, damaged or of an unknown kind.
    """
    with contextlib.ExitStack() as stack:

        def opened(engine: Engine, profiles: tuple[Profile, ...], provenance: Provenance | None) -> OpenedNetwork:
            stack.callback(engine.close)
            return OpenedNetwork(engine, path.name, profiles, provenance)

        if path.suffix == ".plan" or (path.suffix == ".onnx" and sidecar_path(path).is_file()):
            record = read_engine(path)
            profiles = record.profiles if record.backend in GPU_BACKENDS else ()
            yield opened(open_engine(record), profiles, record.provenance)
        elif path.suffix == ".onnx":
            model = load_onnx(path)
            engine = OrtEngine(path)
            if (found := baked_batch(describe_onnx(path, model), model)) is not None:
                engine.inputs, engine.outputs = found.inputs, found.outputs
            yield opened(engine, (), read_provenance(model, path))
        elif path.suffix == ".safetensors":
            checkpoint = read_checkpoint(path)
            provenance = checkpoint.provenance
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="maskplan-")))
            (exported,) = export_onnx(
                rebuild_module(checkpoint), provenance, ExportOptions(), {"fp32": folder / "model.onnx"}
            )
            yield opened(OrtEngine(exported.path), (), provenance)
        else:
            raise InputError(
                "cannot compare this kind of file",
                where=path,
                fix="give an engine, an .onnx file, or a checkpoint of maskplan",
            )


def val_images(data: Path | None, models: Sequence[OpenedModel]) -> Split | None:
    """The folder's images, labeled or not; else the digits for the bundled model; else None.

    Raises:
        InputError: The folder cannot be used.
    """
    provenance = next((m.provenance for m in reversed(models) if m.provenance), None)
    unlabeled = open_unlabeled(data) if data is not None else None
    return unlabeled or find_val(
        data,
        model=provenance.model if provenance else None,
        labels=provenance.labels if provenance else (),
        outputs=models[0].classes,
    )


def shared_preprocessing(
    models: Sequence[OpenedModel],
    mean: str | None,
    std: str | None,
    shape: tuple[int, ...] | None = None,
    *,
    has_option: bool = False,
) -> Preprocessing:
    """The preprocessing of all models: from a record, or for foreign files from the input's shape, `mean` and `std`.

    `shape`, with or without the channels, is the size of an image where the input's is dynamic; `has_option` says whether
    the command has an option for it, for the message.

    Raises:
        InputError: Records differ, or a foreign model has no fixed input size, or the numbers do not fit its channels.
    """
    known = [m.provenance.preprocessing for m in models if m.provenance is not None]
    if known:
        if any(k != known[0] for k in known):
            raise InputError(
                "the models need different preprocessing",
                found=f"{known[0]}; {known[1]}",
                fix="compare models with the same input",
            )
        return known[0]
    channels, height, width = _image_size(models[0].classifier, shape, has_option)
    return Preprocessing(
        channels, height, width, 0, "bilinear", _channel_values(mean, channels, 0.0), _std_values(std, channels)
    )


def image_preprocessing(models: Sequence[OpenedModel], images: ImageOptions) -> Preprocessing:
    """As `shared_preprocessing`, from options that are read already."""

    def text(values: tuple[float, ...] | None) -> str | None:
        return None if values is None else ",".join(map(repr, values))

    return shared_preprocessing(models, text(images.mean), text(images.std), images.shape, has_option=True)


def _image_size(classifier: Classifier, given: tuple[int, ...] | None, has_option: bool) -> tuple[int, int, int]:
    """Channels, height and width of a model's images.

    Raises:
        InputError: The input is channels-last, its channels or size cannot be those of an image, or they are dynamic and
            not given, or the given ones differ.
    """
    _, channels, height, width = classifier.input.shape
    ask = "give the size with --shape, for example --shape 3x224x224, or " if has_option else ""
    if given is not None and (channels in (1, 3, None) and width not in (1, 3)):
        channels, height, width = image_shape(classifier.input, given, classifier.name)
    if channels not in (1, 3) and width in (1, 3, 4):
        what = "the model's input is channels-last (N, H, W, channels)"
        fix = "export it channels-first, as (N, channels, H, W)"
    elif channels is None:
        what, fix = "the number of channels of the model's input is dynamic", f"{ask}export with 1 or 3 channels"
    elif channels not in (1, 3):
        what = f"the model's input has {channels} channel{'s' if channels != 1 else ''}, and images have 1 or 3"
        fix = "use a model for gray or RGB images"
    elif height is None or width is None:
        what, fix = "the model has no fixed input size", f"{ask}export with fixed image sizes"
    elif height < 1 or width < 1:
        what, fix = "the model's input holds no pixels", "export with the size of an image"
    else:
        return channels, height, width
    raise InputError(what, where=classifier.name, found=f"{classifier.input.name} {_shape(classifier)}", fix=fix)


def _shape(classifier: Classifier) -> str:
    return f"({', '.join('dynamic' if d is None else str(d) for d in classifier.input.shape)})"


def _std_values(text: str | None, count: int) -> tuple[float, ...]:
    values = _channel_values(text, count, 1.0)
    if min(values) <= 0:
        raise InputError("invalid standard deviation", found=repr(text), fix="give numbers above zero")
    return values


def _channel_values(text: str | None, count: int, default: float) -> tuple[float, ...]:
    if text is None:
        return (default,) * count
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != count or not all(map(math.isfinite, values)):
        raise InputError(
            "expected one number per channel",
            found=repr(text),
            fix=f"give {count} numbers, separated by commas",
        )
    return values
