"""The part of a repository's config.pbtxt that clients depend on, and the versions it serves, whatever tool wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.files import read_bytes
from maskplan.pipeline.triton.pbtxt import Message, parse, quoted

CONFIG = "config.pbtxt"


@dataclass(frozen=True)
class ServedConfig:
    """Contents of a config in a repository.

    Attributes:
        platform: `tensorrt_plan` or `onnxruntime_onnx`; empty if the config leaves it to Triton.
        tensors: Type and shape of each input and output as clients see them, such as `TYPE_FP32 [-1, 3, 8, 8]`.
        versions: Versions that the config names; empty if it leaves the choice to Triton.
        labels: Label files that it names.
    """

    platform: str
    tensors: dict[str, str]
    versions: tuple[int, ...]
    labels: tuple[str, ...]


def read_config(path: Path) -> ServedConfig:
    """Read a config, whatever tool wrote it.

    Raises:
        InputError: The file cannot be read or parsed.
    """
    return parse_config(read_bytes(path).decode(errors="replace"), path)


def parse_config(text: str, where: Path) -> ServedConfig:
    """Parse a config's text; `where` is for the error message.

    Raises:
        InputError: The text cannot be parsed.
    """
    try:
        config = parse(text)
        batched = int(config.text("max_batch_size", "0")) > 0
        chosen = [s for p in config.messages("version_policy") for s in p.messages("specific")]
        versions = [int(v) for s in chosen for v in s.texts("versions")]
    except ValueError as error:
        raise InputError(
            "the repository's config cannot be read",
            where=where,
            found=error,
            fix="correct it, or choose another --name",
        ) from error

    def type_and_shape(tensor: Message) -> str:
        return f"{tensor.text('data_type')} [{', '.join(['-1'] * batched + tensor.texts('dims'))}]"

    tensors = {
        f"{kind} {quoted(tensor.text('name'))}": type_and_shape(tensor)
        for kind in ("input", "output")
        for tensor in config.messages(kind)
    }
    labels = [t.text("label_filename") for t in config.messages("output") if t.text("label_filename")]
    return ServedConfig(config.text("platform"), tensors, tuple(versions), tuple(dict.fromkeys(labels)))
