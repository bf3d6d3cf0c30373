"""`maskplan stability`: how much masks, and updates of the weights under them, can change a network's outputs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskplan.pipeline.cli import options
from maskplan.pipeline.cli.help_pages import add_command
from maskplan.pipeline.cli.options import override, write_report
from maskplan.pipeline.core.terminal import print_line

if TYPE_CHECKING:
    from maskplan.pipeline.data.dataset import Split
    from maskplan.pipeline.stability.record import PairReport, Regime, StabilityReport

_EXAMPLES = """
maskplan stability digits_resnet --masks masks.safetensors --report stability.json
maskplan stability resnet50 --masks masks.safetensors --sparse sparse.safetensors --data imagenet --images 2000
maskplan stability resnet50 --weights old.pth --masks masks.safetensors --updated new.pth --data imagenet
"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    add_command(app, stability, _EXAMPLES, _defaults)


def _defaults() -> dict[str, object]:
    from maskplan.pipeline.stability.analyze import StabilityOptions

    return vars(StabilityOptions())


def stability(
    model: options.Model,
    masks: Annotated[Path, typer.Option(help="Mask file, or a checkpoint with pruning masks (torch prune, ASP).")],
    weights: options.Weights = "auto",
    ema: options.Ema = None,
    fuse: options.Fuse = False,
    sparse: Annotated[
        Path | None,
        typer.Option(help="Analyze this pruned (and perhaps recalibrated) checkpoint instead of masks times weights."),
    ] = None,
    updated: Annotated[
        Path | None,
        typer.Option(help="Newer dense weights: analyze the update from the old ones under the same masks."),
    ] = None,
    data: options.Data = None,
    images: Annotated[int | None, typer.Option(min=1, help="Number of val/ images to use.")] = None,
    confidence: Annotated[float | None, typer.Option(help="Confidence of the limit on the flip rate.")] = None,
    classes: options.Classes = None,
    seed: options.Seed = 0,
    report: options.Report = None,
) -> None:
    """Bound the effect of masking on MODEL's outputs, certify images whose class cannot change, and limit the flip rate.

    Images come from val/. They must not have been used to choose the masks or to recalibrate. All computation is in float64.
    """
    from maskplan.pipeline.core.errors import InputError
    from maskplan.pipeline.core.serialization import encode
    from maskplan.pipeline.data.image_sets import identify, require_disjoint
    from maskplan.pipeline.masking.maskset import load_masks
    from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
    from maskplan.pipeline.pruning.bake import baked_state
    from maskplan.pipeline.pruning.mask import masks_from_file
    from maskplan.pipeline.stability.analyze import StabilityOptions, Weights, analyze, require_masked, under_masks

    stability_options = override(StabilityOptions(seed=seed), images=images, confidence=confidence)
    module, provenance = open_checkpoint(ModelOptions(model, weights, classes, seed, ema, fuse))
    with tempfile.TemporaryDirectory(prefix="maskplan-") as folder:
        converted = Path(folder) / "masks.safetensors"
        mask_set = masks_from_file(module, provenance, masks, deployable=False, converted=converted)
        tensors, masked_state = load_masks(mask_set.path), baked_state(module, mask_set)
    if mask_set.permutation != provenance.permutation:
        raise InputError(
            "the channels of the masks and of the weights are in different orders",
            where=masks,
            fix="give the weights that the masks were chosen for, such as permuted.safetensors of the same run",
        )
    used_images = [*provenance.image_sets, *mask_set.image_sets]
    dense, masked, masked_provenance = module.state_dict(), masked_state, provenance
    if sparse is not None:
        pruned, masked_provenance = open_checkpoint(ModelOptions(model, str(sparse), classes, seed))
        masked = pruned.state_dict()
        require_masked(masked, tensors, where=sparse)
        used_images += masked_provenance.image_sets
    new = new_masked = None
    if updated is not None:
        newer, newer_provenance = open_checkpoint(ModelOptions(model, str(updated), classes, seed, ema, fuse))
        new = newer.state_dict()
        new_masked = under_masks(newer, tensors, None if sparse is None else masked)
        used_images += newer_provenance.image_sets
    val = _val_images(model, data, provenance.labels, provenance.classes)
    image_set = identify(val)
    require_disjoint(image_set, used_images)
    result = analyze(
        module,
        masked_provenance,
        Weights(dense, masked, new, new_masked),
        mask_set.method,
        val,
        image_set,
        stability_options,
    )
    write_report(report, encode(result))
    for line in _summary(result):
        print_line(line)


def _val_images(model: str, folder: Path | None, labels: tuple[str, ...], outputs: int) -> Split:
    from maskplan.pipeline.core.errors import InputError
    from maskplan.pipeline.data.source import find_val

    val = find_val(folder, model=model, labels=labels, outputs=outputs)
    if val is None:
        raise InputError("stability is measured on images", fix="give --data DIR with val/CLASS/*")
    return val


def _summary(report: StabilityReport) -> Iterator[str]:
    if not report.trained:
        yield "the weights are random: classes, flips and certificates say nothing about a trained network"
    yield from _pair(report.masking)
    worst = report.worst_case
    yield (
        f"  any image: logits change by at most {worst.logits_change:.3g}"
        f"{'; vacuous' if worst.vacuous else f'; {worst.certified:.1f}% certified'}"
    )
    for ball in report.balls:
        shares = ", ".join(f"{s.certified:.1f}% up to {s.radius:g}" for s in ball.shares)
        verdict = "vacuous" if ball.vacuous else f"certified {shares}"
        yield f"updates of the {ball.name}, masks kept: {verdict} (median radius {ball.radius.p50:.2g} of the weights)"
    if report.update is not None:
        yield from _pair(report.update.masked)
        yield from _pair(report.update.dense_and_masked)
        yield f"  in three parts, the middle one measured: {report.update.in_parts_certified:.1f}% certified"
    rate = report.flip_rate
    yield (
        f"flip rate: {rate.flips} of {rate.images} images ({rate.rate:.2f}%); at most {rate.limit:.2f}% of all such images"
        f" with {100 * rate.confidence:g}% confidence"
    )
    yield report.verdict


def _pair(pair: PairReport) -> Iterator[str]:
    yield f"{pair.name}, {pair.images} images: {pair.flips} flip, logits change by {pair.logits_change.p50:.3g} (median)"
    for regime in pair.regimes:
        yield f"  {regime.name:<15} {_verdict(regime)}"


def _verdict(regime: Regime) -> str:
    ratio = (
        "" if regime.tightness is None else f"; the bound is 10^{regime.tightness.p50:.1f} times the measured change"
    )
    return f"{'vacuous' if regime.vacuous else f'{regime.certified:.1f}% certified'}{ratio}"
