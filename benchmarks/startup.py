"""Times `--help` of every script, as a user waits for it: python benchmarks/startup.py [--runs 7]

The scripts parse their flags before they import torch; this shows that it stays so.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

SCRIPTS = sorted((Path(__file__).resolve().parent.parent / "training").glob("*.py"))


def seconds(script: Path) -> float:
    """One run of --help, interpreter start included."""
    started = time.perf_counter()
    subprocess.run([sys.executable, str(script), "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    for script in SCRIPTS:
        times = [seconds(script) for _ in range(runs)]
        print(f"{script.name:36} median {statistics.median(times):.3f} s, worst {max(times):.3f} s of {runs}")


if __name__ == "__main__":
    main()
