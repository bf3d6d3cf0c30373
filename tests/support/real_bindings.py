"""Run by itself: what the real TensorRT bindings of one folder have, as JSON. `python real_bindings.py FOLDER`.

Without TensorRT's libraries nothing can be built, but the bindings import over empty ones, and their docstrings tell every
signature.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any


def arguments(docstring: str, name: str) -> list[list[str]]:
    """The argument names of each overload, self left out."""
    found = []
    for match in re.finditer(rf"^(?:\d+\. )?{re.escape(name)}\((.*)\) -> ", docstring, re.MULTILINE):
        if match[1].startswith("*args"):
            continue
        names = re.findall(r"(?:^|, )(\w+)(?=:|,|$| =)", re.sub(r"\[[^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*\]", "", match[1]))
        found.append([n for n in names if n != "self"])
    return found


def described(cls: Any) -> dict[str, Any]:
    """Members of an enumeration; else methods with their arguments, and properties with whether they can be set."""
    if hasattr(cls, "__members__"):
        return {"members": {name: int(value) for name, value in cls.__members__.items()}}
    methods, properties, constants = {}, {}, []
    for base in reversed(cls.__mro__[:-1]):
        for name, value in vars(base).items():
            if isinstance(value, property):
                properties[name] = value.fset is not None
            elif callable(value) and not isinstance(value, type):
                methods[name] = arguments(value.__doc__ or "", name)
            else:
                constants.append(name)
    return {"methods": methods, "properties": properties, "constants": constants}


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    import tensorrt_bindings as trt

    classes = {name: described(value) for name, value in vars(trt).items() if isinstance(value, type)}
    print(json.dumps({"version": trt.__version__, "classes": classes}))


if __name__ == "__main__":
    main()
