"""Triton's ModelConfig to read configs with: fields listed here, and the real ones if tritonclient is installed.

tritonclient is found where it is installed, or in the folder that TRITONCLIENT names (pip install --target). Its
dependencies may be older than what the tests run on, so it is only ever loaded in a process of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory, text_format

FOLDER = "TRITONCLIENT"
MISSING = f"no tritonclient: pip install --target DIR 'tritonclient[grpc,http]', and set {FOLDER}=DIR"

# Reads a config a line, as JSON; answers with what Triton's own message makes of it.
WORKER = """
import json, sys
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

for line in sys.stdin:
    try:
        read = text_format.Parse(json.loads(line), ModelConfig())
        answer = json_format.MessageToDict(read, preserving_proto_field_name=True)
    except text_format.ParseError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
"""

# Field: (type, repeated). A config with any other field does not parse. A name with a dot is that of a map's entries.
FIELDS: dict[str, dict[str, tuple[str, bool]]] = {
    "ModelTensorReshape": {"shape": ("int64", True)},
    "ModelInput": {
        "name": ("string", False),
        "data_type": ("DataType", False),
        "dims": ("int64", True),
        "reshape": ("ModelTensorReshape", False),
    },
    "ModelOutput": {
        "name": ("string", False),
        "data_type": ("DataType", False),
        "dims": ("int64", True),
        "reshape": ("ModelTensorReshape", False),
        "label_filename": ("string", False),
    },
    "ModelDynamicBatching": {
        "preferred_batch_size": ("int32", True),
        "max_queue_delay_microseconds": ("uint64", False),
    },
    "Specific": {"versions": ("int64", True)},
    "ModelVersionPolicy": {"specific": ("Specific", False)},
    "ModelInstanceGroup": {"count": ("int32", False), "kind": ("Kind", False), "profile": ("string", True)},
    "Cuda": {"graphs": ("bool", False)},
    "ModelOptimizationPolicy": {"cuda": ("Cuda", False)},
    "ModelConfig.CcModelFilenamesEntry": {"key": ("string", False), "value": ("string", False)},
    "WarmupInput": {"data_type": ("DataType", False), "dims": ("int64", True), "zero_data": ("bool", False)},
    "ModelWarmup.InputsEntry": {"key": ("string", False), "value": ("WarmupInput", False)},
    "ModelWarmup": {
        "name": ("string", False),
        "batch_size": ("uint32", False),
        "inputs": ("ModelWarmup.InputsEntry", True),
    },
    "ModelConfig": {
        "name": ("string", False),
        "platform": ("string", False),
        "max_batch_size": ("int32", False),
        "version_policy": ("ModelVersionPolicy", False),
        "input": ("ModelInput", True),
        "output": ("ModelOutput", True),
        "dynamic_batching": ("ModelDynamicBatching", False),
        "instance_group": ("ModelInstanceGroup", True),
        "optimization": ("ModelOptimizationPolicy", False),
        "cc_model_filenames": ("ModelConfig.CcModelFilenamesEntry", True),
        "model_warmup": ("ModelWarmup", True),
    },
}
ENUMS = {
    "DataType": [
        "TYPE_INVALID TYPE_BOOL TYPE_UINT8 TYPE_UINT16 TYPE_UINT32 TYPE_UINT64 TYPE_INT8 TYPE_INT16 TYPE_INT32",
        "TYPE_INT64 TYPE_FP16 TYPE_FP32 TYPE_FP64 TYPE_STRING TYPE_BF16",
    ],
    "Kind": ["KIND_AUTO KIND_GPU KIND_CPU KIND_MODEL"],
}


@cache
def _written_down() -> Any:
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="written_down.proto", package="inference", syntax="proto3")
    for name, lines in ENUMS.items():
        values = file.enum_type.add(name=name)
        for number, value in enumerate(" ".join(lines).split()):
            values.value.add(name=value, number=number)
    messages = {name: file.message_type.add(name=name) for name in FIELDS if "." not in name}
    for name, fields in FIELDS.items():
        owner, _, entry = name.partition(".")
        made = messages[owner].nested_type.add(name=entry) if entry else messages[name]
        made.options.map_entry = bool(entry)
        for number, (key, (kind, repeated)) in enumerate(fields.items(), start=1):
            added = made.field.add(name=key, number=number)
            added.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            if kind in FIELDS or kind in ENUMS:
                added.type = field.TYPE_MESSAGE if kind in FIELDS else field.TYPE_ENUM
                added.type_name = f".inference.{kind}"
            else:
                added.type = getattr(field, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


def environment() -> dict[str, str] | None:
    """Of a process that can import tritonclient; None where there is none."""
    folder = os.environ.get(FOLDER)
    if folder:
        return {**os.environ, "PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])}
    here = all(importlib.util.find_spec(package) for package in ("tritonclient", "grpc"))
    return dict(os.environ) if here else None


@cache
def _worker() -> subprocess.Popen[str] | None:
    env = environment()
    if env is None:
        return None
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )

    def end() -> None:
        with contextlib.suppress(OSError):
            process.communicate()

    atexit.register(end)
    return process


def read_by_triton(text: str) -> dict[str, Any]:
    """A config as Triton's own message reads it, as JSON values."""
    process = _worker()
    assert process is not None
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(text) + "\n")
    process.stdin.flush()
    answer: dict[str, Any] = json.loads(process.stdout.readline())
    assert "error" not in answer, answer["error"]
    return answer


def parsed(text: str) -> Any:
    """A config, read by the fields above; if Triton's own message type is available, it must parse to the same."""
    config = text_format.Parse(text, _written_down()())
    if _worker() is not None:
        assert read_by_triton(text) == json_format.MessageToDict(config, preserving_proto_field_name=True)
    return config


def kind_of(tensor: Any) -> str:
    """The name of a tensor's type."""
    return str(tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name)
