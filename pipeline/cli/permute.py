"""`maskplan permute`: a checkpoint to one that computes the same and keeps more under N:M."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskplan.pipeline.cli import options
from maskplan.pipeline.cli.help_pages import add_command
from maskplan.pipeline.cli.options import override, patterns, write_report
from maskplan.pipeline.core.terminal import print_line

if TYPE_CHECKING:
    from maskplan.pipeline.permutation.record import Permuted

_EXAMPLES = """
maskplan permute resnet50 --weights w.pth -o permuted.safetensors --report permutation.json
maskplan permute resnet50 --weights tuned.pth --permutation permuted.permutation.safetensors -o again.safetensors
maskplan mask resnet50 --method magnitude --weights permuted.safetensors -o masks.safetensors
"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    add_command(app, permute, _EXAMPLES, _defaults)


def _defaults() -> dict[str, object]:
    from maskplan.pipeline.permutation.permute import PermuteOptions
    from maskplan.pipeline.pruning.mask import MaskOptions

    return {**vars(MaskOptions()), **vars(PermuteOptions())}


def permute(
    model: options.Model,
    out: options.Out = Path("permuted.safetensors"),
    weights: options.Weights = "auto",
    ema: options.Ema = None,
    fuse: options.Fuse = False,
    permutation: Annotated[
        Path | None,
        typer.Option(help="Apply the permutation in this file, written by an earlier run, instead of searching."),
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="N:M of the masks to come.")] = None,
    include_linear: Annotated[bool | None, typer.Option(help="Linear layers will be masked too.")] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(help="Only weights whose name matches, such as 'layer3.*', will be masked. Repeatable."),
    ] = None,
    min_channels: Annotated[
        int | None, typer.Option(help="Convolutions with fewer input channels will stay dense.")
    ] = None,
    effort: Annotated[float | None, typer.Option(help="Factor on the number of search steps.")] = None,
    classes: options.Classes = None,
    seed: options.Seed = 0,
    report: options.Report = None,
) -> None:
    """Reorder MODEL's channels so that more magnitude is kept under N:M; the network computes the same.

    OUT.permutation.safetensors is written next to OUT.safetensors; --permutation applies it to newer weights.
    """
    from maskplan.pipeline.core.serialization import encode
    from maskplan.pipeline.masking.patterns import parse_pattern
    from maskplan.pipeline.masking.policy import LayerPolicy
    from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
    from maskplan.pipeline.permutation.permute import PermuteOptions, repermute
    from maskplan.pipeline.permutation.permute import permute as search_permutation
    from maskplan.pipeline.pruning.mask import MaskOptions

    masks = override(
        MaskOptions(),
        pattern=pattern,
        include_linear=include_linear,
        layers=patterns(layers),
        min_channels=min_channels,
    )
    permute_options = override(PermuteOptions(seed=seed), effort=effort)
    policy = LayerPolicy(masks.include_linear, masks.layers, masks.min_channels)
    module, provenance = open_checkpoint(ModelOptions(model, weights, classes, seed, ema, fuse))
    if permutation is not None:
        permuted = repermute(module, provenance, permutation, policy, out)
    else:
        record = out.with_suffix(".permutation.safetensors")
        n_of_m = parse_pattern(masks.pattern)
        permuted = search_permutation(module, provenance, n_of_m, policy, permute_options, out, record)
    if report is not None:
        write_report(report, {"efficacy": permuted.efficacy, **encode(permuted, report.parent)})
    for line in _summary(permuted, out):
        print_line(line)


def _summary(permuted: Permuted, out: Path) -> Iterator[str]:
    from maskplan.pipeline.permutation.record import AS_GIVEN, FIXED, MOVED, UNREAD

    permutation = permuted.permutation
    gain = 100 * (permuted.kept_after / permuted.kept_before - 1) if permuted.kept_before else 0.0
    yield (
        f"{out}: kept magnitude under {permutation.pattern} {permuted.kept_before:.6g} -> {permuted.kept_after:.6g}"
        f" ({gain:+.2f}%), efficacy {permuted.efficacy:.1f}"
    )
    yield f"{permutation.path}: the order of {sum(g.state == MOVED for g in permutation.groups)} groups of channels"
    for state, label in ((AS_GIVEN, "stay"), (UNREAD, "stay"), (FIXED, "cannot move")):
        groups: Counter[str] = Counter()
        channels: Counter[str] = Counter()
        for group in permutation.groups:
            if group.state == state:
                groups[group.reason or ""] += 1
                channels[group.reason or ""] += group.channels
        for reason, count in groups.items():
            yield f"  {count} groups ({channels[reason]} channels) {label}: {reason}"
