"""Stands in for a script that a launcher starts, because each process of a script spends eight seconds on imports.

It writes the arguments and the environment that it got. ``launch`` in running.py forks a process with them, and the
stand-in exits with the status of that process.

    python launched.py FOLDER SCRIPT FLAGS...    writes FOLDER/RANK.json, and waits for FOLDER/RANK.status
"""

import json
import os
import sys
import time
from pathlib import Path

SECONDS = 300.0

if __name__ == "__main__":
    own = Path(sys.argv[1], os.environ.get("RANK", "0"))
    own.with_suffix(".tmp").write_text(json.dumps([sys.argv[2:], dict(os.environ)]))
    own.with_suffix(".tmp").rename(own.with_suffix(".json"))
    end = time.monotonic() + SECONDS
    while not own.with_suffix(".status").exists() and time.monotonic() < end:
        time.sleep(0.02)
    sys.exit(int(own.with_suffix(".status").read_text()))
