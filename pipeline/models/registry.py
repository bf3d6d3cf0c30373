"""A model's name to its module: torchvision, timm, a Python file of one's own, or the bundled digits_resnet."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import math
import os
import socket
import sys
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import HostError, InputError, did_you_mean, listed
from maskplan.pipeline.core.files import sha256_of
from maskplan.pipeline.core.serialization import decode, encode
from maskplan.pipeline.data.digits import BUNDLED_MODEL, CLASSES
from maskplan.pipeline.data.digits import PREPROCESSING as DIGITS_PREPROCESSING
from maskplan.pipeline.data.preprocessing import IMAGENET, INTERPOLATIONS, from_transforms

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

# Written by benchmarks/accuracy/train_digits_resnet.py.
BUNDLED_WEIGHTS = Path(__file__).with_name("digits_resnet.safetensors")


@dataclass(frozen=True)
class Architecture:
    """A built module, in evaluation mode, and what its inputs and outputs are."""

    name: str
    module: nn.Module
    preprocessing: Preprocessing
    labels: tuple[str, ...]


def model_identity(spec: str) -> tuple[str, str]:
    """A model's name without folders and a digest that changes when its code (of a file) does.

    Raises:
        InputError: The file of `file.py:factory` is missing.
    """
    file, factory = _split_file(spec)
    if file is None:
        return spec, hashlib.sha256(spec.encode()).hexdigest()
    return f"{file.stem}_{factory}", hashlib.sha256(f"{sha256_of(file)}:{factory}".encode()).hexdigest()


def folder_name(spec: str) -> str:
    """A name for the output folder: `timm/x` becomes `timm_x`, `a/b.py:net` becomes `b_net`."""
    file, factory = _split_file(spec)
    return f"{file.stem}_{factory}" if file is not None else spec.replace("/", "_").replace(":", "_")


def build_model(spec: str, *, seed: int, classes: int | None = None, pretrained: bool = False) -> Architecture:
    """Build a model with seeded random weights, or with its library's pretrained ones.

    Args:
        spec: `resnet50`, `timm/NAME`, `path/to/file.py:factory` or `digits_resnet`.
        seed: Of the random weights.
        classes: Number of outputs; the model's own by default.
        pretrained: Ask the model's library for weights; this may download.

    Raises:
        InputError: Unknown model, or one that fails to build.
        HostError: The library is not installed, or the weights cannot be had.
    """
    try:
        import torch
    except ImportError as error:
        raise HostError(
            "PyTorch is not installed, and everything up to export needs it",
            fix="pip install 'maskplan[learn]', or copy a finished folder from a host that has it",
        ) from error
    torch.manual_seed(seed)
    file, factory = _split_file(spec)
    if spec == BUNDLED_MODEL:
        architecture = _bundled(classes, pretrained)
    elif file is not None:
        if pretrained:
            raise HostError(f"{file.name} names no pretrained weights", fix="give --weights FILE, or --weights random")
        architecture = _from_file(file, factory)
    elif spec.startswith("timm/"):
        architecture = _timm(spec.removeprefix("timm/"), classes, pretrained)
    else:
        architecture = _torchvision(spec, classes, pretrained)
    architecture.module.eval()
    return replace(architecture, name=model_identity(spec)[0])


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

    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        hint = did_you_mean(name, [*names, BUNDLED_MODEL])
        raise InputError(
            f"unknown model {name!r}",
            found=f"it is none of torchvision's {len(names)} classification models",
            fix=hint or "give a torchvision name (resnet50), timm/NAME, path/to/file.py:factory or digits_resnet",
        )
    best = torchvision.models.get_model_weights(name).DEFAULT
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if name in ("inception_v3", "googlenet"):
        # Their own initialization draws from scipy for minutes; torch's default does for untrained weights.
        options["init_weights"] = False
    module = torchvision.models.get_model(name, weights=None, **options)
    if pretrained:
        _load_torchvision(module, best)
    own = classes in (None, len(best.meta["categories"]))
    return Architecture("", module, from_transforms(best.transforms()), tuple(best.meta["categories"]) if own else ())


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
            f"the pretrained weights {weights} cannot be had",
            where=weights.url,
            found=str(error),
            fix="check the network, or give --weights FILE",
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    fit_weights(module, state, where=weights.url)


def _timm(name: str, classes: int | None, pretrained: bool) -> Architecture:
    if pretrained and not _reachable("huggingface.co"):
        # Its client would retry for most of a minute; offline, it looks into its cache only.
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
            f"timm cannot make {name}" + (" with pretrained weights" if pretrained else ""),
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
            log.warning("timm crops for %s in a way (%s, %g) that is not ours: images are squashed", name, mode, crop)
    how = Preprocessing(channels, height, width, resize, interpolation, tuple(data["mean"]), tuple(data["std"]))
    return Architecture("", module, how, ())


def _reachable(host: str) -> bool:
    if urllib.request.getproxies():
        return True
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        return False
    return True


def _from_file(file: Path, factory: str) -> Architecture:
    """Run a user's own file. It may set PREPROCESSING (a table of `Preprocessing`'s fields) and LABELS."""
    from torch import nn

    if not file.is_file():
        raise InputError("model file not found", where=file, fix="check the path before the colon")
    imported = importlib.util.spec_from_file_location(f"maskplan_model_{file.stem}", file)
    if imported is None or imported.loader is None:
        raise InputError("not a Python file", where=file)
    source = importlib.util.module_from_spec(imported)
    # Data classes look for their own module while they are made.
    sys.modules[imported.name] = source
    try:
        with warnings.catch_warnings(), _beside(file):
            warnings.simplefilter("ignore")
            imported.loader.exec_module(source)
            build = getattr(source, factory, None)
            module = build() if callable(build) else None
    except (Exception, SystemExit) as error:
        raise InputError(
            "the model's file fails",
            where=f"{file}:{factory}",
            found=f"{type(error).__name__}: {error}",
            fix="run it in Python to see the traceback",
        ) from error
    if not isinstance(module, nn.Module):
        functions = [name for name, value in vars(source).items() if callable(value) and not name.startswith("_")]
        raise InputError(
            f"{factory!r} does not make a torch module",
            where=file,
            found=f"{type(module).__name__}; the file offers {listed(functions) or 'nothing'}",
            fix="name a function without arguments that returns a torch.nn.Module",
        )
    return Architecture("", module, _own_preprocessing(source, file), _own_labels(source, file))


@contextmanager
def _beside(file: Path) -> Iterator[None]:
    """A model's file may import its neighbors, as it can where Python runs it."""
    sys.path.insert(0, str(file.resolve().parent))
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(str(file.resolve().parent))


def _own_labels(source: Any, file: Path) -> tuple[str, ...]:
    labels = getattr(source, "LABELS", ())
    if not isinstance(labels, list | tuple) or not all(isinstance(label, str) for label in labels):
        raise InputError(
            "LABELS is no list of names", where=file, found=repr(labels)[:200], fix="list the classes' names"
        )
    return tuple(labels)


def _own_preprocessing(source: Any, file: Path) -> Preprocessing:
    given = getattr(source, "PREPROCESSING", {})
    try:
        own = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
        how = decode(Preprocessing, encode(IMAGENET) | own)
    except (AttributeError, ValueError) as error:
        raise InputError(
            "PREPROCESSING cannot be read",
            where=file,
            found=error if isinstance(given, dict) else repr(given)[:200],
            fix=f"give a table; its keys are {', '.join(Preprocessing.__dataclass_fields__)}",
        ) from error
    if (
        how.channels not in (1, 3)
        or not len(how.mean) == len(how.std) == how.channels
        or min(how.height, how.width) < 1
        or how.resize < 0
        or not all(map(math.isfinite, (*how.mean, *how.std)))
        or min(how.std) <= 0
        or how.interpolation not in INTERPOLATIONS
    ):
        raise InputError(
            "PREPROCESSING does not fit together",
            where=file,
            found=how,
            fix="give 1 or 3 channels, with a mean and a std above zero for each, height and width above zero, and an"
            f" interpolation out of {', '.join(INTERPOLATIONS)}",
        )
    return how
