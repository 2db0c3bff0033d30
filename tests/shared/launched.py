"""What a launcher starts in the place of a script: it tells which arguments and environment it got, and ends as the
process does that `launch` in running.py forks with them. A script that a launcher starts spends eight seconds on
imports, in each of its processes.

    python launched.py FOLDER SCRIPT FLAGS...    writes FOLDER/RANK.json, and waits for FOLDER/RANK.status
"""

import json
import os
import sys
import time
from pathlib import Path

SECONDS = 300.0

if __name__ == "__main__":
    own = Path(sys.argv[1], os.environ["RANK"])
    own.with_suffix(".tmp").write_text(json.dumps([sys.argv[2:], dict(os.environ)]))
    own.with_suffix(".tmp").rename(own.with_suffix(".json"))
    end = time.monotonic() + SECONDS
    while not own.with_suffix(".status").exists() and time.monotonic() < end:
        time.sleep(0.02)
    sys.exit(int(own.with_suffix(".status").read_text()))
