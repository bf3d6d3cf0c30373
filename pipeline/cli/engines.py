"""`build`, `time`, `inspect` and `deploy`: the commands that work on engines; none of them needs PyTorch."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskplan.pipeline.cli import build, options

if TYPE_CHECKING:
    from maskplan.pipeline.core.artifacts import EngineFile, Provenance
    from maskplan.pipeline.core.reports import GpuClocks, Latency
    from maskplan.pipeline.timing.interleaved import TimeOptions

_DEPLOY_EXAMPLES = """Examples:\n
  maskplan deploy build/r50/engine.plan --repository models --name resnet50\n
  maskplan deploy a100.plan h100.plan --repository models --name resnet50 --preferred-batch 8\n
  maskplan deploy --rollback --repository models --name resnet50
"""
_Engine = Annotated[Path, typer.Argument(help="An engine with its sidecar.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    build.register(app)
    app.command(epilog="Example:\n\n  maskplan time build/r50/dense_engine.onnx build/r50/engine.onnx --batch 1,8")(
        time
    )
    app.command(epilog="Example:\n\n  maskplan inspect build/r50/engine.onnx")(inspect)
    app.command(epilog=_DEPLOY_EXAMPLES)(deploy)


def time(
    dense: Annotated[Path | None, typer.Argument(help="An engine with its sidecar.", show_default=False)] = None,
    sparse: Annotated[Path | None, typer.Argument(help="Another.", show_default=False)] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8",
    seconds: Annotated[float, typer.Option(help="Aim for this long a batch size.")] = 5.0,
    three_way: Annotated[
        Path | None, typer.Option(help="Time all engines of this folder of `build --three-way` instead.")
    ] = None,
    report: options.Report = None,
) -> None:
    """Time engines in turn: two, or all builds of dense, pruned and sparse."""
    from maskplan.pipeline.core.errors import InputError
    from maskplan.pipeline.timing.interleaved import TimeOptions

    sizes = [part.strip() for part in batch.split(",")]
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise InputError("not a list of batch sizes", found=repr(batch), fix="write for example --batch 1,8,32")
    how = TimeOptions(tuple(map(int, sizes)), seconds=seconds)
    if three_way is not None:
        _time_three_way(three_way, how, report)
    elif dense is None or sparse is None:
        raise InputError("nothing to time", fix="give two engines, or --three-way DIR")
    else:
        _time_two(dense, sparse, how, report)


def _time_two(dense: Path, sparse: Path, how: TimeOptions, report: Path | None) -> None:
    from maskplan.engines.ort import NO_SPARSE_KERNELS
    from maskplan.engines.sidecar import read_engine
    from maskplan.pipeline.core.choices import ONNXRUNTIME
    from maskplan.pipeline.core.files import write_json
    from maskplan.pipeline.core.serialization import encode
    from maskplan.pipeline.stages.engines import opened
    from maskplan.pipeline.timing.compare_latency import time_engines
    from maskplan.pipeline.timing.interleaved import GPU

    records = [read_engine(path) for path in (dense, sparse)]
    on_cpu = records[1].backend == ONNXRUNTIME
    with contextlib.ExitStack() as stack:
        models = [stack.enter_context(opened(record)) for record in records]
        again = stack.enter_context(opened(records[1])) if on_cpu else None
        timed = time_engines(
            models[0],
            models[1],
            again,
            how,
            note=NO_SPARSE_KERNELS if on_cpu else "",
            same_file=on_cpu,
            device=None if on_cpu else records[1].device,
        )
    if report is not None:
        write_json(report, encode(timed))
    print(f"{timed.device}, CPUs {timed.affinity}")
    for b in timed.batches:
        low, high = b.ratio_ci95
        print(
            f"batch {b.batch}: dense {_told_ms(b.dense)}, sparse {_told_ms(b.sparse)} (medians of {b.repeats});"
            f" dense / sparse {b.speedup:.3f} ({low:.3f} to {high:.3f}{', GPU time' if b.by == GPU else ''})"
        )
        _print_clocks(b.clocks)
    if timed.note:
        print(timed.note)


def _time_three_way(folder: Path, how: TimeOptions, report: Path | None) -> None:
    from maskplan.engines.ort import NO_SPARSE_KERNELS
    from maskplan.pipeline.core.choices import ONNXRUNTIME
    from maskplan.pipeline.core.files import write_json
    from maskplan.pipeline.core.serialization import encode
    from maskplan.pipeline.stages.engines import opened
    from maskplan.pipeline.timing.three_way import KINDS, SPARSE, read_three_way, time_three_way

    records = read_three_way(folder)
    note = NO_SPARSE_KERNELS if records[SPARSE][0].backend == ONNXRUNTIME else ""
    with contextlib.ExitStack() as stack:
        engines = {kind: [stack.enter_context(opened(r)) for r in builds] for kind, builds in records.items()}
        timed = time_three_way(engines, how, note=note)
    if report is not None:
        write_json(report, [encode(b) for b in timed])
    for b in timed:
        kinds = ", ".join(f"{kind} {min(b.p50_ms[kind]):.3g} to {max(b.p50_ms[kind]):.3g} ms" for kind in KINDS)
        gain = "" if note else f"sparse kernels {b.gain:+.1%}, "
        verdict = "faster" if b.is_faster else "no gain: builds of one graph differ by as much"
        print(f"batch {b.batch}: {kinds}; {gain}builds differ by {b.spread:.1%}{'' if note else f': {verdict}'}")
        _print_clocks(b.clocks)
    if note:
        print(note)


def _told_ms(latency: Latency) -> str:
    if latency.gpu_ms is None:
        return f"{latency.p50_ms:.3g} ms"
    return f"{latency.p50_ms:.3g} ms (GPU {latency.gpu_ms:.3g}, copies {latency.copies_ms:.3g})"


def _print_clocks(clocks: GpuClocks | None) -> None:
    if clocks is None:
        return
    held = f"held down by {', '.join(clocks.throttle_reasons)}" if clocks.throttle_reasons else "not held down"
    print(
        f"  GPU clock {clocks.sm_mhz:.0f} MHz (lowest {clocks.sm_lowest_mhz:.0f}), memory {clocks.memory_mhz:.0f} MHz,"
        f" {held}; {clocks.celsius:.0f} C, {clocks.watts:.0f} W at most"
    )


def inspect(engine: _Engine, report: options.Report = None) -> None:
    """Say what an engine is, where it comes from, and what is known of its layers."""
    from maskplan.engines.sidecar import read_engine
    from maskplan.pipeline.core.files import write_json
    from maskplan.pipeline.core.serialization import encode

    record = read_engine(engine)
    if report is not None:
        write_json(report, encode(record, record.path.parent))
    made = record.provenance
    lines = {
        "engine": f"{record.path.name}, {record.bytes:,} bytes, sha256 {record.sha256}",
        "backend": f"{record.backend} {record.runtime_version} on {record.device}",
        "precision": f"{record.precision}, {record.typing} typing",
        "flags": ", ".join(_flags(record)) or "none",
        "profiles": ", ".join(map(str, record.profiles)),
        "inputs": ", ".join(f"{t.name} {t.dtype} {_shape(t.shape)}" for t in record.inputs),
        "outputs": ", ".join(f"{t.name} {t.dtype} {_shape(t.shape)}" for t in record.outputs),
        "from": f"ONNX sha256 {record.onnx_sha256}",
        "model": f"{made.model}, weights {_weights(made)}" if made else "unknown: another tool's file",
        "masks": f"{made.pattern} {made.method} on {len(made.masked)} weights"
        if made and made.masked
        else "none known",
        "sparse": _evidence(record),
    }
    for label, text in [*lines.items(), *(("note", note) for note in record.notes)]:
        print(f"{label:<10} {text}")
    for layer in record.layers:
        sizes = f"C {layer.c or '?'} K {layer.k or '?'}"
        why = f" ({layer.reason})" if layer.reason else ""
        print(f"  {layer.state:<8} {sizes:<16} {layer.name}: {layer.kernel or 'no kernel told'}{why}")


def _weights(made: Provenance) -> str:
    permuted = ", permuted" if made.permutation else ""
    return f"{made.origin}{permuted}{'' if made.trained else ' (untrained)'}"


def _flags(record: EngineFile) -> list[str]:
    flags = {
        "sparse weights": record.sparse_weights,
        "version compatible": record.version_compatible,
        "hardware compatible": record.hardware_compatible,
        "refittable": record.refittable,
        "stripped of weights": record.strip_plan,
    }
    return [name for name, on in flags.items() if on]


def _evidence(record: EngineFile) -> str:
    from maskplan.engines.evidence import totals
    from maskplan.pipeline.core.choices import TENSORRT

    if record.layers:
        counted = totals(record.layers)
        return f"{counted.sparse} layers sparse, {counted.dense} dense, {counted.unknown} unknown"
    if record.backend != TENSORRT:
        return "no evidence of layers: the backend gives none"
    why = "the plan could not be inspected" if record.sparse_weights else "the sparse flag was off"
    return f"no evidence of layers: {why}"


def deploy(
    engines: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="ENGINE",
            help="An engine with its sidecar; or plans of one model, each for another GPU.",
            show_default=False,
        ),
    ] = None,
    *,
    repository: Annotated[Path, typer.Option(help="Triton model repository.")],
    name: Annotated[str | None, typer.Option(help="Name in the repository; the model's by default.")] = None,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Undo the last deployment of --name; takes no engine.")
    ] = False,
    queue_delay_us: Annotated[
        int, typer.Option(min=0, help="Longest wait for a fuller batch, in microseconds.")
    ] = 1000,
    preferred_batch: Annotated[
        list[int] | None, typer.Option(help="Batch size to send without waiting; repeatable.")
    ] = None,
    cuda_graphs: Annotated[
        bool | None, typer.Option("--cuda-graphs/--no-cuda-graphs", help="TensorRT only, where they are on by default.")
    ] = None,
    warmup: Annotated[bool, typer.Option(help="Run each profile once at load, before clients do.")] = True,
    keep_versions: Annotated[int, typer.Option(min=1, help="Newest versions to serve side by side.")] = 1,
    instances: Annotated[int, typer.Option(min=1, help="Copies of the model on each GPU.")] = 1,
    allow_untrained: Annotated[bool, typer.Option(help="Deploy even random weights.")] = False,
) -> None:
    """Add an engine to a Triton model repository as the model's next version, or take the last one back.

    A golden input and output lie beside it where the engine runs here, with a script that asks a server for the same.
    """
    from maskplan.engines.sidecar import read_engine
    from maskplan.pipeline.models.registry import folder_name
    from maskplan.pipeline.triton.config import Serving
    from maskplan.pipeline.triton.deploy import DeployOptions
    from maskplan.pipeline.triton.deploy import deploy as deploy_stage
    from maskplan.pipeline.triton.golden import FOLDER, golden_of
    from maskplan.pipeline.triton.rollback import rollback as rollback_stage

    if rollback:
        if engines or name is None:
            raise typer.BadParameter("--rollback takes --repository and --name, and no engine")
        undone = rollback_stage(repository, name)
        print(f"{undone.folder}: version {undone.version} is served again")
        return
    if not engines:
        raise typer.BadParameter("Missing argument 'ENGINE'")
    records = [read_engine(path) for path in engines]
    made = records[0].provenance
    name = name or (folder_name(made.model) if made is not None else engines[0].stem)
    serving = Serving(queue_delay_us, tuple(preferred_batch or ()), cuda_graphs, warmup, instances)
    golden, left_out = golden_of(records)
    options = DeployOptions(repository, name, allow_untrained, keep_versions, serving)
    done = deploy_stage(engines, options, golden)
    print(f"{done.folder}: version {done.version}, {done.platform}")
    if golden is None:
        print(f"note: without a golden input and output: {left_out}")
    else:
        print(f"try it: python {done.folder / str(done.version) / FOLDER / 'smoke.py'} --url localhost:8000")
    if any(record.version_compatible for record in records):
        print("note: a version-compatible plan: start Triton with --backend-config=tensorrt,version-compatible=true")


def _shape(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("batch" if d is None and i == 0 else str(d) for i, d in enumerate(shape)) + ")"
