"""`maskplan prune`: make the weights of an ONNX file N:M, without PyTorch."""

from __future__ import annotations

import glob
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from maskplan.pipeline.cli import options
from maskplan.pipeline.cli.check import conformance_defaults
from maskplan.pipeline.cli.exit_codes import GateError
from maskplan.pipeline.cli.help_pages import add_command
from maskplan.pipeline.cli.options import choice, image_options, override, patterns, write_report
from maskplan.pipeline.core.choices import AUTO, LAYERWISE
from maskplan.pipeline.core.terminal import print_line

if TYPE_CHECKING:
    from maskplan.pipeline.pruning.prune_layerwise import LayerwiseOptions, LayerwisePruned

# How many of the costs are printed; --report has all.
_COSTLIEST = 10

Method = Literal["auto", "magnitude", "layerwise"]

_EXAMPLES = """
maskplan prune model.onnx -o sparse.onnx
maskplan prune model.onnx --allow-dense 'head.*' -o sparse.onnx
maskplan prune model.onnx --data photos --method layerwise --update -o sparse.onnx
maskplan prune model.onnx --data photos --keep-dense-budget 10 -o sparse.onnx
"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    add_command(app, prune, _EXAMPLES, _defaults)


def _defaults() -> dict[str, object]:
    from maskplan.pipeline.pruning.prune_layerwise import LayerwiseOptions

    return {**vars(LayerwiseOptions()), **conformance_defaults()}


def prune(
    model: options.OnnxFile,
    out: options.Out = Path("sparse.onnx"),
    method: Annotated[
        Method,
        choice(
            Method,
            "method of pruning",
            help="magnitude; layerwise (smallest change of each layer's outputs on --data, no labels); auto (layerwise if "
            "there is --data).",
        ),
    ] = "auto",
    data: Annotated[
        Path | None,
        typer.Option(help="For layerwise: a folder of images, or a .npz file with an array for each input."),
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Samples for layerwise, drawn with --seed.")] = None,
    update: Annotated[
        bool | None,
        typer.Option(
            "--update/--no-update",
            help="With layerwise: refit the kept weights by least squares, and correct biases.",
        ),
    ] = None,
    sensitivity: Annotated[
        bool | None,
        typer.Option(
            "--sensitivity/--no-sensitivity",
            help="With layerwise: measure what each mask costs alone, and list the costliest.",
        ),
    ] = None,
    keep_dense_budget: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            help="With layerwise: percent of the multiplications that may stay dense, in the layers whose masks cost most.",
        ),
    ] = None,
    pattern: options.Pattern = None,
    allow_dense: Annotated[
        list[str] | None, typer.Option(help="Pattern of names of weights or nodes to leave dense. Repeatable.")
    ] = None,
    shape: options.Shape = None,
    mean: options.Mean = None,
    std: options.Std = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of samples.")] = 0,
    report: options.Report = None,
) -> None:
    """Prune the weights of an ONNX file to N:M, by magnitude or layer-wise on data, then check the result."""
    from maskplan.exporters.conformance import CheckOptions, check_2to4
    from maskplan.exporters.prune import prune_onnx
    from maskplan.pipeline.core.errors import InputError
    from maskplan.pipeline.core.serialization import encode
    from maskplan.pipeline.masking.patterns import parse_pattern

    check_options = override(CheckOptions(strict=True), pattern=pattern, allow_dense=patterns(allow_dense))
    is_layerwise = method == LAYERWISE or (method == AUTO and data is not None)
    layerwise: LayerwisePruned | None = None
    if is_layerwise:
        from maskplan.pipeline.pruning.prune_layerwise import LayerwiseOptions

        layerwise_options = override(
            LayerwiseOptions(pattern=check_options.pattern, allow_dense=check_options.allow_dense, seed=seed),
            images=images,
            update=update,
            sensitivity=sensitivity,
            keep_dense_budget=keep_dense_budget,
        )
        layerwise = _layerwise(model, out, data, layerwise_options, shape, mean, std)
        pruned = layerwise.pruned
        kept_dense = (*check_options.allow_dense, *map(glob.escape, layerwise.kept_dense))
        check_options = replace(check_options, allow_dense=kept_dense)
    else:
        unused = {
            "--data": data,
            "--images": images,
            "--update": update,
            "--sensitivity": sensitivity,
            "--keep-dense-budget": keep_dense_budget,
            "--shape": shape,
            "--mean": mean,
            "--std": std,
        }
        given = [name for name, value in unused.items() if value is not None]
        if given:
            fix = (
                "add --data and --method layerwise, or remove them"
                if data is None
                else "remove them, or choose layerwise"
            )
            raise InputError("magnitude pruning uses no data", found=", ".join(given), fix=fix)
        pruned = prune_onnx(model, out, parse_pattern(check_options.pattern), check_options.allow_dense)
    conformance = check_2to4(out, check_options)
    write_report(report, encode(conformance) | ({} if layerwise is None else {"pruning": _values(layerwise)}))
    print_line(
        f"{out}: {pruned.changed} of {pruned.weights} weights changed, {pruned.zeroed:,} elements set to zero;"
        f" {conformance.verdict}"
    )
    if layerwise is not None:
        _show(layerwise)
    for name, reason in pruned.left_dense:
        print_line(f"  {name} stays dense: {reason.replace('_', ' ')}")
    if not conformance.passed:
        raise GateError(f"{out}: {conformance.reason}")


def _layerwise(
    model: Path,
    out: Path,
    data: Path | None,
    layerwise_options: LayerwiseOptions,
    shape: str | None,
    mean: str | None,
    std: str | None,
) -> LayerwisePruned:
    from maskplan.exporters.metadata import describe_onnx
    from maskplan.pipeline.core.errors import InputError
    from maskplan.pipeline.data.samples import open_samples
    from maskplan.pipeline.pruning.prune_layerwise import prune_layerwise

    onnx_model = describe_onnx(model)
    provenance = onnx_model.provenance
    if data is None:
        raise InputError(
            "layer-wise pruning needs data",
            where=model,
            fix="give --data a folder of images or a .npz file with an array for each input, or choose --method magnitude",
        )
    preprocessing = provenance.preprocessing if provenance is not None else None
    images = replace(image_options(shape, mean, std), preprocessing=preprocessing)
    samples = open_samples(data, "train", onnx_model.inputs, images, model)
    kinds = provenance.outputs if provenance is not None else ()
    return prune_layerwise(model, out, onnx_model.inputs, samples, layerwise_options, kinds)


def _show(layerwise: LayerwisePruned) -> None:
    """How far the outputs of the layers are from the dense ones, and which weights were pruned by magnitude."""
    if layerwise.layers:
        before = sorted(layer.error for layer in layerwise.layers)
        after = sorted(layer.updated_error for layer in layerwise.layers if layer.updated_error is not None)
        text = f"change of a layer's outputs: {_median(before):.2f}% (median)"
        print_line(
            f"{len(layerwise.layers)} weights layer-wise on {layerwise.samples} samples; {text}"
            + (f", {_median(after):.2f}% after the update" if after else "")
        )
    if layerwise.costs:
        print_line("costliest masks, each alone:")
    for layer in sorted(layerwise.costs, key=lambda layer: -layer.cost)[:_COSTLIEST]:
        stays = ": stays dense" if layer.name in layerwise.kept_dense else ""
        print_line(f"  {layer.cost:.3g}  {layer.name}, {layer.macs_percent:.1f}% of the multiplications{stays}")
    if layerwise.kept_dense:
        names = " ".join(f"--allow-dense {shlex.quote(glob.escape(name))}" for name in layerwise.kept_dense)
        print_line(f"{len(layerwise.kept_dense)} weights stay dense within the budget; check the file with {names}")
    for name, reason in layerwise.by_magnitude:
        print_line(f"  {name} is pruned by magnitude: {reason}")


def _median(values: list[float]) -> float:
    return values[len(values) // 2]


def _values(layerwise: LayerwisePruned) -> dict[str, object]:
    from maskplan.pipeline.core.serialization import encode

    return {
        "method": LAYERWISE,
        "samples": layerwise.samples,
        "layers": [encode(layer) for layer in layerwise.layers],
        "costs": [encode(layer) for layer in layerwise.costs],
        "kept_dense": list(layerwise.kept_dense),
        "by_magnitude": [{"name": name, "reason": reason} for name, reason in layerwise.by_magnitude],
    }
