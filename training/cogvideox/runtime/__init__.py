"""One run: processes, the output folder, checkpoints, metrics.

sheets.py      contact sheets: labels and frames in one PNG
curves.py      metrics.jsonl -> a picture of loss and learning rate
ranks.py       the processes of a run: barriers, and stopping before the same step
run.py         one run: ranks, output folder, metrics, trackers
checkpoint.py  checkpoints that are whole or not there
skipped.py     steps that changed no weight: told, counted, too many end the run
best.py        the checkpoint with the lowest held-out loss, kept
"""
