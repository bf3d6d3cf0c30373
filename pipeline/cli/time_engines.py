"""`maskplan time`: two engines, or all builds of `build --three-way`, timed in one interleaved run."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskplan.pipeline.cli import options
from maskplan.pipeline.cli.help_pages import add_command
from maskplan.pipeline.cli.options import override, parse_batch_sizes, parse_shape, write_report

if TYPE_CHECKING:
    from maskplan.pipeline.core.reports import GpuClocks, Latency
    from maskplan.pipeline.timing.interleaved import TimeOptions

_EXAMPLES = """
maskplan time build/r50/dense_engine.onnx build/r50/engine.onnx --batch 1,8
maskplan time --three-way build/r50/three_way --report timing.json
"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    add_command(app, time, _EXAMPLES, _defaults)


def _defaults() -> dict[str, object]:
    from maskplan.pipeline.timing.interleaved import TimeOptions

    return {"batch": TimeOptions().batches, "seconds": TimeOptions().seconds}


def time(
    dense: Annotated[Path | None, typer.Argument(help="An engine with its sidecar file.", show_default=False)] = None,
    sparse: Annotated[Path | None, typer.Argument(help="The engine to compare with it.", show_default=False)] = None,
    batch: Annotated[str | None, typer.Option(help="Batch sizes, separated by commas.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Target duration of the measurement per batch size.")] = None,
    three_way: Annotated[
        Path | None, typer.Option(help="Time all engines in this folder, which `build --three-way` wrote.")
    ] = None,
    shape: options.Shape = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Run on these images or arrays instead of noise; arrays as .npz, one for each input."),
    ] = None,
    report: options.Report = None,
) -> None:
    """Time two engines, or all builds of dense, pruned and sparse; runs alternate between the engines."""
    from maskplan.pipeline.core.errors import InputError
    from maskplan.pipeline.timing.interleaved import TimeOptions

    time_options = override(TimeOptions(), batches=parse_batch_sizes(batch), seconds=seconds, shape=parse_shape(shape))
    if three_way is not None and data is not None:
        raise InputError(
            "--data cannot be combined with --three-way", fix="remove --data: the builds are timed on noise"
        )
    if three_way is not None:
        _time_three_way(three_way, time_options, report)
    elif dense is None or sparse is None:
        raise InputError("nothing to time", fix="give two engines, or --three-way DIR")
    else:
        _time_two(dense, sparse, time_options, data, report)


def _time_two(dense: Path, sparse: Path, time_options: TimeOptions, data: Path | None, report: Path | None) -> None:
    from maskplan.engines.build import device_of
    from maskplan.engines.ort import NO_SPARSE_KERNELS
    from maskplan.engines.sidecar import read_engine
    from maskplan.pipeline.core.choices import GPU_BACKENDS
    from maskplan.pipeline.core.serialization import encode
    from maskplan.pipeline.data.samples import ImageOptions, open_samples
    from maskplan.pipeline.stages.engines import open_runner
    from maskplan.pipeline.timing.compare_latency import time_engines
    from maskplan.pipeline.timing.interleaved import GPU

    records = [read_engine(path) for path in (dense, sparse)]
    on_cpu = records[1].backend not in GPU_BACKENDS
    samples = None
    if data is not None:
        provenance = records[0].provenance
        images = ImageOptions(time_options.shape, preprocessing=provenance.preprocessing if provenance else None)
        samples = open_samples(data, "val", records[0].inputs, images, dense.name)
    with contextlib.ExitStack() as stack:
        models = [stack.enter_context(open_runner(record)) for record in records]
        # ONNX Runtime on a CPU: a second session of the same file shows how much builds differ.
        again = stack.enter_context(open_runner(records[1])) if on_cpu else None
        timing = time_engines(
            models[0],
            models[1],
            again,
            time_options,
            note=NO_SPARSE_KERNELS if on_cpu else "",
            same_file=on_cpu,
            device=None if on_cpu else device_of(records[1]),
            samples=samples,
        )
    write_report(report, encode(timing))
    size = f", images {'x'.join(map(str, time_options.shape))}" if time_options.shape else ""
    print(f"{timing.device}, CPUs {timing.affinity}{size}")
    for b in timing.batches:
        low, high = b.ratio_ci95
        print(
            f"batch {b.batch}: dense {_format_latency(b.dense)}, sparse {_format_latency(b.sparse)}"
            f" (medians of {b.repeats}); dense / sparse {b.speedup:.3f}"
            f" ({low:.3f} to {high:.3f}{', GPU time' if b.by == GPU else ''})"
        )
        _print_clocks(b.clocks)
    if timing.note:
        print(timing.note)


def _time_three_way(folder: Path, time_options: TimeOptions, report: Path | None) -> None:
    from maskplan.engines.ort import NO_SPARSE_KERNELS
    from maskplan.pipeline.core.choices import GPU_BACKENDS
    from maskplan.pipeline.core.serialization import encode
    from maskplan.pipeline.stages.engines import open_runner
    from maskplan.pipeline.timing.three_way import KINDS, SPARSE, read_three_way, time_three_way

    records = read_three_way(folder)
    note = NO_SPARSE_KERNELS if records[SPARSE][0].backend not in GPU_BACKENDS else ""
    with contextlib.ExitStack() as stack:
        engines = {kind: [stack.enter_context(open_runner(r)) for r in builds] for kind, builds in records.items()}
        batches = time_three_way(engines, time_options, note=note)
    write_report(report, [encode(b) for b in batches])
    for b in batches:
        kinds = ", ".join(f"{kind} {min(b.p50_ms[kind]):.3g} to {max(b.p50_ms[kind]):.3g} ms" for kind in KINDS)
        gain = "" if note else f"sparse kernels {b.gain:+.1%}, "
        verdict = "faster" if b.is_faster else "no gain: builds of one graph differ by as much"
        print(f"batch {b.batch}: {kinds}; {gain}builds differ by {b.spread:.1%}{'' if note else f': {verdict}'}")
        _print_clocks(b.clocks)
    if note:
        print(note)


def _format_latency(latency: Latency) -> str:
    if latency.gpu_ms is None:
        return f"{latency.p50_ms:.3g} ms"
    return f"{latency.p50_ms:.3g} ms (GPU {latency.gpu_ms:.3g}, copies {latency.copies_ms:.3g})"


def _print_clocks(clocks: GpuClocks | None) -> None:
    if clocks is None:
        return
    reasons = clocks.throttle_reasons
    throttling = f"throttled by {', '.join(reasons)}" if reasons else "not throttled"
    print(
        f"  GPU clock {clocks.sm_mhz:.0f} MHz (lowest {clocks.sm_lowest_mhz:.0f}), memory {clocks.memory_mhz:.0f} MHz,"
        f" {throttling}; at most {clocks.celsius:.0f} C and {clocks.watts:.0f} W"
    )
