#!/usr/bin/env bash
# Trains all weights for text-to-video, with one run for each combination of learning rate, schedule, optimizer and
# number of steps.
#
#   ./train_text_to_video_sft.sh
#   DRY_RUN=1 ./train_text_to_video_sft.sh                                      # only prints the commands
#   MODEL=THUDM/CogVideoX-2b LEARNING_RATES="1e-5 2e-5" DATA_ROOT=/data/clips ./train_text_to_video_sft.sh
#   ACCELERATE_CONFIG_FILE=accelerate_configs/deepspeed.yaml GPU_IDS=0,1 ./train_text_to_video_sft.sh
#
# Environment variables override every NAME below and in `settings` of scripts/sweep.sh. EXTRA_FLAGS="--flag value" adds
# or replaces flags. Paths are relative to this folder. The same command resumes a sweep that was stopped.
# Exit statuses: 0 all runs finished, 1 some runs failed, 2 data or programs are missing, 75 stopped and saved.
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
