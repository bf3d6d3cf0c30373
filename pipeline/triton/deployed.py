"""What a repository says was deployed: the served versions, their inputs and outputs, the engine and the golden pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.files import read_bytes
from maskplan.pipeline.core.serialization import parse_json
from maskplan.pipeline.triton.golden import FOLDER, array_files
from maskplan.pipeline.triton.repository import model_folder, versions_in
from maskplan.pipeline.triton.served_config import CONFIG, ServedConfig, read_config

_DESCRIPTION = "golden.json"
_ENGINES = ("model.plan", "model.onnx")


@dataclass(frozen=True)
class GoldenPair:
    """An input and the output that the engine had for it when it was deployed.

    Attributes:
        model: Name of the model.
        version: Its version.
        feeds: Inputs by name.
        outputs: Outputs by name.
        tolerance: Largest difference that counts as the same, as a share of the largest golden value.
    """

    model: str
    version: int
    feeds: Mapping[str, npt.NDArray[Any]]
    outputs: Mapping[str, npt.NDArray[Any]]
    tolerance: float


@dataclass(frozen=True)
class Deployed:
    """What a server should serve under a name.

    Attributes:
        model: Name of the model.
        version: The version that requests without a version get, or the one that was asked for.
        config: Of the repository; None if only a golden pair is known.
        versions: Versions that should be served; empty if only a golden pair is known.
        engine: The deployed engine; None if it is not known, or if there are several for several GPUs.
        golden: The version's golden pair, where there is one.
    """

    model: str
    version: int
    config: ServedConfig | None
    versions: tuple[int, ...]
    engine: Path | None
    golden: GoldenPair | None


def find_deployed(path: Path, model: str | None, version: int | None) -> Deployed:
    """Read what was deployed.

    Args:
        path: A model repository, a model's folder in one, or a golden pair: its folder or its `golden.json`.
        model: Name of the model; None if the path has one only.
        version: A version; None is the newest that the config serves.

    Raises:
        InputError: There is nothing of this kind, or a file cannot be read.
    """
    if path.name == _DESCRIPTION or (path / _DESCRIPTION).is_file():
        pair = read_golden(path.parent if path.name == _DESCRIPTION else path)
        _require_asked(path, pair, model, version)
        return Deployed(pair.model, pair.version, None, (), None, pair)
    folder = path if (path / CONFIG).is_file() else _only_model(path, model)
    config = read_config(folder / CONFIG)
    # Triton's own default is the newest version.
    versions = config.versions or tuple(versions_in(folder)[-1:])
    if not versions or (version is not None and version not in versions):
        raise InputError(
            "the version was not deployed" if versions else "the model has no version",
            where=folder,
            found=f"the config serves {listed(versions)}" if versions else None,
            fix="leave out --version, or deploy it" if versions else "deploy an engine first",
        )
    chosen = max(versions) if version is None else version
    engines = [folder / str(chosen) / name for name in _ENGINES]
    beside = folder / str(chosen) / FOLDER
    golden = read_golden(beside) if (beside / _DESCRIPTION).is_file() else None
    if golden is not None:
        _require_asked(beside, golden, None, chosen)
    return Deployed(
        model or folder.absolute().name,
        chosen,
        config,
        tuple(sorted(versions)),
        next((engine for engine in engines if engine.is_file()), None),
        golden,
    )


def read_golden(folder: Path) -> GoldenPair:
    """Read the golden pair that `deploy` wrote.

    Raises:
        InputError: A file is missing or damaged.
    """
    path = folder / _DESCRIPTION
    try:
        about = parse_json(read_bytes(path))
        feeds, outputs = (_arrays(folder, kind, about[kind]) for kind in ("input", "output"))
        return GoldenPair(str(about["model"]), int(about["version"]), feeds, outputs, float(about["tolerance"]))
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise InputError(
            "the golden pair cannot be read",
            where=path,
            found=f"{type(error).__name__}: {error}",
            fix="deploy the engine again",
        ) from error


def _arrays(folder: Path, kind: str, names: object) -> dict[str, npt.NDArray[Any]]:
    """Arrays by name; `names` is one name or a list of them."""
    listing = [str(name) for name in names] if isinstance(names, list) else [str(names)]
    arrays = {}
    for name, file in zip(listing, array_files(kind, len(listing)), strict=True):
        read_bytes(folder / file)
        arrays[name] = np.load(folder / file, allow_pickle=False)
    return arrays


def _only_model(repository: Path, model: str | None) -> Path:
    if model is not None:
        folder = model_folder(repository, model)
        if not (folder / CONFIG).is_file():
            raise InputError("no such model in the repository", where=folder / CONFIG, fix="check --model")
        return folder
    models = sorted(p.parent for p in repository.glob(f"*/{CONFIG}"))
    if len(models) != 1:
        raise InputError(
            "several models in the repository" if models else "not a model repository",
            where=repository,
            found=listed(p.name for p in models) if models else f"no folder with a {CONFIG}",
            fix="choose one with --model" if models else "give the --repository of `maskplan deploy`",
        )
    return models[0]


def _require_asked(path: Path, golden: GoldenPair, model: str | None, version: int | None) -> None:
    if version not in (None, golden.version) or model not in (None, golden.model):
        raise InputError(
            "the golden pair is of another version"
            if model in (None, golden.model)
            else "the golden pair is of another model",
            where=path,
            found=f"{golden.model} version {golden.version}",
            fix="give the golden pair of the version that is served, or leave out --model and --version",
        )
