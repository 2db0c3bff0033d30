# The train_*.sh scripts and prepare_dataset.sh source this file. `setting` and `words` read the environment. `sweep` runs
# one training for each combination of the swept values. Commands are arrays and are never parsed again as text, because
# a prompt may contain quotes, $(...) and line breaks. bash 4.4 or newer is needed.

REQUEUE_EXIT=75  # a training script was stopped by a signal and has saved; the same command resumes it
DATASET=Wild-Heart/Disney-VideoGeneration-Dataset

# Older guides set NCCL_P2P_DISABLE=1, which makes GPUs exchange data through host memory, and
# TORCH_NCCL_ENABLE_MONITORING=0, which lets a job hang forever when one of its GPUs dies. Neither is set here.
# To inspect a compilation, set TORCH_LOGS="+dynamo,recompiles,graph_breaks" and TORCHDYNAMO_VERBOSE=1.
export WANDB_MODE=${WANDB_MODE:-offline}

say() { printf '%s\n' "$*" >&2; }

dry_run() { [[ ${DRY_RUN:-0} != 0 ]]; }

# setting NAME DEFAULT: sets a value unless the environment has one, which may be empty.
setting() { [[ -v $1 ]] || printf -v "$1" %s "$2"; }

# words NAME DEFAULT...: sets an array of words, unless the script has set it before. Words from the environment are
# separated by spaces and are not expanded as file patterns.
words() {
  [[ $(declare -p "$1" 2> /dev/null) != "declare -a"* ]] || return 0
  local -n words_=$1
  local given=${!1-}
  [[ $1 == EXTRA_FLAGS || $given != *,* ]] || { say "$1=$given: has commas; separate values by spaces"; exit 2; }
  if [[ $given ]]; then read -r -d '' -a words_ <<< "$given" || true; else words_=("${@:2}"); fi
}

# tool VARIABLE NAME: sets the path of a program: from the environment, or else from .venv, or else from PATH.
tool() {
  setting "$1" "$([[ -x .venv/bin/$2 ]] && echo ".venv/bin/$2" || echo "$2")"
  dry_run || command -v -- "${!1}" > /dev/null || { say "${!1}: not found; pip install -r requirements.txt"; exit 2; }
}

# data_set: sets DATA_FLAGS to the folder of clips. That of the guide has lists; the form of another one is detected.
data_set() {
  setting DATA_ROOT ./video-dataset-disney
  if [[ $DATA_ROOT == ./video-dataset-disney ]]; then
    setting CAPTION_COLUMN prompt.txt
    setting VIDEO_COLUMN videos.txt
  fi
  DATA_FLAGS=(--data_root "$DATA_ROOT")
  [[ ! ${CAPTION_COLUMN-} ]] || DATA_FLAGS+=(--caption_column "$CAPTION_COLUMN")
  [[ ! ${VIDEO_COLUMN-} ]] || DATA_FLAGS+=(--video_column "$VIDEO_COLUMN")
}

check_data() {
  [[ -d $DATA_ROOT ]] && return
  say "DATA_ROOT $DATA_ROOT: there is no such folder; to download the data set of the guide:"
  say "  hf download --repo-type dataset $DATASET --local-dir video-dataset-disney"
  dry_run || exit 2
}

show() { printf '%q ' "$@"; echo; }

# validation_images: sets IMAGE_FLAGS to the flag for the images that validation videos begin with. Without images, no
# validation videos are made.
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

# settings: sets what every training script reads.
settings() {
  words LEARNING_RATES 1e-4
  words LR_SCHEDULES cosine_with_restarts
  words OPTIMIZERS adamw
  words MAX_TRAIN_STEPS 3000
  words HEIGHT_BUCKETS 480
  words WIDTH_BUCKETS 720
  words FRAME_BUCKETS 49
  words EXTRA_FLAGS  # come last, because the last value of a flag counts
  setting ACCELERATE_CONFIG_FILE accelerate_configs/uncompiled_1.yaml
  setting MODEL THUDM/CogVideoX-5b
  data_set
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

# flags: sets FLAGS to the flags of one run that do not depend on the script. It reads the loop variables of `sweep`.
flags() {
  FLAGS=(
    --pretrained_model_name_or_path "$MODEL" --output_dir "$output_dir"
    "${DATA_FLAGS[@]}"
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

# launcher: sets LAUNCH to accelerate with its configuration.
launcher() {
  tool ACCELERATE accelerate
  [[ -f $ACCELERATE_CONFIG_FILE ]] || { say "ACCELERATE_CONFIG_FILE $ACCELERATE_CONFIG_FILE: no such file"; exit 2; }
  LAUNCH=("$ACCELERATE" launch --config_file "$ACCELERATE_CONFIG_FILE")
  [[ ${ACCELERATE_CONFIG_FILE##*/} != cpu.yaml ]] || return 0
  # A scheduler's choice of GPUs takes precedence. Otherwise one process gets the first GPU, and several get all GPUs.
  local first=all
  if grep -q '^num_processes: 1$' "$ACCELERATE_CONFIG_FILE"; then first=0; fi
  setting GPU_IDS "${CUDA_VISIBLE_DEVICES:-$first}"
  LAUNCH+=(--gpu_ids "$GPU_IDS")
}

# sweep SCRIPT NAME FLAG...: runs each combination of the swept values, with FLAG... in addition to those of `flags`.
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

# run OUTPUT_DIR COMMAND...: runs a training unless its folder has a finished one. A failure is recorded. A stopped run
# ends the sweep.
run() {
  if [[ -f $1/recipe.json ]]; then
    say "finished already, skipped even if other settings have changed: $1"
    say "  to train it again, remove this folder or set another OUTPUT_ROOT"
    return
  fi
  if dry_run; then show "${@:2}"; return; fi
  say "running: $(show "${@:2}")"
  local status
  supervise "${@:2}"
  if ((status == REQUEUE_EXIT)); then say "stopped and saved: $1; the same command resumes it"; exit "$REQUEUE_EXIT"; fi
  if ((status)); then
    say "failed with exit status $status: $1"
    FAILED+=("  exit status $status: $1")
  fi
  [[ -z $SIGNAL ]] || exit $((128 + $(kill -l "$SIGNAL")))
}

# supervise COMMAND...: runs a command and sets `status`. The command gets its own process group, because Ctrl-C would
# kill the launcher and leave the training processes running. Signals are sent to the training processes, once.
supervise() {
  local launcher name again=1 exit_file
  SIGNAL=
  exit_file=$(mktemp)
  set -m
  COGVIDEOX_EXIT_FILE=$exit_file "$@" < /dev/null &
  launcher=$!
  set +m
  for name in HUP TERM INT USR1; do trap "again=1; stop_training $name $launcher" "$name"; done
  while ((again)); do  # a signal interrupts `wait`
    again=0 status=0
    wait "$launcher" || status=$?
  done
  trap - HUP TERM INT USR1
  # Launchers turn every exit status into 1. The scripts write their own status to the file.
  if ((status)) && [[ -s $exit_file ]]; then status=$(< "$exit_file"); fi
  rm -f "$exit_file"
}

# stop_training SIGNAL LAUNCHER: signals the training processes, which are the launcher's children, or else it.
stop_training() {
  local children=()
  SIGNAL=$1
  { read -r -a children < "/proc/$2/task/$2/children" || true; } 2> /dev/null
  kill -s "$1" "${children[@]:-$2}" 2> /dev/null || true
}
