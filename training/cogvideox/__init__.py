"""The library behind the scripts in training/. Imports go downward only; a test enforces it.

errors.py             UsageError: what a user can fix; NonFiniteError: training produced NaN or infinity
files.py              files that are whole or not there; what a disk refuses
locks.py              one process at a time in a folder, on any file system
host_memory.py        memory of the host, or of the container, that is free
stopping.py           ending early without losing work: signals, the launcher's death, hangs
flags.py              every flag once, as frozen dataclasses
options.py            what each script takes, what follows from it
conflicts.py          what flags contradict
prepared.py           the flags that a prepared folder was made with, for --load_tensors
args.py               the command line: parsed, printed, suggested
finite.py             which tensors hold NaN or infinity
draws.py              every random draw as a function of (seed, visit, sample, purpose)
sheets.py             contact sheets: labels and frames in one PNG
curves.py             metrics.jsonl -> a picture of loss and learning rate
data/workers.py       processes for media files: limits, kills, results in order
data/columns.py       one value a row, its place, and all that is wrong
data/paths.py         which files a data set may name
data/tables.py        CSV, TSV, JSON lines, JSON -> columns
data/forms.py         which form a folder has -> columns
data/index.py         folders of clips -> samples
data/buckets.py       frames x height x width; which ones a clip goes to
data/transforms.py    resize, crop, flip of a whole clip
data/faults.py        what a file that cannot be used says
data/frames.py        which frames: selection by time
data/joined.py        files joined end to end: where the second begins
data/keyframes.py     a keyframe's bytes: the size of the pictures, whether decoding can start there
data/mpeg4.py         MPEG-4 part 2: packed B-frames, pictures that repeat the one before
data/packets.py       a video's packets -> when each frame is shown, where decoding can start
data/icc.py           color profiles of pictures -> sRGB
data/pictures.py      still images
data/planes.py        planes of decoded frames as arrays
data/alpha.py         transparency of videos: composited on black before scaling
data/colors.py        HDR and wide-gamut video -> SDR
data/decord_reader.py decord 0.6 as another reader
data/decode.py        probe, exact frames, mp4 writing
hub.py                the repository on the hub: made at the start, filled at the end
lora_file.py          a LoRA's file, read before anything heavy is imported
geometry.py           the numbers in a model's config files
data/proposals.py     buckets that suit a folder's clips and a model
data/cache.py         encoded clips and captions: content-addressed, checked, atomic
data/clips.py         a file and a recipe -> a plan -> frames
data/sampler.py       which samples make up each optimizer step
diffusion.py          noise schedule and loss
rope.py               rotary tables
lora.py               parts of a LoRA: layers, PiSSA's start, dropout that repeats
data/shared_memory.py room for batches in /dev/shm: how many workers of the loader fit
data/dataset.py       cached tensors -> batches
encode.py             clips, first frames and captions -> tensors
graphs.py             compiled functions that may have many graphs
streaming.py          tensors that pass through the device: weights, what forward keeps, gradients, masters
t5_stream.py          T5 with its blocks in host memory
vae_encoder.py        the VAE's encoder, faster on a GPU
vae_decoder.py        decoding what fits: whole frames, or tiles
models.py             parts of a pipeline: found, identified, loaded
prompts.py            validation prompts, of the command line or a file
factory.py            folders that the CogVideoX factory prepared -> the cache
optimizers.py         which optimizer, and what each needs and refuses
checks.py             what a script looks at before anything heavy is imported
prepare.py            folders of clips -> the cache
captions.py           what T5 does not read of captions, or cannot tell apart
causes.py             why clips cannot be used, grouped, with what helps
report.py             what a preparation makes of a data set: table, pictures, costs
verify.py             a cache against its data: what is wrong, and mending it
tasks.py              what the transformer gets: text to video, image to video
methods.py            what is trained: a LoRA, or all weights
masters.py            fp32 masters and what optimizers keep: on the device, or passing through it
optim.py              an optimizer step, learning rate
offload.py            masters, moments and the step in host memory
ema.py                a moving average of the masters, to be looked at and exported
engine.py             who runs backward and step: this process, or DeepSpeed
ranks.py              the processes of a run: barriers, and stopping before the same step
plan.py               how the blocks are executed: what fits, what is fastest
attention.py          attention by the kernels of the device
quant.py              frozen matrices in int8, fp8, nf4
blocks.py             one block, forward and backward, as functions of tensors
stack.py              all blocks of a transformer under a plan
layerwise.py          a transformer that lies on the CPU, run on the device a layer at a time
run.py                one run: ranks, output folder, metrics, trackers
images.py             the images that validation videos begin with
tensors.py            a prepared folder, or one prepared now
execution.py          the plan of a run: sizes, the machine measured, blocks placed
block_check.py        blocks as a plan runs them against diffusers' own, before the first step
checkpoint.py         checkpoints that are whole or not there
skipped.py            steps that changed no weight: told, counted, too many end the run
validation.py         videos while training
parity.py             what training feeds the transformer against what the pipeline does
before_after.py       each prompt before and after training, beside a training clip
best.py               the checkpoint with the lowest held-out loss, kept
held_out.py           the loss on clips that are never trained on
card.py               the model card
pipeline_folder.py    a whole pipeline beside all trained weights, of links and copies
warm_up.py            the largest bucket before the first step, where no plan bounds the memory
publish.py            the result, reloaded and compared
loop.py               fine_tune: what every script does; Trainer: the one loop
"""
