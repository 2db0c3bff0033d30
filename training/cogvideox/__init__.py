"""The library behind the scripts in training/. Imports go downward only; a test enforces it.

errors.py           UsageError: what a user can mend
files.py            files that are whole or not there
args.py             every flag once, as frozen dataclasses; parse()
draws.py            every random draw as a function of (seed, visit, sample, purpose)
data/buckets.py     frames x height x width; which one a clip goes to
data/decode.py      probe, frame selection by time, exact frames, mp4 writing
data/transforms.py  resize, crop, flip of a whole clip
geometry.py         the numbers in a model's config files
data/cache.py       encoded clips and captions: content-addressed, checked, atomic
data/index.py       prompts.txt and videos.txt -> samples
data/clips.py       a file and a recipe -> a plan -> frames
data/sampler.py     which samples make up each optimizer step
diffusion.py        noise schedule and loss
rope.py             rotary tables
data/dataset.py     cached tensors -> batches
encode.py           clips and captions -> tensors
models.py           parts of a pipeline: found, identified, loaded
prepare.py          a folder of clips -> the cache
tasks.py            what the transformer gets: text to video
methods.py          what is trained: LoRA
optim.py            fp32 masters, optimizers, learning rate
engine.py           who runs backward and step: this process, or DeepSpeed
ranks.py            the processes of a run, and patient barriers
plan.py             how the blocks are executed
run.py              one run: ranks, output folder, metrics, trackers, signals
tensors.py          a prepared folder, or one prepared now
checkpoint.py       checkpoints that are whole or not there
validation.py       videos while training
publish.py          the result, reloaded and compared
loop.py             Trainer: the one loop
"""
