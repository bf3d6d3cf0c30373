"""Wall time and peak memory of whole commands, each in a separate process.

    python benchmarks/performance/line.py

writes line.json next to this script.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from maskplan.pipeline.core.files import write_json
from maskplan.pipeline.report.write import versions
from maskplan.pipeline.timing.compare_latency import cpu_name


def measure(*arguments: str, repeats: int = 1) -> dict[str, object]:
    """Run `maskplan` with these arguments; the fastest of `repeats`."""
    seconds, peak = [], 0
    for _ in range(repeats):
        started = time.perf_counter()
        command = [sys.executable, "-m", "maskplan.pipeline", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        narration = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        process.returncode = code
        if code != 0:
            raise SystemExit(f"maskplan {' '.join(arguments)} ended with {code}:\n{narration}")
        seconds.append(time.perf_counter() - started)
        peak = max(peak, usage.ru_maxrss * 1024)
    ran = [line for line in narration.splitlines() if line.endswith("…")]
    return {"seconds": round(min(seconds), 2), "peak_bytes": peak, "stages_run": len(ran)}


def main() -> None:
    """Measure the default line, ResNet-50 with random weights, both once more, and the help."""
    with tempfile.TemporaryDirectory() as folder:
        digits, resnet = f"{folder}/digits", f"{folder}/resnet50"
        rows = {
            "maskplan --help": measure("--help", repeats=5),
            "maskplan engine": measure("engine", "--out", digits),
            "maskplan engine, again": measure("engine", "--out", digits),
            "maskplan engine resnet50 --weights random": measure(
                "engine", "resnet50", "--weights", "random", "--out", resnet
            ),
            "maskplan engine resnet50 --weights random, again": measure(
                "engine", "resnet50", "--weights", "random", "--out", resnet
            ),
        }
    result = {
        "command": "python benchmarks/performance/line.py",
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "rows": rows,
    }
    write_json(Path(__file__).with_suffix(".json"), result)
    for name, row in rows.items():
        print(f"{name:<50} {row}")


if __name__ == "__main__":
    main()
