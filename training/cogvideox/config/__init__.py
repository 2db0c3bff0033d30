"""Parses the command line, and reads what the files of a model say about it.

flags.py           defines every flag once, in frozen dataclasses
options.py         lists the groups of flags of each script, and derives values from others
cards.py           lists cards with their memory and rates, for --dry_run
presets.py         sets flags of the LoRA scripts for a style, a subject or a motion
foreign_flags.py   accepts flags of other scripts and trainers, by one rule
launch.py          checks what launchers and users have put into the environment
conflicts.py       finds flags that contradict each other
deepspeed.py       compares the configuration of DeepSpeed with the flags
prepared_flags.py  reads the flags with which a folder was prepared, for --load_tensors
args.py            parses the command line, reports all problems and sets the exit status
buckets.py         decides which frame counts and sizes are valid, and the bucket of a clip
hub.py             creates the repository on the hub at the start, and uploads the result
lora_file.py       reads the header of a LoRA file and compares it with the flags
geometry.py        reads the numbers in the config files of a model, and checks sizes
prompts.py         reads validation prompts from the command line or from a file
optimizers.py      creates the optimizer, and checks what each one needs and does not support
"""
