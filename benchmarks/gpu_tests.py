"""Runs `make test-gpu` with the Python that runs this program, and records how many tests passed in how many seconds.

    python benchmarks/gpu_tests.py --results benchmarks/results

The result is written only if all tests passed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

from random_models import ROOT
from record import device_and_versions, write_result

COUNTED = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")


def counts(output: str) -> dict[str, int]:
    """Returns how many tests passed, failed or were skipped, from the last lines of all runs of pytest."""
    found: dict[str, int] = {}
    for line in re.findall(r"^=*.* in [\d.]+s\b.*$", output, re.MULTILINE):
        for number, outcome in COUNTED.findall(line):
            found[outcome] = found.get(outcome, 0) + int(number)
    return found


def main() -> int:
    """Runs the tests, and returns the exit status of make."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    flags = parser.parse_args()
    # The environment of this Python is used, so make must not create one.
    command = ["make", "-o", ".venv/ready", f"BIN={Path(sys.executable).parent}", "test-gpu"]
    began, lines = time.monotonic(), list[str]()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
    row = {"tests": counts("".join(lines)), "seconds": round(time.monotonic() - began, 1), **device_and_versions()}
    print(json.dumps(row))
    if process.returncode == 0:
        write_result(flags.results / "gpu_tests.json", row)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
