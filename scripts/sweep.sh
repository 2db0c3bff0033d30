# Sourced by the scripts at the top: `setting` and `words` read the environment, `sweep` runs one training for each
# combination of the swept values. Commands are arrays, never text to be parsed again: a prompt may hold quotes, $(...)
# and line breaks. Needs bash 4.4.

REQUEUE_EXIT=75  # of the training scripts: stopped by a signal, everything saved; the same command goes on
DATASET=Wild-Heart/Disney-VideoGeneration-Dataset

# NCCL_P2P_DISABLE=1 (in older guides) sends what GPUs exchange through host memory, and TORCH_NCCL_ENABLE_MONITORING=0
# lets a job hang for ever when one of its GPUs dies: neither is set. TORCH_LOGS="+dynamo,recompiles,graph_breaks" and
# TORCHDYNAMO_VERBOSE=1 print pages at every start: set them to look into a compilation.
export WANDB_MODE=${WANDB_MODE:-offline}

say() { printf '%s\n' "$*" >&2; }

dry_run() { [[ ${DRY_RUN:-0} != 0 ]]; }

# setting NAME DEFAULT: a value, unless the environment has it (an empty one counts).
setting() { [[ -v $1 ]] || printf -v "$1" %s "$2"; }

# words NAME DEFAULT...: an array of words, unless the environment has them, parted by spaces (nothing is globbed), or
# the script has set it before.
words() {
  [[ $(declare -p "$1" 2> /dev/null) != "declare -a"* ]] || return 0
  local -n words_=$1
  local given=${!1-}
  if [[ $given ]]; then read -r -d '' -a words_ <<< "$given" || true; else words_=("${@:2}"); fi
}

# tool VARIABLE NAME: a program of .venv if it is there, else of PATH, unless the environment names one.
tool() {
  setting "$1" "$([[ -x .venv/bin/$2 ]] && echo ".venv/bin/$2" || echo "$2")"
  dry_run || command -v -- "${!1}" > /dev/null || { say "${!1}: not found; pip install -r requirements.txt"; exit 2; }
}

check_data() {
  [[ -d $DATA_ROOT ]] && return
  say "DATA_ROOT $DATA_ROOT: there is no such folder; the guide's data set:"
  say "  hf download --repo-type dataset $DATASET --local-dir video-dataset-disney"
  dry_run || exit 2
}

show() { printf '%q ' "$@"; echo; }

# validation_images: the flag for the images that validation videos begin with, into IMAGE_FLAGS; without images there
# are no such videos.
validation_images() {
  setting VALIDATION_IMAGES ""
  IMAGE_FLAGS=()
  if [[ $VALIDATION_IMAGES ]]; then
    IMAGE_FLAGS=(--validation_images "$VALIDATION_IMAGES")
  elif [[ ${VALIDATION_PROMPT-} ]]; then
    say "VALIDATION_IMAGES is not set, so no validation videos are made; give two images, joined by :::"
    VALIDATION_PROMPT=
  fi
}

# settings: what every training script reads.
settings() {
  words LEARNING_RATES 1e-4
  words LR_SCHEDULES cosine_with_restarts
  words OPTIMIZERS adamw
  words MAX_TRAIN_STEPS 3000
  words HEIGHT_BUCKETS 480
  words WIDTH_BUCKETS 720
  words FRAME_BUCKETS 49
  words EXTRA_FLAGS  # come last, and of a flag given twice the last one counts
  setting ACCELERATE_CONFIG_FILE accelerate_configs/uncompiled_1.yaml
  setting MODEL THUDM/CogVideoX-5b
  setting DATA_ROOT ./video-dataset-disney
  setting CAPTION_COLUMN prompt.txt
  setting VIDEO_COLUMN videos.txt
  setting OUTPUT_ROOT ./runs
  setting MAX_NUM_FRAMES 49
  setting MIXED_PRECISION bf16
  setting TRAIN_BATCH_SIZE 1
  setting GRADIENT_ACCUMULATION_STEPS 1
  setting CHECKPOINTING_STEPS 1000
  setting LR_WARMUP_STEPS 400
  setting REPORT_TO wandb
  setting VALIDATION_EPOCHS 10
  setting SEED 42
  setting DATALOADER_NUM_WORKERS 8
  setting NCCL_TIMEOUT 1800
}

# flags: those of one run that do not depend on the script. Reads what `sweep` loops over.
flags() {
  FLAGS=(
    --pretrained_model_name_or_path "$MODEL" --output_dir "$output_dir"
    --data_root "$DATA_ROOT" --caption_column "$CAPTION_COLUMN" --video_column "$VIDEO_COLUMN"
    --height_buckets "${HEIGHT_BUCKETS[@]}" --width_buckets "${WIDTH_BUCKETS[@]}"
    --frame_buckets "${FRAME_BUCKETS[@]}" --max_num_frames "$MAX_NUM_FRAMES"
    --dataloader_num_workers "$DATALOADER_NUM_WORKERS" --pin_memory
    --seed "$SEED" --mixed_precision "$MIXED_PRECISION" --allow_tf32 --gradient_checkpointing
    --train_batch_size "$TRAIN_BATCH_SIZE" --gradient_accumulation_steps "$GRADIENT_ACCUMULATION_STEPS"
    --max_train_steps "$steps" --checkpointing_steps "$CHECKPOINTING_STEPS"
    --optimizer "$optimizer" --learning_rate "$learning_rate" --lr_scheduler "$lr_schedule"
    --lr_warmup_steps "$LR_WARMUP_STEPS" --lr_num_cycles 1
    --beta1 0.9 --beta2 0.95 --weight_decay 0.001 --max_grad_norm 1.0
    --enable_slicing --enable_tiling
    --report_to "$REPORT_TO" --nccl_timeout "$NCCL_TIMEOUT"
  )
  if [[ ${VALIDATION_PROMPT-} ]]; then
    FLAGS+=(--validation_prompt "$VALIDATION_PROMPT" --validation_prompt_separator :::)
    FLAGS+=(--num_validation_videos 1 --validation_epochs "$VALIDATION_EPOCHS")
  fi
}

# launcher: accelerate with its configuration, into LAUNCH.
launcher() {
  tool ACCELERATE accelerate
  [[ -f $ACCELERATE_CONFIG_FILE ]] || { say "ACCELERATE_CONFIG_FILE $ACCELERATE_CONFIG_FILE: no such file"; exit 2; }
  LAUNCH=("$ACCELERATE" launch --config_file "$ACCELERATE_CONFIG_FILE")
  [[ ${ACCELERATE_CONFIG_FILE##*/} != cpu.yaml ]] || return 0
  # a scheduler's choice of GPUs stands; else one process gets the first GPU, and several get all that they need
  local first=all
  if grep -q '^num_processes: 1$' "$ACCELERATE_CONFIG_FILE"; then first=0; fi
  setting GPU_IDS "${CUDA_VISIBLE_DEVICES:-$first}"
  LAUNCH+=(--gpu_ids "$GPU_IDS")
}

# sweep SCRIPT NAME FLAG...: one run for each combination of the swept values, with FLAG... beside those of `flags`.
sweep() {
  local script=$1 name=$2 learning_rate lr_schedule optimizer steps output_dir
  check_data
  launcher
  FAILED=()
  for learning_rate in "${LEARNING_RATES[@]}"; do
    for lr_schedule in "${LR_SCHEDULES[@]}"; do
      for optimizer in "${OPTIMIZERS[@]}"; do
        for steps in "${MAX_TRAIN_STEPS[@]}"; do
          output_dir="$OUTPUT_ROOT/${name}__optimizer_${optimizer}__steps_${steps}"
          output_dir+="__lr-schedule_${lr_schedule}__learning-rate_${learning_rate}"
          flags
          run "$output_dir" "${LAUNCH[@]}" "$script" "${FLAGS[@]}" "${@:3}" "${EXTRA_FLAGS[@]}"
        done
      done
    done
  done
  ((${#FAILED[@]} == 0)) || { printf '%s\n' "failed:" "${FAILED[@]}" >&2; exit 1; }
}

# run OUTPUT_DIR COMMAND...: one run, unless it is finished. A failure is noted; a wish to stop ends the sweep.
run() {
  if [[ -f $1/recipe.json ]]; then say "finished already, skipped: $1"; return; fi
  if dry_run; then show "${@:2}"; return; fi
  say "running: $(show "${@:2}")"
  local status
  supervise "${@:2}"
  if ((status == REQUEUE_EXIT)); then say "stopped and saved: $1; the same command goes on"; exit "$REQUEUE_EXIT"; fi
  if ((status)); then
    say "failed with exit code $status: $1"
    FAILED+=("  exit code $status: $1")
  fi
  [[ -z $SIGNAL ]] || exit $((128 + $(kill -l "$SIGNAL")))
}

# supervise COMMAND...: runs it and sets `status`. A process group of its own keeps Ctrl-C away from the launcher, which
# would die and leave the training behind; the signals go to the training processes, once.
supervise() {
  local launcher name again=1 exit_file
  SIGNAL=
  exit_file=$(mktemp)
  set -m
  COGVIDEOX_EXIT_FILE=$exit_file "$@" < /dev/null &
  launcher=$!
  set +m
  for name in HUP TERM INT USR1; do trap "again=1; stop_training $name $launcher" "$name"; done
  while ((again)); do  # a signal ends `wait` early
    again=0 status=0
    wait "$launcher" || status=$?
  done
  trap - HUP TERM INT USR1
  # launchers make 1 of every exit code; the scripts leave theirs in the file
  if ((status)) && [[ -s $exit_file ]]; then status=$(< "$exit_file"); fi
  rm -f "$exit_file"
}

# stop_training SIGNAL LAUNCHER: to the launcher's children, which are the training processes; without any, to itself.
stop_training() {
  local children=()
  SIGNAL=$1
  { read -r -a children < "/proc/$2/task/$2/children" || true; } 2> /dev/null
  kill -s "$1" "${children[@]:-$2}" 2> /dev/null || true
}
