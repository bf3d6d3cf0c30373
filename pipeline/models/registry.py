"""From a model's name to its module: torchvision, timm, the user's own Python file, or the bundled digits_resnet."""

from __future__ import annotations

import hashlib
import inspect
import logging
import math
import os
import socket
import sys
import urllib.request
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import HostError, InputError, did_you_mean, listed
from maskplan.pipeline.core.files import sha256_of
from maskplan.pipeline.core.serialization import decode, encode
from maskplan.pipeline.core.user_code import create_module, execute, imports_from
from maskplan.pipeline.data.digits import BUNDLED_MODEL, CLASSES
from maskplan.pipeline.data.digits import PREPROCESSING as DIGITS_PREPROCESSING
from maskplan.pipeline.data.preprocessing import IMAGENET, INTERPOLATIONS, preprocessing_from_transforms
from maskplan.pipeline.models.factory_modules import prepare_module
from maskplan.pipeline.models.sources import SourceFile, imported_sources

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

SEGMENTATION = replace(IMAGENET, height=512, width=512, resize=0)
"""torchvision evaluates segmentation with a shorter side of 520; 512 is a whole number of strides."""

# Written by benchmarks/accuracy/train_digits_resnet.py.
BUNDLED_WEIGHTS = Path(__file__).with_name("digits_resnet.safetensors")


@dataclass(frozen=True)
class Architecture:
    """A module in evaluation mode, the preprocessing for its inputs, and labels of its outputs (empty if unknown)."""

    name: str
    module: nn.Module
    preprocessing: Preprocessing
    labels: tuple[str, ...]


def model_identity(spec: str) -> tuple[str, str]:
    """A model's name without folders, and a digest; for a Python file, of its content and the factory's name.

    Raises:
        InputError: The file of `file.py:factory` is missing.
    """
    file, factory = _split_file(spec)
    if file is None:
        return spec, hashlib.sha256(spec.encode()).hexdigest()
    return f"{file.stem}_{factory}", hashlib.sha256(f"{sha256_of(file)}:{factory}".encode()).hexdigest()


def model_folder(spec: str) -> Path:
    """The folder of a model's own file; the current folder for other models."""
    file, _ = _split_file(spec)
    return file.resolve().parent if file is not None else Path.cwd()


def is_own_file(spec: str) -> bool:
    """Whether the model is built by the user's own Python file."""
    return _split_file(spec)[0] is not None


def model_sources(spec: str) -> tuple[SourceFile, ...]:
    """What a model's own file imported from outside the installed packages, after it was built in this process."""
    file, _ = _split_file(spec)
    source = sys.modules.get(_module_name(file)) if file is not None else None
    return imported_sources(source) if source is not None else ()


def _module_name(file: Path) -> str:
    return f"maskplan_model_{file.stem}"


def folder_name(spec: str) -> str:
    """The default name of the output folder: `timm_x` for `timm/x`, `b_net` for `a/b.py:net`."""
    file, factory = _split_file(spec)
    return f"{file.stem}_{factory}" if file is not None else spec.replace("/", "_").replace(":", "_")


def build_model(spec: str, *, seed: int, classes: int | None = None, pretrained: bool = False) -> Architecture:
    """Build a model with seeded random weights, or with its library's pretrained ones.

    Args:
        spec: `resnet50`, `timm/NAME`, `path/to/file.py:factory` or `digits_resnet`.
        seed: For the random weights.
        classes: Number of outputs; None keeps the model's own.
        pretrained: Load the weights of the model's library, which may download them.

    Raises:
        InputError: Unknown model, or one that fails to build.
        HostError: The library is not installed, or the weights are not available.
    """
    try:
        import torch
    except ImportError as error:
        raise HostError(
            "PyTorch is not installed, and all stages up to export need it",
            fix="pip install 'maskplan[learn]', or copy a finished folder from a host that has it",
        ) from error
    torch.manual_seed(seed)
    file, factory = _split_file(spec)
    if spec == BUNDLED_MODEL:
        architecture = _bundled(classes, pretrained)
    elif file is not None:
        if pretrained:
            raise HostError(f"{file.name} has no pretrained weights", fix="give --weights FILE, or --weights random")
        architecture = _from_file(file, factory)
    elif spec.startswith("timm/"):
        architecture = _timm(spec.removeprefix("timm/"), classes, pretrained)
    else:
        architecture = _torchvision(spec, classes, pretrained)
    name = model_identity(spec)[0]
    return replace(
        architecture, name=name, module=prepare_module(architecture.module, architecture.preprocessing, name)
    )


def _split_file(spec: str) -> tuple[Path | None, str]:
    path, colon, factory = spec.rpartition(":")
    if not colon or not path.endswith(".py"):
        if spec.endswith(".py"):
            raise InputError(
                "no factory named", where=spec, fix=f"name the function that returns the model: {spec}:build"
            )
        return None, ""
    return Path(path), factory


def _bundled(classes: int | None, pretrained: bool) -> Architecture:
    from maskplan.pipeline.models.digits_resnet import DigitsResNet

    if pretrained:
        raise HostError(
            f"{BUNDLED_MODEL} has bundled weights for {len(CLASSES)} classes only",
            found=f"--classes {classes}",
            fix="give --weights FILE or random",
        )
    labels = CLASSES if classes in (None, len(CLASSES)) else ()
    return Architecture("", DigitsResNet(classes or len(CLASSES)), DIGITS_PREPROCESSING, labels)


def _torchvision(name: str, classes: int | None, pretrained: bool) -> Architecture:
    import torchvision

    classifiers = torchvision.models.list_models(module=torchvision.models)
    segmenters = torchvision.models.list_models(module=torchvision.models.segmentation)
    if name in torchvision.models.list_models(module=torchvision.models.detection):
        raise _detection(name)
    if name not in (*classifiers, *segmenters):
        hint = did_you_mean(name, [*classifiers, *segmenters, BUNDLED_MODEL])
        raise InputError(
            f"unknown model {name!r}",
            found=f"not one of torchvision's {len(classifiers)} classification and {len(segmenters)} segmentation models",
            fix=hint or "give a torchvision name (resnet50), timm/NAME, path/to/file.py:factory or digits_resnet",
        )
    weights = torchvision.models.get_model_weights(name).DEFAULT
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if name in ("inception_v3", "googlenet"):
        # Their own initialization takes minutes in scipy; torch's default suffices for untrained weights.
        options["init_weights"] = False
    if name in segmenters:
        # The backbone's weights would be downloaded; the auxiliary head is part of the published weights.
        options |= {"weights_backbone": None} | ({} if name.startswith("lraspp") else {"aux_loss": True})
    module = torchvision.models.get_model(name, weights=None, **options)
    if pretrained:
        _load_torchvision(module, weights)
    if name in segmenters:
        return Architecture("", module, SEGMENTATION, ())
    categories = tuple(weights.meta["categories"])
    labels = categories if classes in (None, len(categories)) else ()
    return Architecture("", module, preprocessing_from_transforms(weights.transforms()), labels)


def _detection(name: str) -> InputError:
    return InputError(
        f"torchvision's detection model {name!r} cannot be one graph for batches of images",
        found="it takes a list of images, resizes them itself, and returns as many boxes as it finds",
        fix="name a factory of your own that returns its backbone, whose masks fit the whole model: "
        f"torchvision.models.detection.{name}(weights=None, weights_backbone=None).backbone",
    )


def _load_torchvision(module: nn.Module, weights: Any) -> None:
    from urllib.error import URLError

    import torch

    from maskplan.pipeline.models.state_dict import fit_weights

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        state = torch.hub.load_state_dict_from_url(
            weights.url, progress=False, check_hash=True, weights_only=True, map_location="cpu"
        )
    except (URLError, OSError, RuntimeError) as error:
        raise HostError(
            f"the pretrained weights {weights} cannot be downloaded",
            where=weights.url,
            found=str(error),
            fix="check the network, or give --weights FILE",
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    fit_weights(module, state, where=weights.url)


def _timm(name: str, classes: int | None, pretrained: bool) -> Architecture:
    if pretrained and not _reachable("huggingface.co"):
        # Its client would retry for most of a minute; in offline mode it only reads its cache.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import timm
        from timm.data import resolve_model_data_config
    except ImportError as error:
        raise HostError("timm is not installed", where=f"timm/{name}", fix="pip install 'maskplan[timm]'") from error
    base = name.partition(".")[0]
    if not timm.is_model(base):
        hint = did_you_mean(base, timm.list_models())
        raise InputError(f"timm has no model {name!r}", fix=hint or "see timm.list_models() for its names")
    options = {} if classes is None else {"num_classes": classes}
    try:
        module = timm.create_model(name, pretrained=pretrained, **options)
    except (OSError, RuntimeError) as error:
        if "tag" in str(error):
            raise InputError(
                f"timm has no model {name!r}", found=error, fix=f"see timm.list_pretrained({base!r}) for its tags"
            ) from error
        raise HostError(
            f"timm cannot build {name}" + (" with pretrained weights" if pretrained else ""),
            found=str(error).partition("\n")[0],
            fix="check the network, or give --weights FILE or --weights random",
        ) from error
    data = resolve_model_data_config(module)
    channels, height, width = data["input_size"]
    interpolation = data["interpolation"] if data["interpolation"] in INTERPOLATIONS else "bilinear"
    crop, mode = data["crop_pct"], data.get("crop_mode") or "center"
    if mode == "center" and height == width:
        resize = int(height / crop)
    else:
        resize = 0
        if (mode, crop) != ("squash", 1.0):
            log.warning(
                "timm's crop for %s (%s, %g) is not supported: images are resized without a crop", name, mode, crop
            )
    mean, std = tuple(data["mean"]), tuple(data["std"])
    preprocessing = Preprocessing(channels, height, width, resize, interpolation, mean, std)
    return Architecture("", module, preprocessing, ())


def _reachable(host: str) -> bool:
    if urllib.request.getproxies():
        return True
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        return False
    return True


def _from_file(file: Path, factory: str) -> Architecture:
    """Run a user's own file. It may define PREPROCESSING (a dict with fields of `Preprocessing`) and LABELS."""
    from torch import nn

    if not file.is_file():
        raise InputError("model file not found", where=file, fix="check the path before the colon")
    source = create_module(file, _module_name(file))
    if source is None:
        raise InputError("not a Python file", where=file)
    try:
        with warnings.catch_warnings(), imports_from(file.parent):
            warnings.simplefilter("ignore")
            execute(source)
            build = getattr(source, factory, None)
            module = build() if callable(build) else None
    except (Exception, SystemExit) as error:
        raise InputError(
            "the model's file raises an exception",
            where=f"{file}:{factory}",
            found=f"{type(error).__name__}: {error}",
            fix=_factory_fix(source, factory),
        ) from error
    if not isinstance(module, nn.Module):
        functions = [name for name, value in vars(source).items() if callable(value) and not name.startswith("_")]
        raise InputError(
            f"{factory!r} does not return a torch module",
            where=file,
            found=f"{type(module).__name__}; the file defines {listed(functions) or 'no functions'}",
            fix="name a function without arguments that returns a torch.nn.Module",
        )
    return Architecture("", module, _own_preprocessing(source, file), _own_labels(source, file))


def _factory_fix(source: Any, factory: str) -> str:
    """What to do about a factory that raised an exception."""
    try:
        inspect.signature(getattr(source, factory)).bind()
    except TypeError as error:
        return f"give a function that needs no arguments ({error})"
    except (AttributeError, ValueError):
        pass
    return "run it in Python to see the traceback"


def _own_labels(source: Any, file: Path) -> tuple[str, ...]:
    labels = getattr(source, "LABELS", ())
    if not isinstance(labels, list | tuple) or not all(isinstance(label, str) for label in labels):
        raise InputError(
            "LABELS is not a list of names", where=file, found=repr(labels)[:200], fix="list the names of the classes"
        )
    return tuple(labels)


def _own_preprocessing(source: Any, file: Path) -> Preprocessing:
    given = getattr(source, "PREPROCESSING", {})
    try:
        own = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
        preprocessing = decode(Preprocessing, encode(IMAGENET) | own)
    except (AttributeError, ValueError) as error:
        raise InputError(
            "PREPROCESSING cannot be read",
            where=file,
            found=error if isinstance(given, dict) else repr(given)[:200],
            fix=f"give a dict; its keys are {', '.join(Preprocessing.__dataclass_fields__)}",
        ) from error
    if (
        preprocessing.channels not in (1, 3)
        or not len(preprocessing.mean) == len(preprocessing.std) == preprocessing.channels
        or min(preprocessing.height, preprocessing.width) < 1
        or preprocessing.resize < 0
        or not all(map(math.isfinite, (*preprocessing.mean, *preprocessing.std)))
        or min(preprocessing.std) <= 0
        or preprocessing.interpolation not in INTERPOLATIONS
    ):
        raise InputError(
            "PREPROCESSING is not valid",
            where=file,
            found=preprocessing,
            fix="give 1 or 3 channels, with a mean and a std above zero for each, height and width above zero, and an"
            f" interpolation out of {', '.join(INTERPOLATIONS)}",
        )
    return preprocessing
