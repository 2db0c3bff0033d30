#!/usr/bin/env bash
# Image-to-video, all weights: one run for each combination of learning rate, schedule, optimizer and number of steps.
#
#   ./train_image_to_video_sft.sh
#   DRY_RUN=1 ./train_image_to_video_sft.sh                                     # prints the commands, runs nothing
#   VALIDATION_IMAGES=barn.png:::harbour.png DATA_ROOT=/data/clips ./train_image_to_video_sft.sh
#   ACCELERATE_CONFIG_FILE=accelerate_configs/deepspeed.yaml GPU_IDS=0,1 ./train_image_to_video_sft.sh
#
# Every NAME below and in `settings` of scripts/sweep.sh can be set from outside; EXTRA_FLAGS="--flag value" adds to, or
# replaces, any flag. Relative paths count from this folder. The same command goes on where it was stopped.
# Exit codes: 0 all done, 1 some runs failed, 2 nothing to run with, 75 stopped by a signal with everything saved.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
source scripts/sweep.sh

words LEARNING_RATES 1e-5
words MAX_TRAIN_STEPS 20000
words FRAME_BUCKETS 77  # 20 latent frames: an even number, as CogVideoX 1.5 has them without padding
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
