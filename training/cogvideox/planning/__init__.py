"""Executes the transformer's blocks: chooses a plan, runs it and checks it.

plan.py         describes plans, and the sizes and the machine that one is chosen for
costs.py        predicts the memory of plans, from a table of the bytes of a block
timeline.py     predicts the seconds of a step, by a simulated timeline of arithmetic and copies
choice.py       chooses a plan among all that the flags allow
execution.py    makes the plan of a run: reads sizes, measures the machine, sets up the transformer
probes.py       measures the rates of a device
dry_run.py      predicts memory, time and disk space of a run, for --dry_run
stack.py        runs all blocks of a transformer under a plan
sharded.py      runs all blocks of a transformer whose weights are sharded over the processes of a run
layerwise.py    runs a transformer that stays on the CPU on the device, one layer at a time
block_check.py  compares blocks under the plan with diffusers' own before the first step
doctor.py       checks the machine and the files of a model for doctor.py
trial_training.py  trains for two steps with the training script, for doctor.py
warm_up.py      runs the largest bucket before the first step if no plan bounds the memory
"""
