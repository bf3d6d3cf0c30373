"""`permute`: a checkpoint to one that computes the same and keeps more under N:M."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskplan.pipeline.cli import options

if TYPE_CHECKING:
    from maskplan.pipeline.permutation.record import Permuted

_EXAMPLES = """Examples:\n
  maskplan permute resnet50 --weights w.pth -o permuted.safetensors --report permutation.json\n
  maskplan permute resnet50 --weights tuned.pth --permutation permuted.permutation.safetensors -o again.safetensors\n
  maskplan mask resnet50 --method magnitude --weights permuted.safetensors -o masks.safetensors
"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(epilog=_EXAMPLES)(permute)


def permute(
    model: options.Model,
    out: options.Out = Path("permuted.safetensors"),
    weights: options.Weights = "auto",
    permutation: Annotated[
        Path | None,
        typer.Option(help="Apply the permutation of this file, that of an earlier run, instead of searching."),
    ] = None,
    pattern: Annotated[str, typer.Option(help="N:M that masks will have.")] = "2:4",
    include_linear: Annotated[bool, typer.Option(help="Linear layers will be masked too.")] = False,
    layers: Annotated[
        list[str] | None, typer.Option(help="Only weights whose name matches, such as 'layer3.*', will be; repeatable.")
    ] = None,
    min_channels: Annotated[int, typer.Option(help="Layers with fewer input channels will stay dense.")] = 0,
    effort: Annotated[float, typer.Option(help="Multiplies the steps of the search.")] = 1.0,
    classes: options.Classes = None,
    seed: options.Seed = 0,
    report: options.Report = None,
) -> None:
    """Bring MODEL's channels into an order that keeps more magnitude under N:M; its function stays the same.

    Beside OUT.safetensors goes OUT.permutation.safetensors, which --permutation applies to newer weights.
    """
    from maskplan.pipeline.core.files import write_json
    from maskplan.pipeline.masking.patterns import parse_pattern
    from maskplan.pipeline.masking.policy import LayerPolicy
    from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
    from maskplan.pipeline.permutation.permute import PermuteOptions, repermute
    from maskplan.pipeline.permutation.permute import permute as permute_stage

    n_of_m, how = parse_pattern(pattern), PermuteOptions(effort=effort, seed=seed)
    policy = LayerPolicy(include_linear, tuple(layers or ()), min_channels)
    module, provenance = open_checkpoint(ModelOptions(model, weights, classes, seed))
    if permutation is not None:
        done = repermute(module, provenance, permutation, policy, out)
    else:
        record = out.with_suffix(".permutation.safetensors")
        done = permute_stage(module, provenance, n_of_m, policy, how, out, record)
    if report is not None:
        write_json(report, _values(done, report.parent))
    for line in _told(done, out):
        print(line)


def _values(done: Permuted, folder: Path) -> dict[str, object]:
    from maskplan.pipeline.core.serialization import encode

    values: dict[str, object] = encode(done, folder)
    return {"efficacy": done.efficacy, **values}


def _told(done: Permuted, out: Path) -> list[str]:
    from maskplan.pipeline.permutation.record import AS_GIVEN, FIXED, MOVED, UNREAD

    groups, made = done.permutation.groups, done.permutation
    gain = 100 * (done.kept_after / done.kept_before - 1) if done.kept_before else 0.0
    lines = [
        f"{out}: kept magnitude under {made.pattern} {done.kept_before:.6g} -> {done.kept_after:.6g} ({gain:+.2f}%),"
        f" efficacy {done.efficacy:.1f}",
        f"{made.path}: the order of {sum(g.state == MOVED for g in groups)} groups of channels",
    ]
    for state in (AS_GIVEN, UNREAD, FIXED):
        counts: Counter[tuple[str, bool]] = Counter()
        for group in groups:
            if group.state == state:
                counts[group.reason or "", False] += 1
                counts[group.reason or "", True] += group.channels
        label = {AS_GIVEN: "stay", UNREAD: "stay", FIXED: "cannot move"}[state]
        for (reason, in_channels), count in counts.items():
            if not in_channels:
                lines.append(f"  {count} groups ({counts[reason, True]} channels) {label}: {reason}")
    return lines
