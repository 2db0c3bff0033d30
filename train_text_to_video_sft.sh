#!/usr/bin/env bash
# Text-to-video, all weights: one run for each combination of learning rate, schedule, optimizer and number of steps.
#
#   ./train_text_to_video_sft.sh
#   DRY_RUN=1 ./train_text_to_video_sft.sh                                      # prints the commands, runs nothing
#   MODEL=THUDM/CogVideoX-2b LEARNING_RATES="1e-5 2e-5" DATA_ROOT=/data/clips ./train_text_to_video_sft.sh
#   ACCELERATE_CONFIG_FILE=accelerate_configs/deepspeed.yaml GPU_IDS=0,1 ./train_text_to_video_sft.sh
#
# Every NAME below and in `settings` of scripts/sweep.sh can be set from outside; EXTRA_FLAGS="--flag value" adds to, or
# replaces, any flag. Relative paths count from this folder. The same command goes on where it was stopped.
# Exit codes: 0 all done, 1 some runs failed, 2 nothing to run with, 75 stopped by a signal with everything saved.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
source scripts/sweep.sh

words LEARNING_RATES 1e-5
words MAX_TRAIN_STEPS 20000
setting GRADIENT_ACCUMULATION_STEPS 4
setting CHECKPOINTING_STEPS 2000
setting LR_WARMUP_STEPS 800
setting VALIDATION_EPOCHS 1
setting VALIDATION_PROMPT "A black and white cartoon from the early days of animation. A lanky dog in a straw hat drives a \
rattling car along a winding country road, honking at the hens that flutter out of its way.:::An old lighthouse keeper \
climbs a spiral stair with a lantern in his hand, while waves break against the rocks below the windows."
settings

sweep training/cogvideox_text_to_video_sft.py cogvideox-sft
