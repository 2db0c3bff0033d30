#!/usr/bin/env bash
# Trains all weights for image-to-video, with one run for each combination of learning rate, schedule, optimizer and
# number of steps.
#
#   ./train_image_to_video_sft.sh
#   DRY_RUN=1 ./train_image_to_video_sft.sh                                     # only prints the commands
#   VALIDATION_IMAGES=barn.png:::harbor.png DATA_ROOT=/data/clips ./train_image_to_video_sft.sh
#   ACCELERATE_CONFIG_FILE=accelerate_configs/deepspeed.yaml GPU_IDS=0,1 ./train_image_to_video_sft.sh
#
# Environment variables override every NAME below and in `settings` of scripts/sweep.sh. EXTRA_FLAGS="--flag value" adds
# or replaces flags. Paths are relative to this folder. The same command resumes a sweep that was stopped.
# Exit statuses: 0 all runs finished, 1 some runs failed, 2 data or programs are missing, 75 stopped and saved.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
source scripts/sweep.sh

words LEARNING_RATES 1e-5
words MAX_TRAIN_STEPS 20000
words FRAME_BUCKETS 77  # 20 latent frames; CogVideoX 1.5 needs no padding for an even number
setting MODEL THUDM/CogVideoX1.5-5B-I2V
setting MAX_NUM_FRAMES 77
setting ID_TOKEN BW_STYLE
setting GRADIENT_ACCUMULATION_STEPS 4
setting CHECKPOINTING_STEPS 2000
setting LR_WARMUP_STEPS 800
setting VALIDATION_EPOCHS 1
setting NOISED_IMAGE_DROPOUT 0.05
setting VALIDATION_PROMPT "BW_STYLE A black and white cartoon from the early days of animation. A barn door swings open \
and a row of ducks marches out in step, the last one carrying a drum that is far too large for it.:::BW_STYLE A tugboat \
with a face on its funnel puffs across a harbour, pulls a huge liner by a rope, and wipes its brow with a flag."
validation_images
settings

sweep training/cogvideox_image_to_video_sft.py cogvideox-i2v-sft \
  --id_token "$ID_TOKEN" --noised_image_dropout "$NOISED_IMAGE_DROPOUT" "${IMAGE_FLAGS[@]}"
