#!/usr/bin/env bash
# The main job, small: real clips -> prepared tensors -> a text-to-video LoRA -> a video from stock diffusers.
# The model is a tiny CogVideoX with random weights, so its videos show that the job works, not what a model knows.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${DEMO_DIR:-demo}
size=(--height_buckets 64 --width_buckets 96 --frame_buckets 9 --max_num_frames 9)

"$python" examples/tiny_cogvideox.py --output_dir "$out/model"
"$python" examples/real_clips.py --output_dir "$out/clips"

"$python" training/prepare_dataset.py --pretrained_model_name_or_path "$out/model" \
    --data_root "$out/clips" --output_dir "$out/tensors" --id_token CITYBUNNY \
    "${size[@]}" --video_reshape_mode center

"$python" training/cogvideox_text_to_video_lora.py --pretrained_model_name_or_path "$out/model" \
    --data_root "$out/tensors" --load_tensors --output_dir "$out/lora" \
    "${size[@]}" --rank 16 --lora_alpha 16 --train_batch_size 2 --max_train_steps 300 --checkpointing_steps 100 \
    --checkpoints_total_limit 2 --optimizer adamw --learning_rate 1e-3 --lr_scheduler cosine --lr_warmup_steps 20 \
    --validation_prompt "CITYBUNNY A big grey cartoon rabbit stands in a sunlit meadow.:::CITYBUNNY Tall skyscrapers stand at night." \
    --num_inference_steps 20 --validation_steps 150

"$python" "$out/lora/inference.py" "CITYBUNNY Two office towers rise into a dark blue night sky." "$out/sample.mp4"

cat <<END

clips and captions   $out/clips
encoded tensors      $out/tensors
the LoRA             $out/lora/pytorch_lora_weights.safetensors
before and after     $out/lora/contact_sheet.png
its curves           $out/lora/curves.png
its metrics          $out/lora/metrics.jsonl
validation videos    $out/lora/validation
a video with it      $out/sample.mp4
another one          $python $out/lora/inference.py "a prompt" video.mp4
END
