"""The deploy stage: add engines to a Triton model repository.

The complete version folder appears first, then the config names it.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from maskplan.engines.sidecar import read_engine, sidecar_path
from maskplan.pipeline.core.artifacts import Deployment, EngineFile
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.escaping import one_line
from maskplan.pipeline.core.files import read_bytes, write_atomically
from maskplan.pipeline.core.validation import at_least
from maskplan.pipeline.triton.config import Serving, config_text, model_files, platform_of, require_platform
from maskplan.pipeline.triton.golden import Golden, golden_files
from maskplan.pipeline.triton.repository import (
    PREVIOUS,
    REPOSITORY_OPTION,
    add_version,
    is_rolled_back,
    locked,
    model_folder,
    next_version,
    versions_in,
    write_config,
)
from maskplan.pipeline.triton.served_config import CONFIG, parse_config, read_config

_LOG = logging.getLogger(__name__)
_LABELS = "labels.txt"
# By default the new one and the one before.
_SERVED_VERSIONS = 2
_CAPABILITY = re.compile(r"\d+\.\d+")


@dataclass(frozen=True)
class DeployOptions:
    """Where to deploy, how to serve, and what to refuse.

    Attributes:
        repository: Triton's model repository.
        name: Name of the model in it.
        allow_untrained: Deploy an engine with random weights, for timing.
        keep_versions: Number of versions that are served at a time, the new one included; older ones stay on disk. None: the
            version before too, where one config fits both, for clients that have asked for the version and name it.
        serving: How Triton runs the model.
    """

    repository: Path
    name: str
    allow_untrained: bool = False
    keep_versions: int | None = None
    serving: Serving = field(default_factory=Serving)

    def __post_init__(self) -> None:
        if self.keep_versions is not None:
            at_least(1, keep_versions=self.keep_versions)


def deploy(engine_paths: Path | Sequence[Path], options: DeployOptions, golden: Golden | None = None) -> Deployment:
    """Add an engine to a repository as the model's next version.

    A config names the versions that it serves, and files that it names are never changed: until the new config is in place,
    the old one keeps serving the old version, and the server does until it has loaded the new one.

    Args:
        engine_paths: One engine, or several plans of one model, each for GPUs of another compute capability.
        options: Where and how to deploy.
        golden: An input (with batch) and the engine's output for it, to be stored next to the engine.

    Raises:
        InputError: An engine has random weights or none or does not match its sidecar, the engines are not of one model,
            Triton cannot serve them with these options, or inputs and outputs differ from those served under this name.
        HostError: The repository cannot be written.
    """
    paths = [engine_paths] if isinstance(engine_paths, Path) else list(engine_paths)
    engines = [read_engine(path) for path in paths]
    for engine in engines:
        require_platform(engine.backend, engine.path)
    _require_weights(engines)
    _require_trained(engines, options)
    _require_one_model(engines)
    folder = model_folder(options.repository, options.name)
    with locked(folder):
        return _deploy(engines, options, golden, folder)


def _deploy(engines: Sequence[EngineFile], options: DeployOptions, golden: Golden | None, folder: Path) -> Deployment:
    version = next_version(folder)
    config, labels = folder / CONFIG, _labels(folder, version, engines[0])
    versions = [*_kept(folder, engines, options), version]
    text = config_text(engines, options.name, options.serving, versions=versions, labels=labels[0] if labels else None)
    copies: dict[str, Path] = {}
    for name, engine in model_files(engines).items():
        copies[name] = engine.path
        copies[sidecar_path(Path(name)).name] = sidecar_path(engine.path)
    if config.is_file():
        _require_same_io(config, text)
        copies[PREVIOUS] = config
    extra_files = golden_files(golden, engines[0], options.name, version) if golden is not None else {}
    add_version(folder, version, copies, extra_files)
    written = [*(folder / str(version) / name for name in model_files(engines)), config]
    if labels:
        _write_labels(folder / labels[0], labels[1])
        written.append(folder / labels[0])
    write_config(config, text.encode())
    return Deployment(folder, version, platform_of(engines[0]), tuple(written))


def _require_weights(engines: Sequence[EngineFile]) -> None:
    stripped = [e.path for e in engines if e.strip_plan]
    if stripped:
        raise InputError(
            "the plan is stripped of its weights, and Triton cannot refit plans",
            where=listed(stripped),
            fix="build it without --strip-plan",
        )


def _require_trained(engines: Sequence[EngineFile], options: DeployOptions) -> None:
    random = {e.path: e.provenance.origin for e in engines if e.provenance is not None and not e.provenance.trained}
    if random and not options.allow_untrained:
        raise InputError(
            "the engine's weights are random",
            where=listed(random),
            found=listed(dict.fromkeys(random.values())),
            fix="deploy a trained model, or pass --allow-untrained to serve it for timing",
        )


def _require_one_model(engines: Sequence[EngineFile]) -> None:
    """Require that several engines are plans that differ only in the GPU."""
    if not engines:
        raise InputError("no engine to deploy", fix="pass one engine, or several plans of one model")
    if len(engines) == 1:
        return
    first, problems = engines[0], []
    copies = Counter(e.compute_capability for e in engines)
    for e in engines:
        differs = {
            f"for {e.backend}": e.backend != "tensorrt",
            f"of another ONNX file, sha256 {e.onnx_sha256[:12]}": e.onnx_sha256 != first.onnx_sha256,
            "different inputs or outputs": (e.inputs, e.outputs) != (first.inputs, first.outputs),
            f"of TensorRT {e.runtime_version}, not {first.runtime_version}": e.runtime_version != first.runtime_version,
            f"profiles {', '.join(map(str, e.profiles))}": e.profiles != first.profiles,
            f"compute capability {e.compute_capability}": not _CAPABILITY.fullmatch(e.compute_capability or ""),
            f"not the only one for compute capability {e.compute_capability}": copies[e.compute_capability] > 1,
        }
        wrong = [what for what, holds in differs.items() if holds]
        if wrong:
            problems.append(f"{e.path}: {'; '.join(wrong)}")
    if problems:
        raise InputError(
            "the engines are not plans of one model for several GPUs",
            found="\n         ".join(problems),
            fix=f"build each from the ONNX file of {first.path} with the same TensorRT and profiles, one for each compute"
            " capability; deploy any other engine under a different --name",
        )


def _labels(folder: Path, version: int, engine: EngineFile) -> tuple[str, bytes] | None:
    """Name and bytes of the label file; an existing file with other labels may be in use and is not changed."""
    data = _label_lines(engine)
    if not data:
        return None
    common = folder / _LABELS
    name = f"labels.{version}.txt" if common.is_file() and read_bytes(common) != data else _LABELS
    return name, data


def _label_lines(engine: EngineFile) -> bytes:
    # Triton counts lines: a newline in a label would shift all labels after it.
    labels = engine.provenance.labels if engine.provenance is not None else ()
    return "".join(f"{one_line(label)}\n" for label in labels).encode()


def _write_labels(path: Path, data: bytes) -> None:
    # A newer file would make a polling server load the kept versions again.
    if not path.is_file() or read_bytes(path) != data:
        write_atomically(path, data, option=REPOSITORY_OPTION)


def _kept(folder: Path, engines: Sequence[EngineFile], options: DeployOptions) -> list[int]:
    """Earlier versions to keep serving; one config must fit all of them."""
    count = (options.keep_versions or _SERVED_VERSIONS) - 1
    earlier = _earlier(folder)[-count:] if count else []
    problems = [f"version {v} {problem}" for v in earlier for problem in _misfits(folder / str(v), engines)]
    if problems and options.keep_versions is None:
        _LOG.info("only the new version is served: %s", listed(problems))
        return []
    if problems:
        raise InputError(
            "the versions to keep need a different config",
            where=folder,
            found=listed(problems),
            fix="lower --keep-versions, or choose another --name",
        )
    return earlier


def _earlier(folder: Path) -> list[int]:
    """Versions that have been served and not taken back: none that an interrupted deployment left above the served ones."""
    versions = [v for v in versions_in(folder) if not is_rolled_back(folder, v)]
    served = read_config(folder / CONFIG).versions if (folder / CONFIG).is_file() else ()
    return [v for v in versions if not served or v <= max(served)]


def _misfits(version: Path, engines: Sequence[EngineFile]) -> list[str]:
    """Why a version cannot be served with the config of these engines."""
    problems = []
    for name, engine in model_files(engines).items():
        path = version / name
        if not (path.is_file() and sidecar_path(path).is_file()):
            problems.append(f"has no {name}" if not path.is_file() else f"has no {sidecar_path(path).name}")
            continue
        served = read_engine(path)
        if engine.backend == "tensorrt" and served.profiles != engine.profiles:
            problems.append("has other profiles")
        if _label_lines(served) != _label_lines(engine):
            problems.append("has other labels")
    return problems


def _require_same_io(config: Path, text: str) -> None:
    served, new = read_config(config).tensors, parse_config(text, config).tensors
    if served != new:
        changed = [
            f"{t}: {served.get(t, 'none')} becomes {new.get(t, 'none')}"
            for t in {**served, **new}
            if served.get(t) != new.get(t)
        ]
        raise InputError(
            "the repository serves different inputs and outputs under this name",
            where=config,
            found=f"{listed(changed)}; clients of the served version would break",
            fix="choose another --name",
        )
