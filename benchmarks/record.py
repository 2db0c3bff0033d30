"""What a result was measured with."""

import os
import subprocess
import sys
from typing import Any

from random_models import ROOT


def device_and_versions() -> dict[str, Any]:
    """Device, versions, commit and command, for a result's JSON."""
    from cogvideox.runtime.run import environment

    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    commit = os.environ.get("COMMIT") or git.stdout.strip()  # COMMIT where the tree travels without its history
    return environment() | {"commit": commit, "command": " ".join(sys.argv)}
