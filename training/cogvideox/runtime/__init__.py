"""Manages one training run: its processes, output folder, checkpoints and metrics.

run.py               starts a run: processes, device, output folder and its lock; writes metrics.jsonl
startup.py           measures the phases of a run until its first step
ranks.py             connects the processes of a run: barriers, and agreement on the last optimizer step
checkpoint_files.py  lists, verifies and renames the folders of checkpoints
resume.py            finds the checkpoint from which a run continues, and compares its settings and data with the run's
checkpoint.py        writes checkpoints, and removes old ones
background.py        copies a checkpoint to host memory, and writes it in a thread while training goes on
disk_room.py         predicts the disk space of a run and the time to write a checkpoint
best.py              keeps the checkpoint with the lowest held-out loss
bad_clips.py         counts clips that cannot be read in training, and ends the run if there are too many
skipped.py           reports and counts optimizer steps that changed no weight, and ends the run if there are too many
metrics.py           reads metrics.jsonl
curves.py            draws loss and learning rate from metrics.jsonl
trackers.py          starts trackers, and sends them videos and pictures
report.py            writes report.html: videos, curves, costs and clips of a run on one page
sheets.py            draws contact sheets: labels and frames in one PNG
"""
