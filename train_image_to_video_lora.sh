#!/usr/bin/env bash
# Trains a LoRA for image-to-video, with one run for each combination of learning rate, schedule, optimizer and
# number of steps.
#
#   ./train_image_to_video_lora.sh
#   DRY_RUN=1 ./train_image_to_video_lora.sh                                    # only prints the commands
#   VALIDATION_IMAGES=boat.png:::bear.png LEARNING_RATES="1e-4 2e-4" ./train_image_to_video_lora.sh
#   ACCELERATE_CONFIG_FILE=accelerate_configs/uncompiled_2.yaml GPU_IDS=0,1 ./train_image_to_video_lora.sh
#
# Environment variables override every NAME below and in `settings` of scripts/sweep.sh. EXTRA_FLAGS="--flag value" adds
# or replaces flags. Paths are relative to this folder. The same command resumes a sweep that was stopped.
# Exit statuses: 0 all runs finished, 1 some runs failed, 2 data or programs are missing, 75 stopped and saved.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
source scripts/sweep.sh

words LEARNING_RATES 1e-4 1e-3
words OPTIMIZERS adamw adam
setting MODEL THUDM/CogVideoX-5b-I2V
setting ID_TOKEN BW_STYLE
setting LORA_RANK 128  # not RANK, which cluster software sets
setting LORA_ALPHA 128
setting NOISED_IMAGE_DROPOUT 0.05
setting VALIDATION_PROMPT "BW_STYLE A black and white cartoon from the early days of animation. A cat in a sailor's cap \
stands on a jetty, lifts a brass spyglass and follows a paper ship that dances over the waves, its tail beating time on \
the planks.:::BW_STYLE An owl with round glasses sits behind a heap of books. It turns a page with the tip of its wing, \
blinks, and a small moth rises from the paper and circles the candle beside it."
validation_images
settings

sweep training/cogvideox_image_to_video_lora.py cogvideox-i2v-lora \
  --id_token "$ID_TOKEN" --rank "$LORA_RANK" --lora_alpha "$LORA_ALPHA" \
  --noised_image_dropout "$NOISED_IMAGE_DROPOUT" "${IMAGE_FLAGS[@]}"
