"""The library behind the scripts in training/. A folder's __init__.py says what each of its modules does.

From bottom to top; imports go downward only, which a test enforces. At the bottom, next to the folders:

errors.py       UsageError: what a user can fix; NonFiniteError: training produced NaN or infinity
files.py        files that are whole or not there; what a disk refuses
locks.py        one process at a time in a folder, on any file system
host_memory.py  memory of the host, or of the container, that is free
stopping.py     ending early without losing work: signals, the launcher's death, hangs
finite.py       which tensors hold NaN or infinity
rng.py          every random draw as a function of (seed, visit, sample, purpose)

The folders:

config/       the command line and what the files of a model say: flags, their conflicts, sizes and names
data/         from files to batches: clips that are planned, cached, sampled and put into batches
data/media/   media files: videos and images are opened, checked, decoded and converted here, and nowhere else
data/forms/   the forms of data sets: folders, lists and tables are read into samples
memory/       host memory that passes through the device while it computes
model/        the network: its parts, its blocks as functions, what is trained of it, and the loss
optimizer/    master weights, the optimizer step, averages, and who runs backward and step
runtime/      one run: processes, the output folder, checkpoints, metrics
preparation/  from a data set to cached tensors, and the reports about it
planning/     how blocks are executed: the plan, the stack that runs it, and the checks of it
evaluation/   measuring and showing the model while it trains
export/       what a run hands over: weights, model card, pipeline folder

At the top, next to the folders:

checks.py  what a script looks at before anything heavy is imported
loop.py    fine_tune: what every script does; Trainer: the one loop
"""

__version__ = "0.1.0"
