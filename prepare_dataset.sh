#!/usr/bin/env bash
# Encodes a folder of clips and captions. To train on the result:
#   DATA_ROOT=./video-dataset-disney-prepared EXTRA_FLAGS=--load_tensors ./train_text_to_video_lora.sh
#
#   ./prepare_dataset.sh
#   DRY_RUN=1 ./prepare_dataset.sh                       # only prints the command
#   NUM_GPUS=8 HEIGHT_BUCKETS="480 720" WIDTH_BUCKETS="720 960" ./prepare_dataset.sh
#   MODEL=THUDM/CogVideoX-5b-I2V ./prepare_dataset.sh    # also encodes first frames, for image-to-video
#
# Environment variables override every NAME below. Paths are relative to this folder. The same command continues an
# interrupted run.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
source scripts/sweep.sh

words HEIGHT_BUCKETS 480
words WIDTH_BUCKETS 720
words FRAME_BUCKETS 49
words EXTRA_FLAGS
setting NUM_GPUS 1
setting MODEL THUDM/CogVideoX-5b
data_set
setting OUTPUT_DIR "${DATA_ROOT%/}-prepared"
setting ID_TOKEN BW_STYLE  # is added to the captions here, because training with --load_tensors does not add it
setting MAX_NUM_FRAMES 49
setting MAX_SEQUENCE_LENGTH 226
setting TARGET_FPS ""  # empty: that of the model, 8, or 16 for CogVideoX 1.5
setting BATCH_SIZE 1
setting DTYPE bf16  # the guide uses fp32, in which T5 alone needs 18 GiB

check_data
if ((NUM_GPUS > 1)); then
  tool TORCHRUN torchrun
  COMMAND=("$TORCHRUN" --nproc_per_node "$NUM_GPUS")
else
  tool PYTHON python
  COMMAND=("$PYTHON")
fi
COMMAND+=(
  training/prepare_dataset.py
  --model_id "$MODEL" --output_dir "$OUTPUT_DIR"
  "${DATA_FLAGS[@]}" --id_token "$ID_TOKEN"
  --height_buckets "${HEIGHT_BUCKETS[@]}" --width_buckets "${WIDTH_BUCKETS[@]}"
  --frame_buckets "${FRAME_BUCKETS[@]}" --max_num_frames "$MAX_NUM_FRAMES"
  --max_sequence_length "$MAX_SEQUENCE_LENGTH"
  --batch_size "$BATCH_SIZE" --dtype "$DTYPE" --save_latents_and_embeddings
  ${TARGET_FPS:+--target_fps "$TARGET_FPS"}
  "${EXTRA_FLAGS[@]}"
)
if dry_run; then show "${COMMAND[@]}"; else exec "${COMMAND[@]}"; fi
