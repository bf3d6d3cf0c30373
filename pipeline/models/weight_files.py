"""Reads files with weights: safetensors, PyTorch files, sharded checkpoints. Code in a file is never executed."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.files import sha256_of

INDEX_SUFFIX = ".index.json"
_MAX_HEADER_BYTES = 100 * 2**20


def read_content(path: Path) -> Mapping[str, Any]:
    """The content of a weights file: tensors by name, possibly nested in a training checkpoint.

    The kind of a file is determined by its first bytes, not by its name. Only tensors, containers, numbers, text and a few
    harmless types (see `_harmless_types`) are unpickled.

    Args:
        path: A safetensors file, a file of `torch.save`, or the index (`*.index.json`) of a sharded checkpoint.

    Raises:
        InputError: The file is missing, damaged, of another kind, or a pickle that would run code.
    """
    if path.is_dir():
        raise InputError(
            "the weights are a folder",
            where=path,
            found=listed(sorted(p.name for p in path.iterdir())) or "nothing in it",
            fix="give one file: a state dict, or the index of a sharded checkpoint (*.index.json)",
        )
    if not path.is_file():
        raise InputError("checkpoint not found", where=path, fix="check the path given to --weights")
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(path)
    if _is_safetensors(path):
        return _read_safetensors(path)
    _require_known_kind(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def weights_digest(path: Path) -> str:
    """Digest of a weights file; for an index, of the index and all its shards.

    Raises:
        InputError: The file or a shard cannot be read.
    """
    if not path.name.endswith(INDEX_SUFFIX):
        return sha256_of(path)
    return ":".join(sha256_of(file) for file in (path, *_shards(path)))


def unreadable(path: Path, error: object, fix: str = "it may be truncated: copy or download it again") -> InputError:
    """The error for a file that is damaged."""
    found = str(error) or type(error).__name__
    return InputError("the checkpoint cannot be read", where=path, found=found, fix=fix)


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise unreadable(path, error) from error


def _is_safetensors(path: Path) -> bool:
    """Whether the file starts like safetensors: the header's length, then a JSON object."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= _MAX_HEADER_BYTES


def _shards(index: Path) -> list[Path]:
    """The files of a sharded checkpoint, each once, sorted."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(content["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise InputError(
            "not the index of a sharded checkpoint",
            where=index,
            found=f"{type(error).__name__}: {error}",
            fix="an index is a JSON object whose 'weight_map' maps each tensor's name to its file",
        ) from error
    # Names are judged as text, for POSIX and Windows: an index must not reach files outside its folder.
    outside = [
        name
        for name in names
        if not isinstance(name, str)
        or not name
        or any(
            kind(name).is_absolute() or kind(name).drive or ".." in kind(name).parts
            for kind in (PurePosixPath, PureWindowsPath)
        )
    ]
    if outside:
        raise InputError(
            "the index names files outside its folder", where=index, found=listed(map(repr, outside)), fix="correct it"
        )
    files = [index.parent / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(
            "files of the sharded checkpoint are missing",
            where=index,
            found=listed(missing),
            fix="copy or download all its files into one folder",
        )
    return files


def _read_shards(index: Path) -> Mapping[str, Any]:
    files = _shards(index)
    wanted = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    tensors: dict[str, Any] = {}
    for file in files:
        if file.name.endswith(INDEX_SUFFIX):
            raise InputError("the index names another index", where=index, found=file.name, fix="correct it")
        tensors |= {name: tensor for name, tensor in read_content(file).items() if name in wanted}
    absent = [name for name in wanted if name not in tensors]
    if absent:
        raise InputError(
            "tensors of the index are not in its files",
            where=index,
            found=f"{len(absent)}: {listed(absent)}",
            fix="copy or download all files of the checkpoint again",
        )
    return tensors


def _require_known_kind(path: Path) -> None:
    """Raise the true reason for files that are known to be something other than weights."""
    with path.open("rb") as file:
        start = file.read(512)
    kind, fix = "", "give a state dict: a safetensors file, or one written by torch.save(model.state_dict(), F)"
    names = _names_in_zip(path)
    if names is not None:
        parts = {part for name in names for part in PurePosixPath(name).parts}
        if "code" in parts and "constants.pkl" in parts:
            kind = "a TorchScript archive, which contains code"
            fix = "save its weights: torch.save(torch.jit.load(F).state_dict(), G)"
        elif "archive_format" in parts or "serialized_exported_program.json" in parts:
            kind = "an exported program (torch.export), which contains a graph"
            fix = "save its weights: torch.save(torch.export.load(F).state_dict, G)"
        elif names and all(name.endswith(".npy") for name in names):
            kind = "a NumPy archive (.npz)"
            fix = "save its arrays as tensors: safetensors.numpy.save_file(dict(numpy.load(F)), G)"
        elif names and "data.pkl" not in parts:
            kind = f"a zip archive without tensors ({listed(names, 3)})"
    elif start.startswith(b"\x93NUMPY"):
        kind = "a NumPy array (.npy)"
    elif start.startswith(b"\x89HDF"):
        kind = "an HDF5 file, as Keras writes"
    elif start.startswith(b"GGUF"):
        kind = "a GGUF file of quantized weights"
    elif start.startswith(b"\x1f\x8b"):
        kind, fix = "a gzip file", "unpack it first"
    elif start.startswith(b"version https://git-lfs"):
        kind, fix = "a pointer of Git LFS, not the file itself", "download it: git lfs pull"
    elif path.suffix == ".onnx":
        kind, fix = "an ONNX file", "give it as MODEL to the commands that take ONNX files, such as maskplan prune"
    elif start.lstrip().startswith(b"{") and path.suffix == ".json":
        kind = f"a JSON file whose name does not end in {INDEX_SUFFIX}"
    if kind:
        raise unreadable(path, kind, fix)


def _names_in_zip(path: Path) -> list[str] | None:
    """The members of a zip archive; None for another file or a damaged archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None


def _read_torch(path: Path) -> Mapping[str, Any]:
    import pickle  # noqa: TID251 - only for its exception; torch reads with weights_only

    import torch

    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_harmless_types()):
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        if "Unsupported global" in text or "GLOBAL" in text or "unrecognized function" in text:
            raise InputError(
                "the checkpoint would run code while it loads; refused",
                where=path,
                found=_refused_global(text),
                fix="save only tensors: torch.save(model.state_dict(), F), or use safetensors",
            ) from error
        raise unreadable(path, _own_reason(text)) from error
    except Exception as error:  # torch's reader trusts the bytes, and corrupt ones raise many kinds of exceptions
        raise unreadable(path, _own_reason(str(error)) or type(error).__name__) from error
    if not isinstance(content, Mapping):
        raise InputError(
            "no state dict in the checkpoint",
            where=path,
            found=type(content).__name__,
            fix="save model.state_dict()",
        )
    return content


def _own_reason(text: str) -> str:
    """What torch found, without its advice to load the file with `weights_only=False`."""
    inner = text.rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
    if "weights_only" in inner or "Weights only load failed" in inner:
        return "a pickle that is not a PyTorch checkpoint"
    return inner


def _refused_global(text: str) -> str:
    """The function or class that torch's error message names."""
    for marker in (
        "Unsupported global: GLOBAL ",
        "Trying to load unsupported GLOBAL ",
        "Trying to call reduce for unrecognized function ",
        "GLOBAL ",
    ):
        if marker in text:
            return text.partition(marker)[2].split(maxsplit=1)[0]
    return "a pickle opcode that tensors do not need"


def _harmless_types() -> list[Any]:
    """Types in checkpoints that only hold values, as (type or function, name in the pickle) for torch's safe reader.

    Containers that the reader cannot fill (it knows `dict` and `OrderedDict`) are read as `OrderedDict`.
    """
    import argparse
    import datetime
    import types

    import numpy as np
    import torch

    by_name: dict[str, Any] = {
        "argparse.Namespace": argparse.Namespace,
        "types.SimpleNamespace": types.SimpleNamespace,
        "collections.defaultdict": _ordered_dict,
        "collections.deque": _list_of,
        "builtins.frozenset": frozenset,
        "torch.torch_version.TorchVersion": torch.torch_version.TorchVersion,
        "numpy.dtype": np.dtype,
        "numpy.ndarray": np.ndarray,
    }
    # Plain types are default factories of defaultdicts.
    by_name |= {f"builtins.{kind.__name__}": kind for kind in (int, float, bool, str, list, tuple, dict)}
    for date in (datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone):
        by_name[f"datetime.{date.__name__}"] = date
    for module in ("pathlib", "pathlib._local"):
        # Paths of either system become text-only paths of that system.
        by_name |= {f"{module}.{n}": PurePosixPath for n in ("Path", "PosixPath", "PurePath", "PurePosixPath")}
        by_name |= {f"{module}.{n}": PureWindowsPath for n in ("WindowsPath", "PureWindowsPath")}
    for module in ("numpy.core", "numpy._core"):
        by_name[f"{module}.multiarray.scalar"] = _numpy_scalar
        by_name[f"{module}.multiarray._reconstruct"] = _numpy_array
        by_name[f"{module}.numeric._frombuffer"] = _numpy_frombuffer
    for module in ("pytorch_lightning.utilities.parsing", "lightning_fabric.utilities.data"):
        by_name[f"{module}.AttributeDict"] = OrderedDict
    by_name["lightning.fabric.utilities.data.AttributeDict"] = OrderedDict
    by_name["lightning.pytorch.utilities.parsing.AttributeDict"] = OrderedDict
    for kind in vars(np.dtypes).values():
        # Instances of dtypes are of these classes; the reader checks them before it sets their state.
        if isinstance(kind, type):
            by_name[f"numpy.dtypes.{kind.__name__}"] = kind
    for name in ("bool", "bool_", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"):
        by_name[f"numpy.{name}"] = getattr(np, name)
    for name in ("float16", "float32", "float64", "complex64", "complex128", "str_"):
        by_name[f"numpy.{name}"] = getattr(np, name)
    return [(kind, name) for name, kind in by_name.items()]


def _ordered_dict(*_: object) -> OrderedDict[Any, Any]:
    return OrderedDict()


def _list_of(*arguments: Any) -> list[Any]:
    return list(arguments[0]) if arguments else []


def _numpy_scalar(dtype: Any, data: Any = None) -> Any:
    """As `numpy.core.multiarray.scalar`, for numbers only."""
    import numpy as np

    dtype = np.dtype(dtype)
    if dtype.hasobject:
        raise ValueError("a NumPy scalar that holds an object")
    # Old pickles keep the bytes as text.
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype, 1)[0]


def _numpy_array(*_: object) -> Any:
    """As `numpy.core.multiarray._reconstruct`: an empty array, to be filled."""
    import numpy as np

    return np.ndarray.__new__(np.ndarray, (0,), "b")


def _numpy_frombuffer(data: Any, dtype: Any, shape: Any, order: Any = "C", *_: object) -> Any:
    """As `numpy.core.numeric._frombuffer`, for numbers only."""
    import numpy as np

    dtype = np.dtype(dtype)
    if dtype.hasobject:
        raise ValueError("a NumPy array that holds objects")
    return np.frombuffer(data, dtype).reshape(shape, order=order)
