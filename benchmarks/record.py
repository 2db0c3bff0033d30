"""Records the environment of a measurement."""

import os
import subprocess
import sys
from typing import Any

from random_models import ROOT


def device_and_versions() -> dict[str, Any]:
    """Returns device, versions, commit and command, for the JSON of a result."""
    from cogvideox.runtime.run import environment

    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    # COMMIT is set where the files were copied without the git history.
    commit = os.environ.get("COMMIT") or git.stdout.strip()
    return environment() | {"commit": commit, "command": " ".join(sys.argv)}
