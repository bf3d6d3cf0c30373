"""The version of each stage, part of its key: raise one when that stage's output changes for the same inputs.

Folders of older versions then run this stage again and keep the others, learned masks among them.
"""

STAGE_VERSIONS = {
    "load": 2,
    "images": 2,
    "synthesize": 1,
    "permute": 1,
    "mask": 2,
    "bake": 1,
    "recalibrate": 3,
    "prune": 1,
    "export": 3,
    "check": 1,
    "calibrate": 4,
    "baseline": 1,
    "compile": 1,
    "build": 2,
    "compare": 2,
    "time": 2,
    "keep": 1,
    "depth": 2,
    "statistics": 1,
    "report": 4,
}
"""By the stage's verb: the part of its name before the first hyphen."""
