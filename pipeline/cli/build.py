"""`build`: an ONNX file to an engine, three kinds of them, trtexec's command lines for it, or a plan that trtexec built."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from maskplan.engines.trt.calibrator import ImplicitInt8
    from maskplan.engines.trt.options import TrtOptions
    from maskplan.pipeline.core.artifacts import OnnxModel, Profile

log = logging.getLogger(__name__)

_TRT = "TensorRT"
EXPLICIT, IMPLICIT = "explicit", "implicit"
_OF_IMPORT = ("--layer-info", "--trt-version", "--compute-capability")
# Options by their fields in TrtOptions.
_OPTIONS = {
    "--tf32": "tf32",
    "--optimization-level": "optimization_level",
    "--workspace-mib": "workspace_bytes",
    "--timing-cache": "timing_cache",
    "--version-compatible": "version_compatible",
    "--hardware-compatible": "hardware_compatible",
    "--refittable": "refittable",
    "--strip-plan": "strip_plan",
}


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(
        epilog="Example:\n\n  maskplan build sparse.fp16.onnx --backend tensorrt --profile 1:8:32 -o engine.plan"
    )(build)


def build(
    model: Annotated[Path, typer.Argument(help="An ONNX file of any tool.", show_default=False)],
    backend: Annotated[str, typer.Option(help="auto, tensorrt or onnxruntime.")] = "auto",
    profile: Annotated[
        list[str] | None, typer.Option(help="Batch sizes MIN:OPT:MAX; repeatable, but not with --import.")
    ] = None,
    sparse: Annotated[bool, typer.Option(help="Allow sparse kernels.")] = True,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="The engine; MODEL.engine.plan or .onnx by default.")
    ] = None,
    tf32: Annotated[bool, typer.Option(help="Let FP32 layers round to TF32.", rich_help_panel=_TRT)] = False,
    optimization_level: Annotated[
        int, typer.Option(min=0, max=5, help="Below 3 sparse kernels may be left out.", rich_help_panel=_TRT)
    ] = 3,
    workspace_mib: Annotated[
        int | None, typer.Option(min=1, help="Scratch memory of a kernel at most.", rich_help_panel=_TRT)
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File of measurements, kept between builds and shared.", rich_help_panel=_TRT)
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option(help="Load in later TensorRT versions too.", rich_help_panel=_TRT)
    ] = False,
    hardware_compatible: Annotated[
        bool, typer.Option(help="Run on Ampere and newer, not only this GPU.", rich_help_panel=_TRT)
    ] = False,
    refittable: Annotated[bool, typer.Option(help="Weights can be changed later.", rich_help_panel=_TRT)] = False,
    strip_plan: Annotated[bool, typer.Option(help="A plan without weights.", rich_help_panel=_TRT)] = False,
    int8_mode: Annotated[
        str,
        typer.Option(
            metavar="explicit|implicit",
            help="explicit: by the Q/DQ of the graph; implicit: an FP32 graph, calibrated by TensorRT 10 itself.",
            rich_help_panel=_TRT,
        ),
    ] = EXPLICIT,
    data: Annotated[
        Path | None, typer.Option(help="With --int8-mode implicit: images in train/.", rich_help_panel=_TRT)
    ] = None,
    calibration_cache: Annotated[
        Path | None,
        typer.Option(
            help="With --int8-mode implicit: TensorRT's text cache, taken if there, else written.", rich_help_panel=_TRT
        ),
    ] = None,
    print_trtexec: Annotated[
        int | None,
        typer.Option(metavar="10|11", help="Print trtexec's command lines and build nothing.", rich_help_panel=_TRT),
    ] = None,
    three_way: Annotated[
        Path | None,
        typer.Option(
            metavar="DENSE.onnx",
            help="Build DENSE.onnx and MODEL with the sparse flag off and on, three times each, into the folder -o.",
        ),
    ] = None,
    import_: Annotated[
        Path | None, typer.Option("--import", help="Take a plan that trtexec built.", rich_help_panel=_TRT)
    ] = None,
    layer_info: Annotated[
        Path | None, typer.Option(help="With --import: what --exportLayerInfo wrote.", rich_help_panel=_TRT)
    ] = None,
    trt_version: Annotated[
        str | None, typer.Option(help="With --import: TensorRT's version, as in 10.13.3.9.", rich_help_panel=_TRT)
    ] = None,
    compute_capability: Annotated[
        str | None, typer.Option(help="With --import: of the GPU, as in 9.0.", rich_help_panel=_TRT)
    ] = None,
) -> None:
    """Compile an ONNX file to an engine with a sidecar that describes it."""
    from maskplan.engines.build import SUFFIX, BuildOptions, build_engine, choose_backend
    from maskplan.engines.trt.options import TrtOptions
    from maskplan.exporters.metadata import describe_onnx
    from maskplan.pipeline.core.choices import TENSORRT

    trt = TrtOptions(
        tf32=tf32,
        optimization_level=optimization_level,
        workspace_bytes=workspace_mib * 2**20 if workspace_mib else None,
        timing_cache=timing_cache,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        refittable=refittable,
        strip_plan=strip_plan,
    )
    implicit_only = {"--data": data, "--calibration-cache": calibration_cache}
    _require_int8_mode(int8_mode, [name for name, value in implicit_only.items() if value is not None])
    told = {"--layer-info": layer_info, "--trt-version": trt_version, "--compute-capability": compute_capability}
    tasks = {"--print-trtexec": print_trtexec, "--import": import_, "--three-way": three_way}
    _require_one_task({name: value for name, value in (tasks | told).items() if value is not None})
    chosen, why = choose_backend(backend)
    needs_tensorrt = [name for name in ("--print-trtexec", "--import") if tasks[name] is not None]
    if chosen != TENSORRT and not (needs_tensorrt and chosen != backend):
        mode = ["--int8-mode implicit"] if int8_mode == IMPLICIT else []
        _settle_ignored([*needs_tensorrt, *mode, *_changed(trt)], chosen, asked=chosen == backend)
    described = describe_onnx(model)
    profiles = _profiles(profile, described)
    if print_trtexec is not None:
        dense = None if three_way is None else describe_onnx(three_way)
        out = out or model.with_name(f"{model.stem}.{'engine.plan' if dense is None else 'three_way'}")
        print("\n".join(_trtexec_lines(described, dense, profiles, sparse, trt, out, print_trtexec)))
        return
    if three_way is not None:
        from maskplan.pipeline.timing.three_way import build_three_way

        folder = out or model.with_name(f"{model.stem}.three_way")
        made = build_three_way(describe_onnx(three_way), described, BuildOptions(chosen, profiles, trt=trt), folder)
        print(
            f"{folder}: {sum(map(len, made.values()))} engines on {chosen} ({why}); maskplan time --three-way {folder}"
        )
        return
    if import_ is not None:
        known = profile is not None or described.inputs[0].shape[0] is not None
        info, version = _require_told(layer_info, trt_version, known)
        from maskplan.engines.sidecar import write_sidecar
        from maskplan.engines.trt.import_plan import import_plan

        plan = out or model.with_name(f"{model.stem}.engine{SUFFIX[TENSORRT]}")
        engine = import_plan(described, import_, info, profiles, sparse, trt, version, compute_capability, plan)
        write_sidecar(engine)
        why = "imported"
    else:
        path = out or model.with_name(f"{model.stem}.engine{SUFFIX[chosen]}")
        implicit = None if int8_mode == EXPLICIT else _implicit(described, data, calibration_cache)
        engine = build_engine(described, BuildOptions(chosen, profiles, sparse, trt, implicit), path)
    print(
        f"{engine.path}: {engine.precision} on {engine.backend} {engine.runtime_version} ({why}), {engine.bytes:,} bytes"
    )
    for note in engine.notes:
        print(f"note: {note}")


def _profiles(given: list[str] | None, onnx_model: OnnxModel) -> tuple[Profile, ...]:
    from maskplan.engines.build import DEFAULT_PROFILES, parse_profile, profiles_for

    if given:
        return tuple(dict.fromkeys(parse_profile(text) for text in given))
    return profiles_for(onnx_model, tuple(p.opt for p in DEFAULT_PROFILES))


def _require_one_task(given: Mapping[str, object]) -> None:
    """Options that only work together, or not at all: nothing that was given may be left out silently."""
    from maskplan.pipeline.core.errors import InputError

    alone = [name for name in _OF_IMPORT if name in given and "--import" not in given]
    if alone:
        raise InputError(f"{', '.join(alone)} without --import", fix="name the plan that trtexec built with --import")
    others = [name for name in ("--print-trtexec", "--three-way") if name in given and "--import" in given]
    if others:
        raise InputError(f"--import with {', '.join(others)}", fix="give one of them")


def _require_int8_mode(mode: str, given: list[str]) -> None:
    from maskplan.pipeline.core.errors import InputError

    if mode not in (EXPLICIT, IMPLICIT):
        raise InputError(f"unknown --int8-mode {mode!r}", fix=f"choose {EXPLICIT} or {IMPLICIT}")
    if mode == EXPLICIT and given:
        raise InputError(
            f"{', '.join(given)} without --int8-mode {IMPLICIT}", fix="maskplan calibrate makes Q/DQ graphs"
        )


def _implicit(model: OnnxModel, data: Path | None, cache: Path | None) -> ImplicitInt8:
    """What TensorRT calibrates on: the images that `maskplan calibrate` would take, or a cache alone."""
    from maskplan.calibration.batches import calibration_batches, choose_images
    from maskplan.calibration.calibrate import CalibrateOptions
    from maskplan.engines.trt.calibrator import ImplicitInt8
    from maskplan.pipeline.cli.calibrate import calibration_images
    from maskplan.pipeline.core.errors import InputError

    if model.precision != "fp32":
        fix = "give the FP32 graph; one with Q/DQ, or in FP16, is built as it is"
        raise InputError("the implicit INT8 mode takes FP32 graphs", where=model.path, found=model.precision, fix=fix)
    defaults = CalibrateOptions()
    if cache is not None and cache.is_file():
        return ImplicitInt8(lambda: iter(()), defaults.batch, cache)
    source = calibration_images(model.path, data, None, None, defaults.seed)
    chosen = choose_images(source.train, defaults.images, defaults.seed)
    return ImplicitInt8(
        lambda: calibration_batches(chosen, source.preprocessing, defaults.batch), defaults.batch, cache
    )


def _settle_ignored(names: list[str], backend: str, *, asked: bool) -> None:
    """Refuse options that the backend asked for does not have; of one that was chosen, say that they do nothing."""
    from maskplan.pipeline.core.errors import InputError

    if names and asked:
        raise InputError(
            f"{', '.join(names)}: of TensorRT only", found=f"--backend {backend}", fix="leave out one or the other"
        )
    if names:
        log.warning("%s: of TensorRT only, without effect on %s", ", ".join(names), backend)


def _changed(given: TrtOptions) -> list[str]:
    """Names of the options that are not at their defaults."""
    from maskplan.engines.trt.options import TrtOptions

    default = TrtOptions()
    return [option for option, field in _OPTIONS.items() if getattr(given, field) != getattr(default, field)]


def _require_told(layer_info: Path | None, version: str | None, is_profile_known: bool) -> tuple[Path, str]:
    from maskplan.pipeline.core.errors import InputError

    if layer_info is not None and version is not None and is_profile_known:
        return layer_info, version
    told = {"--layer-info": layer_info, "--trt-version": version, "--profile": is_profile_known or None}
    raise InputError(
        "--import needs to know what it takes in",
        found=f"no {', '.join(name for name, value in told.items() if value is None)}",
        fix="give --layer-info (of trtexec --exportLayerInfo), --trt-version and the --profile of the build",
    )


def _trtexec_lines(
    model: OnnxModel,
    dense: OnnxModel | None,
    profiles: tuple[Profile, ...],
    sparse: bool,
    options: TrtOptions,
    out: Path,
    major: int,
) -> list[str]:
    """Lines for one engine; with a dense model for the nine that `time --three-way` takes, in a folder for each profile."""
    from maskplan.engines.trt.trtexec import MAJORS, label_of, trtexec_lines
    from maskplan.pipeline.core.errors import InputError
    from maskplan.pipeline.timing.three_way import planned_builds

    if major not in MAJORS:
        raise InputError(f"--print-trtexec {major}", fix="give 10 or 11")
    if dense is None:
        return trtexec_lines(model, profiles, sparse, options, out, major)
    lines = []
    for profile in profiles:
        folder = out if len(profiles) == 1 else out / label_of(profile, profiles)
        lines.append(shlex.join(["mkdir", "-p", str(folder)]))
        for one in planned_builds(dense, model, options):
            plan = folder / f"{one.name}.plan"
            lines += trtexec_lines(one.model, (profile,), one.sparse_weights, options, plan, major)
    return list(dict.fromkeys(lines))
