"""Runs a script in a control group.

python in_group.py GROUP SCRIPT [FLAG ...]    GROUP is the folder of the group
"""

import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
    sys.argv = sys.argv[2:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
