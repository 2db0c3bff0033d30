"""Implements the scripts in training/. The __init__.py of each folder lists its modules.

The modules and folders are listed from the lowest layer to the highest. A module imports only from its own folder and
from lower layers, which a test enforces. These modules of the lowest layer are next to the folders:

errors.py       defines UsageError, for what a user can fix, and NonFiniteError, for NaN or infinity in training
caches.py       keeps compiled kernels and bytecode in a private folder of the user
console.py      discards messages that cannot be written, so that work continues
files.py        writes files atomically, and turns errors of disks into one line
locks.py        lets one process at a time write to a folder, on any file system
host_memory.py  measures the free memory of the host or of the container
progress.py     shows progress as a bar on a terminal, and as a line now and then in a log
stopping.py     ends a script early without losing work, after signals, the end of the launcher, or a hang
tensor_files.py writes safetensors files tensor by tensor
finite.py       finds tensors that contain NaN or infinity
rng.py          computes every random number as a function of (seed, visit, sample, purpose)

These are the folders:

config/                  parses the command line, and reads the config files of a model
data/media/              opens, checks, decodes and converts videos and images, which no other folder does
data/media/colors/       converts colors and transparency of decoded frames
data/media/container/    reads the packets of video files
data/media/pixels/       decodes chosen frames, and writes mp4 files
data/forms/              reads folders, lists and tables of clips into samples
data/                    selects frames of clips, caches tensors, and puts samples into batches
memory/                  streams host memory through the device while it computes
model/                   has the network, its transformer blocks as functions, the trained weights, and the loss
optimizer/               has master weights, the optimizer step, averages of weights, and the engines that run it
runtime/                 manages a run: its processes, output folder, checkpoints and metrics
preparation/             encodes a data set into cached tensors, and reports on it
preparation/captioning/  writes the missing captions of a data set
preparation/scenes/      finds the scenes of long videos
planning/                chooses how transformer blocks are executed, executes them, and checks the result
evaluation/              measures the model and makes validation videos during training
export/                  writes the result of a run: weights, model card and pipeline folder

These modules of the highest layer are next to the folders:

checks.py  lists the checks that a script makes before it imports anything heavy
loop.py    has fine_tune, which every training script calls, and Trainer, the training loop
"""

__version__ = "0.1.0"
