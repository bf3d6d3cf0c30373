"""`build`, `time`, `inspect` and `deploy`: the commands that work on engines; none of them needs PyTorch."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import options

_Engine = Annotated[Path, typer.Argument(help="An engine with its sidecar.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command(
        epilog="Example:\n\n  maskplan build sparse.fp16.onnx --backend tensorrt --profile 1:8:32 -o engine.plan"
    )(build)
    app.command(epilog="Example:\n\n  maskplan time build/r50/dense_engine.onnx build/r50/engine.onnx --batch 1,8")(
        time
    )
    app.command(epilog="Example:\n\n  maskplan inspect build/r50/engine.onnx")(inspect)
    app.command(epilog="Example:\n\n  maskplan deploy build/r50/engine.plan --repository models --name resnet50")(
        deploy
    )


def build(
    model: Annotated[Path, typer.Argument(help="An ONNX file of any tool.", show_default=False)],
    backend: Annotated[str, typer.Option(help="auto, tensorrt or onnxruntime.")] = "auto",
    profile: Annotated[list[str] | None, typer.Option(help="Batch sizes MIN:OPT:MAX; repeatable.")] = None,
    sparse: Annotated[bool, typer.Option(help="Allow sparse kernels.")] = True,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="The engine; MODEL.engine.plan or .onnx by default.")
    ] = None,
) -> None:
    """Compile an ONNX file to an engine with a sidecar that describes it."""
    from engines.build import (
        DEFAULT_PROFILES,
        SUFFIX,
        BuildOptions,
        build_engine,
        choose_backend,
        parse_profile,
    )
    from exporters.metadata import describe_onnx

    chosen, why = choose_backend(backend)
    profiles = tuple(parse_profile(text) for text in profile) if profile else DEFAULT_PROFILES
    path = out or model.with_name(f"{model.stem}.engine{SUFFIX[chosen]}")
    engine = build_engine(describe_onnx(model), BuildOptions(chosen, profiles, sparse), path)
    print(
        f"{engine.path}: {engine.precision} on {engine.backend} {engine.runtime_version} ({why}), {engine.bytes:,} bytes"
    )
    for note in engine.notes:
        print(f"note: {note}")


def time(
    dense: _Engine,
    sparse: _Engine,
    batch: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8",
    seconds: Annotated[float, typer.Option(help="Aim for this long a batch size.")] = 5.0,
    report: options.Report = None,
) -> None:
    """Time two engines in turn."""
    from engines.build import ONNXRUNTIME
    from engines.ort import NO_SPARSE_KERNELS
    from engines.sidecar import read_engine
    from pipeline.errors import InputError
    from pipeline.files import write_json
    from pipeline.records import encode
    from pipeline.stages import opened
    from pipeline.timing import TimeOptions, time_engines

    sizes = [part.strip() for part in batch.split(",")]
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise InputError("not a list of batch sizes", found=repr(batch), fix="write for example --batch 1,8,32")
    records = [read_engine(path) for path in (dense, sparse)]
    on_cpu = records[1].backend == ONNXRUNTIME
    with contextlib.ExitStack() as stack:
        models = [stack.enter_context(opened(record)) for record in records]
        again = stack.enter_context(opened(records[1])) if on_cpu else None
        timed = time_engines(
            models[0],
            models[1],
            again,
            TimeOptions(tuple(map(int, sizes)), seconds=seconds),
            note=NO_SPARSE_KERNELS if on_cpu else "",
            same_file=on_cpu,
            device=None if on_cpu else records[1].device,
        )
    if report is not None:
        write_json(report, encode(timed))
    print(f"{timed.device}, {timed.threads} threads")
    for b in timed.batches:
        low, high = b.ratio_ci95
        print(
            f"batch {b.batch}: dense {b.dense.p50_ms:.3g} ms, sparse {b.sparse.p50_ms:.3g} ms (p50 of {b.repeats});"
            f" dense / sparse {b.speedup:.3f} ({low:.3f} to {high:.3f})"
        )
    if timed.note:
        print(timed.note)


def inspect(engine: _Engine, report: options.Report = None) -> None:
    """Say what an engine is, where it comes from, and what is known of its layers."""
    from engines.sidecar import read_engine
    from pipeline.files import write_json
    from pipeline.records import encode

    record = read_engine(engine)
    if report is not None:
        write_json(report, encode(record, record.path.parent))
    made = record.provenance
    states = [layer.state for layer in record.layers]
    lines = {
        "engine": f"{record.path.name}, {record.bytes:,} bytes, sha256 {record.sha256}",
        "backend": f"{record.backend} {record.runtime_version} on {record.device}",
        "precision": f"{record.precision}, {record.typing} typing",
        "profiles": ", ".join(map(str, record.profiles)),
        "inputs": ", ".join(f"{t.name} {t.dtype} {_shape(t.shape)}" for t in record.inputs),
        "outputs": ", ".join(f"{t.name} {t.dtype} {_shape(t.shape)}" for t in record.outputs),
        "from": f"ONNX sha256 {record.onnx_sha256}",
        "model": f"{made.model}, weights {made.origin}{'' if made.trained else ' (untrained)'}"
        if made
        else "unknown: another tool's file",
        "masks": f"{made.pattern} {made.method} on {len(made.masked)} weights"
        if made and made.masked
        else "none known",
        "sparse": f"{states.count('sparse')} layers sparse, {states.count('dense')} dense, {states.count('unknown')} unknown"
        if states
        else "no evidence of layers: " + ("; ".join(record.notes) or "the sparse flag was off"),
    }
    for label, text in lines.items():
        print(f"{label:<10} {text}")


def deploy(
    engine: _Engine,
    repository: Annotated[Path, typer.Option(help="Triton model repository.")],
    name: Annotated[str | None, typer.Option(help="Name in the repository; the model's by default.")] = None,
    allow_untrained: Annotated[bool, typer.Option(help="Deploy even random weights.")] = False,
) -> None:
    """Add an engine to a Triton model repository as the model's next version."""
    from engines.sidecar import read_engine
    from pipeline.deploy import DeployOptions
    from pipeline.deploy import deploy as deploy_stage
    from pipeline.models import folder_name

    if name is None:
        made = read_engine(engine).provenance
        name = folder_name(made.model) if made is not None else engine.stem
    done = deploy_stage(engine, DeployOptions(repository, name, allow_untrained))
    print(f"{done.folder}: version {done.version}, {done.platform}")


def _shape(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("batch" if d is None and i == 0 else str(d) for i, d in enumerate(shape)) + ")"
