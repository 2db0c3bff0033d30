"""Stands in for SLURM's srun: starts the tasks of a step on this machine, and returns their highest status.

It writes the number of each task's process group to $STEP/TASK, so that a test can signal all processes of a step, as
SLURM does. As since SLURM 22.05, the cores of a task follow from SRUN_CPUS_PER_TASK, and not from what the job has.

    SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=1 STEP=FOLDER python srun.py --FLAG ... COMMAND ...
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    command = list(itertools.dropwhile(lambda word: word.startswith("--"), sys.argv[1:]))
    number, here = os.environ["SLURM_NTASKS"], int(os.environ["SLURM_NTASKS_PER_NODE"])
    tasks = []
    for task in range(int(number)):
        own = {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task % here), "SLURM_STEP_NUM_TASKS": number}
        own["SLURM_CPUS_PER_TASK"] = os.environ.get("SRUN_CPUS_PER_TASK", "1")
        tasks.append(subprocess.Popen(command, env=os.environ | own, start_new_session=True))
        Path(os.environ["STEP"], str(task)).write_text(str(tasks[-1].pid))
    statuses = [task.wait() for task in tasks]
    sys.exit(max(128 - status if status < 0 else status for status in statuses))
