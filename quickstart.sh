#!/usr/bin/env bash
# From a folder of clips to a LoRA. Each step is an ordinary command, which is printed before it runs.
#
#   ./quickstart.sh my-clips --token MYSTYLE --endpoint http://localhost:8000/v1
#   ./quickstart.sh my-clips --token MYDOG --preset subject --model THUDM/CogVideoX-2b --output_dir my-dog
#   ./quickstart.sh my-clips --token MYSTYLE --yes -- --rank 64 --validation_steps 200
#
# --token WORD           a new word that is put before every caption; in prompts, it calls up what was learned (required)
# --preset GOAL          what to learn: style, subject or motion (default: style)
# --model MODEL          folder or hub id of a CogVideoX pipeline (default: THUDM/CogVideoX-5b)
# --endpoint URL         OpenAI-compatible server with a vision-language model, which describes clips without a caption
# --caption_model NAME   the name of that model; without --endpoint, a hub id that transformers runs on this machine
# --output_dir FOLDER    where everything is written (default: the folder of the clips, with -lora at its end)
# --yes                  train without asking
# -- FLAG...             flags of the training script, which override those of this script
#
# Scenes and captions are written to clips.csv, and sizes to buckets.txt, both in the output folder. You can edit them
# before you answer, or stop and edit: the same command goes on where it stopped, and never changes what you wrote.
set -euo pipefail
here=$(dirname -- "${BASH_SOURCE[0]}")
fail() { printf 'quickstart.sh: %s\n' "$@" >&2; exit 2; }

clips='' token='' preset=style model=THUDM/CogVideoX-5b endpoint='' caption_model='' output_dir='' yes=''
while (($#)); do
  case $1 in
    -h | --help) sed -n '2,/^set/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit ;;
    --) shift; break ;;
    --yes) yes=1; shift ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --token | --preset | --model | --endpoint | --caption_model | --output_dir)
      (($# > 1)) || fail "$1: needs a value"
      printf -v "${1#--}" %s "$2"; shift 2 ;;
    -*) fail "$1: no such flag; see ./quickstart.sh --help; flags of the training script come after --" ;;
    *) [[ ! $clips ]] || fail "$1: give one folder of clips; $clips was given, too"; clips=${1%/}; shift ;;
  esac
done
[[ $clips ]] || fail "give the folder of your clips, such as: ./quickstart.sh my-clips --token MYSTYLE"
[[ -d $clips ]] || fail "$clips: there is no such folder"
[[ $token ]] || fail "--token: give a new word for what is to be learned, such as --token MYSTYLE"
[[ $preset =~ ^(style|subject|motion)$ ]] || fail "--preset $preset: must be one of style, subject, motion"

python=${PYTHON:-$([[ -x $here/.venv/bin/python ]] && echo "$here/.venv/bin/python" || echo python3)}
"$python" -c 'from importlib.util import find_spec
assert find_spec("torch") and find_spec("diffusers")' 2> /dev/null || fail "$python has no torch or no diffusers; run make .venv/ready"

[[ ! $clips =~ (^|/)\.\.?$ ]] || clips=$(realpath -- "$clips") # the output folder is named after it
out=${output_dir:-$clips-lora}
[[ $(realpath -m -- "$out")/ != "$(realpath -- "$clips")"/* ]] ||
  fail "--output_dir $out: is inside the folder of clips, where its pictures would be clips; name one outside of it"
table=$out/clips.csv
data=(--data_root "$clips" --dataset_file "$table")
if [[ -f $out/lora/recipe.json ]]; then # a larger number of steps continues the finished training
  trained=$(sed -n 's/^ "step": \([0-9]*\),$/\1/p' "$out/lora/recipe.json")
  if [[ ! " $*" =~ .*\ --max_train_steps[\ =]([0-9]+) ]] || ((10#${BASH_REMATCH[1]} <= ${trained:-0})); then
    echo "$out/lora is finished after ${trained:-its} steps; its report: $out/lora/report.html"
    echo "to train longer, add -- --max_train_steps with a larger number; to start again, remove this folder"
    exit
  fi
fi
mkdir -p "$out"

# quoted WORD...: prints words as they can be typed, with quotes only where the shell needs them.
quoted() {
  local word
  for word; do if [[ $word =~ ^[A-Za-z0-9_./:=,+-]+$ ]]; then printf ' %s' "$word"; else printf ' %s' "${word@Q}"; fi; done
}

# step TITLE COMMAND...: prints a command and runs it. If it fails, the script ends. A signal that stops this script, as
# docker stop sends it, is handed to the command, which saves its work; the script ends after it, with its status.
step() {
  local stopped=1 asked=0 status=0 child
  printf '\n== %s\n$%s\n' "$1" "$(quoted "${@:2}")" >&2
  "${@:2}" &
  child=$!
  trap 'stopped=1 asked=75; kill -TERM "$child" 2> /dev/null || :' HUP INT TERM USR1
  while [[ $stopped ]]; do # a signal ends wait before the command ends
    stopped=''
    wait "$child" && status=0 || status=$?
  done
  trap - HUP INT TERM USR1
  ((status)) || status=$asked
  ((status)) || return 0
  ((status == 75)) || printf 'quickstart.sh: this step failed. After the change that it names, give the same command.\n' >&2
  exit "$status"
}

# first: prints caption, file and start of the first row that has a caption, each on a line. A spreadsheet may have
# saved the table with other separators, so it is read as the training reads it.
first() {
  PYTHONPATH=$here/training "$python" -c 'import os, sys
from pathlib import Path
from cogvideox.data.forms.table_text import TableText
rows = TableText.read(Path(sys.argv[2])).table.rows
row = next(row for row in rows if (row["caption"] or "").strip())
print(" ".join(row["caption"].split()), os.path.join(sys.argv[1], row["video"]), row["start"] or 0, sep="\n")' \
    "$clips" "$table"
}

scenes=("$python" "$here/training/split_scenes.py" --data_root "$clips" --table "$table")
# A model describes each scene by itself. Without one, the caption of a clip is that of all its scenes.
[[ $endpoint$caption_model ]] || scenes+=(--scene_captions repeat)
step "Find the scenes of long clips" "${scenes[@]}"

caption=("$python" "$here/training/caption_dataset.py" --model_id "$model" "${data[@]}")
[[ ! $endpoint ]] || caption+=(--endpoint "$endpoint")
[[ ! $caption_model ]] || caption+=(--caption_model "$caption_model")
step "Describe the clips that have no caption" "${caption[@]}"

prepare=("$python" "$here/training/prepare_dataset.py" --model_id "$model" "${data[@]}" --output_dir "$out/tensors"
  --id_token "$token" --video_reshape_mode center --max_bad_fraction 0.2)
if [[ ! -s $out/buckets.txt ]]; then
  step "Choose sizes that suit the clips" "${prepare[@]}" --suggest_buckets 4 > "$out/buckets.new"
  mv "$out/buckets.new" "$out/buckets.txt"
  cat "$out/buckets.txt"
fi
buckets=$(tr -d '\r' < "$out/buckets.txt") # an editor may have changed the ends of lines, or added some
read -r -d '' -a buckets <<< "$buckets" || :

task=text
if [[ -f $model/model_index.json ]]; then
  if grep -q ImageToVideo "$model/model_index.json"; then task=image; fi
elif [[ ${model,,} == *i2v* ]]; then
  task=image
fi
precision=$("$python" -c 'import torch
print("no" if not torch.cuda.is_available() else "bf16" if torch.cuda.is_bf16_supported(False) else "fp16")')
train=("$python" "$here/training/cogvideox_${task}_to_video_lora.py" --pretrained_model_name_or_path "$model")
flags=(--output_dir "$out/lora" "${buckets[@]}" --video_reshape_mode center --preset "$preset"
  --mixed_precision "$precision" --checkpointing_steps 500 --checkpoints_total_limit 3)

if [[ ! -d $out/lora ]]; then
  step "Look at the data" "${prepare[@]}" "${buckets[@]}" --dry_run
  if [[ $precision == no ]]; then
    printf '\nThis machine has no GPU, so the training is not predicted. Full-size models need a GPU.\n'
  else
    step "Predict the training" "${train[@]}" "${data[@]}" --id_token "$token" --max_bad_fraction 0.2 "${flags[@]}" \
      --dry_run "$@"
  fi
  printf '\nLook at %s and, for captions and scenes, at %s.\n' "$out/tensors/report.html" "$table"
  if [[ ! $yes ]]; then
    [[ -t 0 ]] || { echo "Nothing was encoded or trained. To do that, add --yes to the command."; exit; }
    read -r -p "Encode the clips and train now? [y/N] " answer
    [[ ${answer,,} == y* ]] || { echo "Nothing was encoded or trained. The same command asks again."; exit; }
  fi
fi

step "Encode clips and captions" "${prepare[@]}" "${buckets[@]}"

found=$(first)
mapfile -t found <<< "$found"
videos=(--validation_prompt "$token ${found[0]}" --validation_steps 500)
example=("$token a lighthouse at dawn" lighthouse.mp4)
if [[ $task == image ]]; then
  size=${buckets[1]#*x}
  step "Take the first frame of the validation video" \
    "$python" "$here/examples/first_frame.py" "${found[1]}" "$out/first_frame.png" --size "$size" \
    --start "${found[2]}"
  videos+=(--validation_images "$out/first_frame.png")
  example=("$token ${found[0]}" "$out/first_frame.png" video.mp4)
fi
step "Train" "${train[@]}" --data_root "$out/tensors" --load_tensors "${flags[@]}" "${videos[@]}" "$@"

cat << END

the LoRA        $out/lora/pytorch_lora_weights.safetensors
its report      $out/lora/report.html
a video        $(quoted "$python" "$out/lora/inference.py" "${example[@]}")
END
