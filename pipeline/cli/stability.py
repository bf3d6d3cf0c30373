"""`stability`: how far masks, and updates under them, can move a network's outputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskplan.pipeline.cli import options

if TYPE_CHECKING:
    from maskplan.pipeline.data.dataset import Split
    from maskplan.pipeline.stability.record import PairReport, Regime, StabilityReport

_EXAMPLES = """Examples:\n
  maskplan stability digits_resnet --masks masks.safetensors --report stability.json\n
  maskplan stability resnet50 --masks masks.safetensors --sparse sparse.safetensors --data imagenet --images 2000\n
  maskplan stability resnet50 --weights old.pth --masks masks.safetensors --updated new.pth --data imagenet
"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(epilog=_EXAMPLES)(stability)


def stability(
    model: options.Model,
    masks: Annotated[Path, typer.Option(help="Mask file.")],
    weights: options.Weights = "auto",
    sparse: Annotated[
        Path | None,
        typer.Option(help="Look at this pruned checkpoint, recalibrated perhaps, instead of masks times weights."),
    ] = None,
    updated: Annotated[
        Path | None, typer.Option(help="Newer dense weights: what they change where the masks are kept.")
    ] = None,
    data: options.Data = None,
    images: Annotated[int, typer.Option(min=1, help="Images of val/ to look at.")] = 1000,
    confidence: Annotated[float, typer.Option(help="Of the limit of the flip rate.")] = 0.95,
    classes: options.Classes = None,
    seed: options.Seed = 0,
    report: options.Report = None,
) -> None:
    """Bound what masking does to MODEL's outputs, certify images whose class cannot change, and limit the flip rate.

    Images come from val/ and must have shaped neither masks nor statistics. Networks and bounds are computed in float64.
    """
    from maskplan.pipeline.core.errors import InputError
    from maskplan.pipeline.core.files import write_json
    from maskplan.pipeline.core.serialization import encode
    from maskplan.pipeline.data.dataset import identify, require_disjoint
    from maskplan.pipeline.masking.maskset import load_masks
    from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
    from maskplan.pipeline.pruning.bake import baked_state
    from maskplan.pipeline.pruning.mask import given_masks
    from maskplan.pipeline.stability.analyze import StabilityOptions, Weights, analyze, require_masked, under_masks

    how = StabilityOptions(images, confidence, seed=seed)
    module, provenance = open_checkpoint(ModelOptions(model, weights, classes, seed))
    mask_set = given_masks(module, provenance, masks, deployable=False)
    if mask_set.permutation != provenance.permutation:
        raise InputError(
            "the masks are for channels in another order than the weights'",
            where=masks,
            fix="give the weights that the masks were chosen for, such as permuted.safetensors of the same run",
        )
    shaped = [*provenance.image_sets, *mask_set.image_sets]
    dense, masked, about = module.state_dict(), baked_state(module, mask_set), provenance
    tensors = load_masks(masks)
    if sparse is not None:
        pruned, about = open_checkpoint(ModelOptions(model, str(sparse), classes, seed))
        masked = pruned.state_dict()
        require_masked(masked, tensors, where=sparse)
        shaped += about.image_sets
    new = new_masked = None
    if updated is not None:
        newer, provenance_of_newer = open_checkpoint(ModelOptions(model, str(updated), classes, seed))
        new = newer.state_dict()
        new_masked = under_masks(newer, tensors, None if sparse is None else masked)
        shaped += provenance_of_newer.image_sets
    val = _held_out(model, data, provenance.labels, provenance.classes)
    known = identify(val)
    require_disjoint(known, shaped)
    found = analyze(module, about, Weights(dense, masked, new, new_masked), mask_set.method, val, known, how)
    if report is not None:
        write_json(report, encode(found))
    for line in _told(found):
        print(line)


def _held_out(model: str, folder: Path | None, labels: tuple[str, ...], outputs: int) -> Split:
    from maskplan.pipeline.core.errors import InputError
    from maskplan.pipeline.data.dataset import open_val
    from maskplan.pipeline.models.registry import BUNDLED

    if folder is not None:
        return open_val(folder, labels, outputs)
    if model == BUNDLED and outputs == 10:
        from maskplan.pipeline.data.digits import load_digits

        return load_digits().val
    raise InputError("stability is measured on images", fix="give --data DIR with val/CLASS/*")


def _told(found: StabilityReport) -> Iterator[str]:
    if not found.trained:
        yield "the weights are random: classes, flips and certificates say nothing of a trained network"
    yield from _pair(found.masking)
    worst = found.worst_case
    yield (
        f"  any image at all: logits change by at most {worst.logits_change:.3g}"
        f"{'; vacuous' if worst.vacuous else f'; {worst.certified:.1f}% certified'}"
    )
    for ball in found.balls:
        shares = ", ".join(f"{s.certified:.1f}% up to {s.radius:g}" for s in ball.shares)
        verdict = "vacuous" if ball.vacuous else f"certified {shares}"
        yield f"updates of the {ball.name}, masks kept: {verdict} (median radius {ball.radius.p50:.2g} of the weights)"
    if found.update is not None:
        yield from _pair(found.update.masked)
        yield from _pair(found.update.dense_and_masked)
        yield f"  in three parts, the middle one measured: {found.update.in_parts_certified:.1f}% certified"
    rate = found.flip_rate
    yield (
        f"flip rate: {rate.flips} of {rate.images} images ({rate.rate:.2f}%); at most {rate.limit:.2f}% of all such images"
        f" with {100 * rate.confidence:g}% confidence"
    )
    yield found.verdict


def _pair(found: PairReport) -> Iterator[str]:
    yield f"{found.name}, {found.images} images: {found.flips} flip, logits change by {found.logits_change.p50:.3g} (median)"
    for regime in found.regimes:
        yield f"  {regime.name:<15} {_verdict(regime)}"


def _verdict(regime: Regime) -> str:
    above = "" if regime.tightness is None else f"; the bound is 10^{regime.tightness.p50:.1f} times what was measured"
    return f"{'vacuous' if regime.vacuous else f'{regime.certified:.1f}% certified'}{above}"
