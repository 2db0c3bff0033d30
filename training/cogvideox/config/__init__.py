"""The command line and what the files of a model say: flags, their conflicts, sizes and names.

flags.py           every flag once, as frozen dataclasses
options.py         what each script takes, what follows from it
conflicts.py       what flags contradict
prepared_flags.py  the flags that a prepared folder was made with, for --load_tensors
args.py            the command line: parsed, printed, suggested
buckets.py         frames x height x width; which ones a clip goes to
hub.py             the repository on the hub: made at the start, filled at the end
lora_file.py       a LoRA's file, read before anything heavy is imported
geometry.py        the numbers in a model's config files
prompts.py         validation prompts, of the command line or a file
optimizers.py      which optimizer, and what each needs and refuses
"""
