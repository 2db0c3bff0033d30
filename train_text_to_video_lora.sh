#!/usr/bin/env bash
# Trains a LoRA for text-to-video, with one run for each combination of learning rate, schedule, optimizer and
# number of steps.
#
#   ./train_text_to_video_lora.sh
#   DRY_RUN=1 ./train_text_to_video_lora.sh                                     # only prints the commands
#   LEARNING_RATES="1e-4 2e-4" OPTIMIZERS=adamw DATA_ROOT=/data/clips ./train_text_to_video_lora.sh
#   ACCELERATE_CONFIG_FILE=accelerate_configs/uncompiled_2.yaml GPU_IDS=0,1 ./train_text_to_video_lora.sh
#
# Environment variables override every NAME below and in `settings` of scripts/sweep.sh. EXTRA_FLAGS="--flag value" adds
# or replaces flags. Paths are relative to this folder. The same command resumes a sweep that was stopped.
# Exit statuses: 0 all runs finished, 1 some runs failed, 2 data or programs are missing, 75 stopped and saved.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
source scripts/sweep.sh

words LEARNING_RATES 1e-4 1e-3
words OPTIMIZERS adamw adam
setting ID_TOKEN BW_STYLE
setting LORA_RANK 128  # not RANK, which cluster software sets
setting LORA_ALPHA 128
setting VALIDATION_PROMPT "BW_STYLE A black and white cartoon from the early days of animation. A cheerful mouse in \
shorts steers a small river boat, whistling and tapping one foot, while smoke rings rise from the funnel. A goat on the \
deck chews on a sheet of music, and the notes drift out of its ears across the sky.:::BW_STYLE A bear in a knitted \
waistcoat plays the cello on a tree stump in a snowy clearing. Its paws draw the bow slowly over the strings, hares and \
a fox sit around it and sway, and snowflakes drift through the pale light of the morning between the firs."
settings

sweep training/cogvideox_text_to_video_lora.py cogvideox-lora \
  --id_token "$ID_TOKEN" --rank "$LORA_RANK" --lora_alpha "$LORA_ALPHA"
