"""`maskplan build`: an ONNX file to an engine, to three kinds of engines, to trtexec's commands, or with trtexec's plan."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from maskplan.pipeline.cli import options
from maskplan.pipeline.cli.help_pages import add_command
from maskplan.pipeline.cli.options import choice, override
from maskplan.pipeline.core.choices import GPU_BACKENDS, TENSORRT, Backend
from maskplan.pipeline.core.escaping import shell_command
from maskplan.pipeline.core.terminal import print_line

if TYPE_CHECKING:
    from maskplan.engines.build import BuildOptions
    from maskplan.engines.trt.calibrator import ImplicitInt8
    from maskplan.engines.trt.options import TrtOptions
    from maskplan.pipeline.core.artifacts import EngineFile, OnnxModel, Profile

log = logging.getLogger(__name__)

Int8Mode = Literal["explicit", "implicit"]
EXPLICIT: Final = "explicit"
IMPLICIT: Final = "implicit"

_TRT = "TensorRT"
_IMPORT_OPTIONS = ("--layer-info", "--trt-version", "--compute-capability")
# Options by their fields in TrtOptions.
_TRT_FIELDS = {
    "--tf32": "tf32",
    "--optimization-level": "optimization_level",
    "--workspace-mib": "workspace_bytes",
    "--timing-cache": "timing_cache",
    "--version-compatible": "version_compatible",
    "--hardware-compatible": "hardware_compatible",
    "--refittable": "refittable",
    "--strip-plan": "strip_plan",
    "--target": "targets",
}

_EXAMPLES = """
maskplan build sparse.fp16.onnx --backend tensorrt --profile 1:8:32 -o engine.plan
maskplan build sparse.fp16.onnx --backend tensorrt-rtx --target sm86,sm89,sm120 -o engine.rtx.plan
maskplan build sparse.onnx --three-way dense.onnx -o three_way
maskplan build sparse.fp16.onnx --print-trtexec 10
maskplan build sparse.fp16.onnx --import engine.plan --layer-info layers.json --trt-version 10.13.3.9 --profile 1:8:32
"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    add_command(app, build, _EXAMPLES, _defaults)


def _defaults() -> dict[str, object]:
    from maskplan.engines.build import BuildOptions
    from maskplan.engines.trt.options import TrtOptions

    return {**vars(TrtOptions()), "sparse": BuildOptions.sparse_weights}


def build(
    model: options.OnnxFile,
    backend: options.BackendOption = "auto",
    profile: Annotated[
        list[str] | None,
        typer.Option(
            help="Batch sizes MIN:OPT:MAX, or shapes of dynamic inputs, NAME:MIN:OPT:MAX, separated by commas, "
            "such as input:1x3x320x320:8x3x640x640:8x3x1280x1280. Repeatable, but not with --import."
        ),
    ] = None,
    sparse: Annotated[bool | None, typer.Option(help="Allow sparse kernels.")] = None,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="The engine; by default MODEL.engine.plan or .onnx.")
    ] = None,
    tf32: Annotated[bool | None, typer.Option(help="Let FP32 layers round to TF32.", rich_help_panel=_TRT)] = None,
    optimization_level: Annotated[
        int | None,
        typer.Option(min=0, max=5, help="Below 3 the builder may skip sparse kernels.", rich_help_panel=_TRT),
    ] = None,
    workspace_mib: Annotated[
        int | None, typer.Option(min=1, help="Largest workspace of a kernel, in MiB.", rich_help_panel=_TRT)
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="Timing cache, shared by all builds that name it.", rich_help_panel=_TRT)
    ] = None,
    version_compatible: Annotated[
        bool | None, typer.Option(help="The plan also loads in later TensorRT versions.", rich_help_panel=_TRT)
    ] = None,
    hardware_compatible: Annotated[
        bool | None,
        typer.Option(help="The plan runs on Ampere and newer GPUs, not only this one.", rich_help_panel=_TRT),
    ] = None,
    refittable: Annotated[
        bool | None, typer.Option(help="The plan's weights can be changed later.", rich_help_panel=_TRT)
    ] = None,
    strip_plan: Annotated[bool | None, typer.Option(help="Write a plan without weights.", rich_help_panel=_TRT)] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="SM,SM",
            help="TensorRT-RTX only: kinds of GPUs that the plan runs on, such as sm86,sm89,sm120; by default all from "
            "Ampere on.",
            rich_help_panel=_TRT,
        ),
    ] = None,
    int8_mode: Annotated[
        Int8Mode,
        choice(
            Int8Mode,
            "--int8-mode",
            help="explicit: by the Q/DQ nodes of the graph; implicit: an FP32 graph, calibrated by TensorRT 10 itself.",
            rich_help_panel=_TRT,
        ),
    ] = EXPLICIT,
    data: Annotated[
        Path | None,
        typer.Option(help="With --int8-mode implicit: data folder with images in train/.", rich_help_panel=_TRT),
    ] = None,
    calibration_cache: Annotated[
        Path | None,
        typer.Option(
            help="With --int8-mode implicit: calibration cache of TensorRT, read if it exists, otherwise written.",
            rich_help_panel=_TRT,
        ),
    ] = None,
    print_trtexec: Annotated[
        int | None,
        typer.Option(
            metavar="10|11",
            help="Print the trtexec commands for this major version of TensorRT and build nothing.",
            rich_help_panel=_TRT,
        ),
    ] = None,
    print_polygraphy: Annotated[
        bool,
        typer.Option(
            "--print-polygraphy",
            help="Print the polygraphy command for --backend tensorrt or tensorrt-rtx and build nothing.",
            rich_help_panel=_TRT,
        ),
    ] = False,
    three_way: Annotated[
        Path | None,
        typer.Option(
            metavar="DENSE.onnx",
            help="Build DENSE.onnx, and MODEL with the sparse flag off and on, three times each, into the folder -o.",
        ),
    ] = None,
    import_: Annotated[
        Path | None, typer.Option("--import", help="Import a plan that trtexec built.", rich_help_panel=_TRT)
    ] = None,
    layer_info: Annotated[
        Path | None,
        typer.Option(help="With --import: the file that trtexec --exportLayerInfo wrote.", rich_help_panel=_TRT),
    ] = None,
    trt_version: Annotated[
        str | None,
        typer.Option(help="With --import: version of TensorRT, such as 10.13.3.9.", rich_help_panel=_TRT),
    ] = None,
    compute_capability: Annotated[
        str | None,
        typer.Option(help="With --import: compute capability of the GPU, such as 9.0.", rich_help_panel=_TRT),
    ] = None,
) -> None:
    """Compile an ONNX file to an engine, with a sidecar file that describes it."""
    from maskplan.engines.build import BuildOptions, build_engine, choose_backend
    from maskplan.engines.trt.options import TrtOptions
    from maskplan.engines.trt.versions import require_supported
    from maskplan.exporters.metadata import describe_onnx

    trt = override(
        TrtOptions(),
        tf32=tf32,
        optimization_level=optimization_level,
        workspace_bytes=workspace_mib * 2**20 if workspace_mib else None,
        timing_cache=timing_cache,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        refittable=refittable,
        strip_plan=strip_plan,
        targets=None if target is None else _targets(target),
    )
    _require_implicit(int8_mode, {"--data": data, "--calibration-cache": calibration_cache})
    import_values = dict(zip(_IMPORT_OPTIONS, (layer_info, trt_version, compute_capability), strict=True))
    tasks = {
        "--print-trtexec": print_trtexec,
        "--print-polygraphy": print_polygraphy or None,
        "--import": import_,
        "--three-way": three_way,
    }
    _require_one_task([name for name, value in (tasks | import_values).items() if value is not None])
    _require_build(int8_mode, [name for name, value in tasks.items() if value is not None])
    chosen, reason = choose_backend(backend)
    needs_tensorrt = [name for name in ("--print-trtexec", "--import") if tasks[name] is not None]
    if chosen in GPU_BACKENDS:
        require_supported(chosen, trt, implicit_int8=int8_mode == IMPLICIT)
    if chosen != TENSORRT and not (needs_tensorrt and chosen != backend):
        mode = ["--int8-mode implicit"] if int8_mode == IMPLICIT else []
        others = [] if chosen in GPU_BACKENDS else [*mode, *_changed(trt)]
        _refuse_or_warn([*needs_tensorrt, *others], chosen, was_requested=chosen == backend)
    onnx_model = describe_onnx(model)
    build_options = override(BuildOptions(chosen, _profiles(profile, onnx_model), trt=trt), sparse_weights=sparse)
    if print_trtexec is not None:
        _print_trtexec(onnx_model, three_way, build_options, out, print_trtexec)
    elif print_polygraphy:
        path = _engine_path(model, out, build_options.backend)
        print("\n".join(_polygraphy_lines(onnx_model, build_options, path)))
    elif three_way is not None:
        _build_three_way(onnx_model, three_way, build_options, reason, out)
    elif import_ is not None:
        has_profile = profile is not None or any(spec.shape and spec.shape[0] is not None for spec in onnx_model.inputs)
        info, version = _require_import_values(layer_info, trt_version, has_profile)
        _import_plan(onnx_model, import_, info, build_options, version, compute_capability, out)
    else:
        implicit = None if int8_mode == EXPLICIT else _implicit(onnx_model, data, calibration_cache)
        engine = build_engine(onnx_model, override(build_options, implicit=implicit), _engine_path(model, out, chosen))
        _show(engine, reason)


def _targets(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip().lower() for part in text.split(",")))


def _engine_path(model: Path, out: Path | None, backend: Backend) -> Path:
    from maskplan.engines.build import SUFFIX

    return out or model.with_name(f"{model.stem}.engine{SUFFIX[backend]}")


def _show(engine: EngineFile, reason: str) -> None:
    print_line(
        f"{engine.path}: {engine.precision} on {engine.backend} {engine.runtime_version} ({reason}),"
        f" {engine.bytes:,} bytes"
    )
    for note in engine.notes:
        print_line(f"note: {note}")


def _build_three_way(
    onnx_model: OnnxModel, dense: Path, build_options: BuildOptions, reason: str, out: Path | None
) -> None:
    from maskplan.exporters.metadata import describe_onnx
    from maskplan.pipeline.timing.three_way import build_three_way

    folder = out or onnx_model.path.with_name(f"{onnx_model.path.stem}.three_way")
    engines = build_three_way(describe_onnx(dense), onnx_model, build_options, folder)
    count = sum(map(len, engines.values()))
    again = shell_command(["maskplan", "time", "--three-way", folder])
    print_line(f"{folder}: {count} engines on {build_options.backend} ({reason}); {again}")


def _import_plan(
    onnx_model: OnnxModel,
    plan: Path,
    layer_info: Path,
    build_options: BuildOptions,
    trt_version: str,
    compute_capability: str | None,
    out: Path | None,
) -> None:
    from maskplan.engines.sidecar import write_sidecar
    from maskplan.engines.trt.import_plan import import_plan

    engine = import_plan(
        onnx_model,
        plan,
        layer_info,
        build_options.profiles,
        build_options.sparse_weights,
        build_options.trt,
        trt_version,
        compute_capability,
        _engine_path(onnx_model.path, out, TENSORRT),
    )
    write_sidecar(engine)
    _show(engine, "imported")


def _profiles(given: list[str] | None, onnx_model: OnnxModel) -> tuple[Profile, ...]:
    from maskplan.engines.build import DEFAULT_PROFILES, parse_profile, profiles_for

    if given:
        return tuple(dict.fromkeys(parse_profile(text) for text in given))
    return profiles_for(onnx_model, tuple(p.opt for p in DEFAULT_PROFILES))


def _require_one_task(given: Collection[str]) -> None:
    """Raise on options that only work together, or not at all: no option is ignored without a message."""
    from maskplan.pipeline.core.errors import InputError

    alone = [name for name in _IMPORT_OPTIONS if name in given and "--import" not in given]
    if alone:
        raise InputError(f"{', '.join(alone)} without --import", fix="name the plan that trtexec built with --import")
    others = [name for name in ("--print-trtexec", "--three-way") if name in given and "--import" in given]
    if others:
        raise InputError(f"--import with {', '.join(others)}", fix="give only one of them")
    others = [name for name in ("--print-trtexec", "--three-way", "--import") if name in given]
    if others and "--print-polygraphy" in given:
        raise InputError(f"--print-polygraphy with {', '.join(others)}", fix="give only one of them")


def _require_implicit(mode: Int8Mode, values: dict[str, Path | None]) -> None:
    """Raise if options of the implicit mode are given in the explicit one."""
    from maskplan.pipeline.core.errors import InputError

    given = [name for name, value in values.items() if value is not None]
    if mode == EXPLICIT and given:
        raise InputError(
            f"{', '.join(given)} without --int8-mode {IMPLICIT}", fix="use maskplan calibrate to make a graph with Q/DQ"
        )


def _require_build(mode: Int8Mode, tasks: Collection[str]) -> None:
    """Raise if the implicit mode is given with a task that does not calibrate: its options would have no effect."""
    from maskplan.pipeline.core.errors import InputError

    if mode == IMPLICIT and tasks:
        raise InputError(
            f"--int8-mode {IMPLICIT} with {', '.join(tasks)}",
            found="TensorRT calibrates only when maskplan builds the engine itself",
            fix="make a graph with Q/DQ with maskplan calibrate, and give that without --int8-mode",
        )


def _implicit(model: OnnxModel, data: Path | None, cache: Path | None) -> ImplicitInt8:
    """What TensorRT calibrates on: the images that `maskplan calibrate` would use, or a cache alone."""
    from maskplan.calibration.batches import calibration_batches, choose_images
    from maskplan.calibration.calibrate import CalibrateOptions
    from maskplan.engines.trt.calibrator import ImplicitInt8
    from maskplan.pipeline.cli.calibrate import calibration_images
    from maskplan.pipeline.core.errors import InputError

    if model.precision != "fp32":
        fix = "give the FP32 graph; a graph in FP16 or with Q/DQ is built without --int8-mode implicit"
        raise InputError("the implicit INT8 mode takes FP32 graphs", where=model.path, found=model.precision, fix=fix)
    defaults = CalibrateOptions()
    if cache is not None and cache.is_file():
        if data is not None:
            log.warning("%s exists and is read: --data %s has no effect", cache, data)
        return ImplicitInt8(lambda: iter(()), defaults.batch, cache)
    source = calibration_images(model.path, data, None, None, defaults.seed)
    chosen = choose_images(source.train, defaults.images, defaults.seed)
    return ImplicitInt8(
        lambda: calibration_batches(chosen, source.preprocessing, defaults.batch), defaults.batch, cache
    )


def _refuse_or_warn(names: list[str], backend: Backend, *, was_requested: bool) -> None:
    """Handle TensorRT's options on another backend: an error if the user chose the backend, else a warning."""
    from maskplan.pipeline.core.errors import InputError

    if names and was_requested:
        raise InputError(
            f"{', '.join(names)}: only for TensorRT", found=f"--backend {backend}", fix="remove one or the other"
        )
    if names:
        log.warning("%s: only for TensorRT, ignored on %s", ", ".join(names), backend)


def _changed(trt: TrtOptions) -> list[str]:
    """Names of the options that are not at their defaults."""
    default = type(trt)()
    return [option for option, field in _TRT_FIELDS.items() if getattr(trt, field) != getattr(default, field)]


def _require_import_values(layer_info: Path | None, version: str | None, has_profile: bool) -> tuple[Path, str]:
    """What `--import` cannot read from the plan; raise with everything that is missing."""
    from maskplan.pipeline.core.errors import InputError

    if layer_info is not None and version is not None and has_profile:
        return layer_info, version
    values = {"--layer-info": layer_info, "--trt-version": version, "--profile": has_profile or None}
    raise InputError(
        "--import needs more information about the plan",
        found=f"no {', '.join(name for name, value in values.items() if value is None)}",
        fix="give --layer-info (from trtexec --exportLayerInfo), --trt-version and the --profile of the build",
    )


def _print_trtexec(
    onnx_model: OnnxModel, three_way: Path | None, build_options: BuildOptions, out: Path | None, major: int
) -> None:
    """Print the commands for one engine; with a dense model for the nine engines of `time --three-way`."""
    from maskplan.exporters.metadata import describe_onnx

    dense = None if three_way is None else describe_onnx(three_way)
    out = out or onnx_model.path.with_name(f"{onnx_model.path.stem}.{'engine.plan' if dense is None else 'three_way'}")
    print("\n".join(_trtexec_lines(onnx_model, dense, build_options, out, major)))


def _polygraphy_lines(onnx_model: OnnxModel, build_options: BuildOptions, out: Path) -> list[str]:
    from maskplan.engines.trt.polygraphy_build import polygraphy_lines
    from maskplan.pipeline.core.errors import InputError

    if build_options.backend not in GPU_BACKENDS:
        fix = "give --backend tensorrt or tensorrt-rtx"
        raise InputError("--print-polygraphy prints builds of TensorRT and TensorRT-RTX", fix=fix)
    sparse, trt = build_options.sparse_weights, build_options.trt
    return polygraphy_lines(onnx_model, build_options.profiles, sparse, trt, out, build_options.backend)


def _trtexec_lines(
    onnx_model: OnnxModel, dense: OnnxModel | None, build_options: BuildOptions, out: Path, major: int
) -> list[str]:
    """Command lines; with a dense model a folder for each profile."""
    from maskplan.engines.trt.trtexec import MAJORS, profile_label, trtexec_lines
    from maskplan.pipeline.core.errors import InputError
    from maskplan.pipeline.timing.three_way import planned_builds

    profiles, trt = build_options.profiles, build_options.trt
    if major not in MAJORS:
        raise InputError(f"--print-trtexec {major}", fix="give 10 or 11")
    if dense is None:
        return trtexec_lines(onnx_model, profiles, build_options.sparse_weights, trt, out, major)
    lines = []
    for profile in profiles:
        folder = out if len(profiles) == 1 else out / profile_label(profile, profiles)
        lines.append(shlex.join(["mkdir", "-p", str(folder)]))
        for planned in planned_builds(dense, onnx_model, trt):
            plan = folder / f"{planned.name}.plan"
            lines += trtexec_lines(planned.model, (profile,), planned.sparse_weights, trt, plan, major)
    return list(dict.fromkeys(lines))
