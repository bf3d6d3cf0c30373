"""What differs between TensorRT and TensorRT-RTX, and between TensorRT's versions 10.3 to 11."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from maskplan.engines.trt.cuda import has_driver
from maskplan.engines.trt.options import TrtOptions
from maskplan.pipeline.core.choices import TENSORRT, TENSORRT_RTX, Backend
from maskplan.pipeline.core.errors import HostError, InputError, listed

if TYPE_CHECKING:
    from maskplan.engines.trt.log_capture import TrtLogCapture

_ALWAYS_STRONGLY_TYPED_MAJOR = 11
_IMPLICIT_INT8 = "int8-mode implicit"


@dataclass(frozen=True)
class Refusal:
    """Why a library does not take an option, and what to do instead.

    Attributes:
        reason: Why.
        fix: What to do.
        without_driver: Only refused where there is no NVIDIA driver.
    """

    reason: str
    fix: str
    without_driver: bool = False


@dataclass(frozen=True)
class Library:
    """One of NVIDIA's two compilers, which share their Python API.

    Attributes:
        backend: The backend that uses it.
        name: As NVIDIA writes it.
        package: Its Python package.
        min_version: The oldest version that is supported.
        how_to_install: The fix where it is missing.
        how_to_upgrade: The fix where it is too old.
        how_to_repair: The fix where its package is there but does not load.
        how_to_start: The fix where it loads but does not start.
        builds_on_gpu: A build needs a GPU, times its kernels there, and fits that GPU. Otherwise a build needs no GPU and no
            driver, the same inputs give the same bytes, and kernels are chosen on the GPU that runs the plan.
        polygraphy: What stands before `polygraphy` on a command line so that it uses this library.
        refused: Options that it does not take, by field of `TrtOptions`, and the implicit INT8 mode.
    """

    backend: Backend
    name: str
    package: str
    min_version: tuple[int, int]
    how_to_install: str
    how_to_upgrade: str
    how_to_repair: str
    how_to_start: str
    builds_on_gpu: bool
    polygraphy: tuple[str, ...]
    refused: Mapping[str, Refusal]


_ON_ANY_GPU = "leave it out: without --target a plan runs on all kinds of GPUs that the version knows, from Ampere on"
_NEEDS_DRIVER = "without an NVIDIA driver the compiler of this version fails with this option"

LIBRARIES: dict[Backend, Library] = {
    TENSORRT: Library(
        backend=TENSORRT,
        name="TensorRT",
        package="tensorrt",
        min_version=(10, 3),
        how_to_install="on a GPU host: pip install 'maskplan[tensorrt]'; copy the output folder there, finished stages"
        " are reused",
        how_to_upgrade="pip install --upgrade tensorrt, in a separate environment",
        how_to_repair="install it again on a GPU host: pip install --force-reinstall tensorrt",
        how_to_start="check that nvidia-smi lists a GPU and that the driver is recent enough for this TensorRT",
        builds_on_gpu=True,
        polygraphy=(),
        refused={
            "targets": Refusal(
                "it builds for the GPU of this host", "build on each kind of GPU, or use --hardware-compatible"
            ),
        },
    ),
    TENSORRT_RTX: Library(
        backend=TENSORRT_RTX,
        name="TensorRT-RTX",
        package="tensorrt_rtx",
        min_version=(1, 4),
        how_to_install="pip install 'maskplan[rtx]', which needs no GPU",
        how_to_upgrade="pip install --upgrade tensorrt-rtx-cu13",
        how_to_repair="install it again: pip install --force-reinstall tensorrt-rtx-cu13",
        how_to_start="install it again: pip install --force-reinstall tensorrt-rtx-cu13",
        builds_on_gpu=False,
        polygraphy=("POLYGRAPHY_USE_TENSORRT_RTX=1",),
        refused={
            _IMPLICIT_INT8: Refusal(
                "all its networks are strongly typed", "make a graph with Q/DQ with maskplan calibrate, and build that"
            ),
            "version_compatible": Refusal(
                "its package lacks the lean runtime that such a plan needs", "build again for each version"
            ),
            "hardware_compatible": Refusal("it changes nothing: its plans are not for one kind of GPU", _ON_ANY_GPU),
            "optimization_level": Refusal("it changes nothing: every level gives the same plan", "leave it out"),
            "timing_cache": Refusal(
                "it times no kernels when it builds, and its timing caches are without effect", "leave it out"
            ),
            "refittable": Refusal(_NEEDS_DRIVER, "build on a host with an RTX GPU", without_driver=True),
            "strip_plan": Refusal(_NEEDS_DRIVER, "build on a host with an RTX GPU", without_driver=True),
        },
    ),
}


def is_installed(package: str) -> bool:
    """Whether a package is there, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # import finders may raise these
        return False


def import_library(backend: Backend) -> Any:
    """Import the Python package of TensorRT or TensorRT-RTX; nothing else imports either.

    Raises:
        HostError: It is not installed, its libraries do not load, or it is too old.
    """
    library = LIBRARIES[backend]
    try:
        trt = importlib.import_module(library.package)
        version = trt.__version__
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == library.package
        raise HostError(
            f"{library.name} is not installed{'' if missing else ' completely'}",
            found=f"{type(error).__name__}: {error}",
            fix=library.how_to_install if missing else library.how_to_repair,
        ) from error
    if _release(version) < library.min_version:
        raise HostError(
            f"{library.name} is too old",
            found=f"{library.name} {version}, required is {'.'.join(map(str, library.min_version))} or newer",
            fix=library.how_to_upgrade,
        )
    return trt


def library_of(trt: Any) -> Library:
    """The library that a Python package belongs to, or the bindings in it."""
    return LIBRARIES[TENSORRT_RTX if trt.__name__.startswith(LIBRARIES[TENSORRT_RTX].package) else TENSORRT]


def require_supported(backend: Backend, options: TrtOptions, *, implicit_int8: bool = False) -> None:
    """Raise unless the library takes all options that are not at their defaults.

    Raises:
        InputError: It does not take some; the message gives the reason for each, and what to do.
    """
    library, default = LIBRARIES[backend], TrtOptions()
    given = {name for name, value in vars(options).items() if value != getattr(default, name)}
    given |= {_IMPLICIT_INT8} if implicit_int8 else set()
    refused = {
        _as_option(name): refusal
        for name, refusal in library.refused.items()
        if name in given and not (refusal.without_driver and has_driver())
    }
    if refused:
        raise InputError(
            f"{library.name} does not take {', '.join(refused)}",
            found="; ".join(f"{option}: {refusal.reason}" for option, refusal in refused.items()),
            fix="; ".join(
                refusal.fix if len(refused) == 1 else f"{option}: {refusal.fix}" for option, refusal in refused.items()
            ),
        )


def require_buildable(backend: Backend, options: TrtOptions) -> None:
    """Raise before the work whose result is to be built, where the build is known to fail.

    A library that builds on a GPU may be missing here: the output folder is finished on another host.

    Raises:
        InputError: See `require_supported`.
        HostError: See `import_library`.
    """
    require_supported(backend, options)
    if not LIBRARIES[backend].builds_on_gpu:
        import_library(backend)


def _as_option(name: str) -> str:
    return "--target" if name == "targets" else f"--{name.replace('_', '-')}"


def set_targets(trt: Any, config: Any, targets: tuple[str, ...]) -> None:
    """Set the kinds of GPUs that a plan of TensorRT-RTX is built for; none leaves the library's own.

    Raises:
        InputError: The installed version does not know one of them.
    """
    if not targets:
        return
    kinds = member(trt, "ComputeCapability")
    assert kinds is not None, "checked by `require_supported`"
    known = {name.lower(): value for name, value in kinds.__members__.items() if name.startswith("SM")}
    unknown = [target for target in targets if target not in known]
    if unknown:
        library = library_of(trt)
        raise InputError(
            f"{library.name} does not build for this kind of GPU",
            where="--target",
            found=f"{listed(unknown)}; {library.name} {trt.__version__} knows {listed(known, len(known))}",
            fix="choose among these, or leave out --target for a plan that runs on all kinds from Ampere on",
        )
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(known[target], index)


def member(owner: Any, name: str) -> Any | None:
    """Get a member that only some versions have; None if it is missing.

    Enumerations change their integers between versions, so members are always looked up by name. Only this function looks
    up names at run time, so that tests can check every name in the sources against the real packages.
    """
    return getattr(owner, name, None)


def network_flags(trt: Any) -> int:
    """Creation flags of a strongly typed network; from version 11 on every network is, and the flag may be missing.

    Raises:
        HostError: An older version without the flag.
    """
    flag = member(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    if flag is not None:
        return 1 << int(flag)
    library = library_of(trt)
    if library.backend == TENSORRT and _release(trt.__version__) < (_ALWAYS_STRONGLY_TYPED_MAJOR, 0):
        raise HostError(
            "this TensorRT does not support strongly typed networks",
            found=f"TensorRT {trt.__version__} without the flag STRONGLY_TYPED",
            fix="install NVIDIA's package, version 10.3 or newer",
        )
    return 0


def construct(kind: Any, log_capture: TrtLogCapture, *arguments: Any) -> Any:
    """Construct a Builder, Runtime or OnnxParser with the capturing logger.

    Raises:
        HostError: TensorRT returns null, for example without a driver, which the bindings turn into an exception.
    """
    try:
        return kind(*arguments, log_capture.logger)
    except (TypeError, RuntimeError) as error:
        raise HostError(
            f"{log_capture.library.name} failed to create a {kind.__name__}",
            found=log_capture.reason() if log_capture.errors or log_capture.warnings else str(error),
            fix=log_capture.library.how_to_start,
        ) from error


def _release(version: str) -> tuple[int, int]:
    """Major and minor version; (0, 0) if the version cannot be parsed."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)
