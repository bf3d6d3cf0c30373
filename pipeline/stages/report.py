"""The stages that describe the result: by layer, by pattern, and in the report."""

from __future__ import annotations

from dataclasses import replace

from maskplan.pipeline.core.artifacts import Checkpoint, MaskSet, OnnxModel
from maskplan.pipeline.core.reports import DepthReport
from maskplan.pipeline.core.serialization import encode
from maskplan.pipeline.masking.maskset import load_masks
from maskplan.pipeline.masking.statistics import MaskStatistics, mask_statistics
from maskplan.pipeline.models.state_dict import read_weights
from maskplan.pipeline.parity.bisect import BisectOptions, bisect
from maskplan.pipeline.parity.model_outputs import load_fixed_images
from maskplan.pipeline.report.record import ReportFiles, RunReport
from maskplan.pipeline.report.write import write_report
from maskplan.pipeline.stages.job import Images, Job

_DEPTH_IMAGES = 16


def measure_depth(job: Job, dense: OnnxModel, sparse: OnnxModel, images: Images | None) -> DepthReport:
    """Measure how far each layer of the sparse model departs from the dense one, on a few of the fixed images."""
    assert sparse.provenance is not None  # our own export
    provenance = sparse.provenance
    val = images.data.val if images is not None and provenance.trained else None
    count = min(job.recipe.compare.fixed_images, _DEPTH_IMAGES)

    def work() -> DepthReport:
        return bisect(dense.path, sparse.path, load_fixed_images(provenance.preprocessing, val, count), BisectOptions())

    inputs = {
        "onnx": [dense.sha256, sparse.sha256],
        "val": images.sets.val.key if images and val else None,
        "count": count,
    }
    return job.ws.stage("depth", DepthReport, inputs, work)


def measure_statistics(job: Job, checkpoint: Checkpoint, masks: MaskSet) -> MaskStatistics:
    """Count the patterns of the masks' groups and of magnitude masks for the same weights."""

    def work() -> MaskStatistics:
        chosen = load_masks(masks.path)
        stored = read_weights(checkpoint.path)
        weights = {name: stored[name].float().numpy() for name in chosen}
        return mask_statistics(chosen, weights, masks.pattern, masks.layout)

    return job.ws.stage("statistics", MaskStatistics, {"checkpoint": checkpoint.sha256, "masks": masks.sha256}, work)


def write(job: Job, report: RunReport) -> ReportFiles:
    """Write report.json and report.html."""
    # The same result under another command line is the same report.
    values = encode(replace(report, command=""), job.ws.folder)
    return job.ws.stage(
        "report",
        ReportFiles,
        {"report": values},
        lambda: write_report(report, job.ws.path("report.json"), job.ws.path("report.html")),
    )
