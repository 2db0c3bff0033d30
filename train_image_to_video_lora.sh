#!/usr/bin/env bash
# Image-to-video LoRA: one run for each combination of learning rate, schedule, optimizer and number of steps.
#
#   ./train_image_to_video_lora.sh
#   DRY_RUN=1 ./train_image_to_video_lora.sh                                    # prints the commands, runs nothing
#   VALIDATION_IMAGES=boat.png:::bear.png LEARNING_RATES="1e-4 2e-4" ./train_image_to_video_lora.sh
#   ACCELERATE_CONFIG_FILE=accelerate_configs/uncompiled_2.yaml GPU_IDS=0,1 ./train_image_to_video_lora.sh
#
# Every NAME below and in `settings` of scripts/sweep.sh can be set from outside; EXTRA_FLAGS="--flag value" adds to, or
# replaces, any flag. Relative paths count from this folder. The same command goes on where it was stopped.
# Exit codes: 0 all done, 1 some runs failed, 2 nothing to run with, 75 stopped by a signal with everything saved.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
source scripts/sweep.sh

words LEARNING_RATES 1e-4 1e-3
words OPTIMIZERS adamw adam
setting MODEL THUDM/CogVideoX-5b-I2V
setting ID_TOKEN BW_STYLE
setting LORA_RANK 128  # not RANK: cluster software sets that one
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
