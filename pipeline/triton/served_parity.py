"""The parity gate with a served model in the place of the sparse one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from maskplan.engines.sidecar import read_engine
from maskplan.pipeline.core.artifacts import Provenance
from maskplan.pipeline.core.reports import ParityReport
from maskplan.pipeline.data.image_sets import identify, require_disjoint
from maskplan.pipeline.parity.compare import compare
from maskplan.pipeline.parity.model_files import OpenedModel, open_model, shared_preprocessing, val_images
from maskplan.pipeline.parity.options import CompareOptions
from maskplan.pipeline.triton.client import ServedModel, TritonClient
from maskplan.pipeline.triton.served_engine import served_classifier


@dataclass(frozen=True)
class GateOptions:
    """The gate on images.

    Attributes:
        against: The reference: an engine, an ONNX file or a checkpoint.
        data: Folder with `val/CLASS/*`, or of images without labels; None is the digits for the bundled model.
        mean: Mean of each channel, for a reference that other tools wrote.
        std: Standard deviation of each channel, likewise.
        thresholds: Of the gate.
    """

    against: Path
    data: Path | None
    mean: str | None
    std: str | None
    thresholds: CompareOptions


def served_parity(
    client: TritonClient, served: ServedModel, version: int, engine: Path | None, options: GateOptions
) -> ParityReport:
    """Run the reference here and the served model there, on the same images.

    Args:
        client: Connection to the server.
        served: The model on it.
        version: Its version.
        engine: The file that was deployed, for its record; None if it is not known.
        options: Reference, images and thresholds.

    Raises:
        InputError: The reference or the images cannot be used, or the server stops responding.
    """
    provenance = _provenance(engine)
    with open_model(options.against) as reference, served_classifier(client, served, version) as classifier:
        sides = [reference, OpenedModel(classifier, provenance)]
        preprocessing = shared_preprocessing(sides, options.mean, options.std)
        images = val_images(options.data, sides)
        if images is not None:
            shaped_by = [s for side in sides if side.provenance for s in side.provenance.image_sets]
            require_disjoint(identify(images), shaped_by)
        provenances = [side.provenance for side in sides]
        return compare(
            reference.classifier, classifier, preprocessing, provenances, images, options.thresholds, None, "served"
        )


def _provenance(engine: Path | None) -> Provenance | None:
    return read_engine(engine).provenance if engine is not None else None
