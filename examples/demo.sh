#!/usr/bin/env bash
# A small version of the usual task: encodes clips of a cartoon rabbit, trains a text-to-video LoRA on them, and makes a
# video with stock diffusers. The model is the tiny CogVideoX in examples/model, which was only trained on shapes.
source "$(dirname "$0")/rabbit.sh"
model=examples/model

encode "$model" "$out/tensors"

"$python" training/cogvideox_text_to_video_lora.py --pretrained_model_name_or_path "$model" \
    --data_root "$out/tensors" --load_tensors --output_dir "$out/lora" --train_resolution 9x64x96 \
    --rank 32 --lora_alpha 32 --target_modules to_q to_k to_v to_out.0 ff.net.0.proj ff.net.2 \
    --train_batch_size 3 --max_train_steps 600 --checkpointing_steps 100 --checkpoints_total_limit 1 \
    --optimizer adamw --learning_rate 2e-3 --lr_scheduler cosine --lr_warmup_steps 10 \
    --validation_prompt "$prompt:::$other" --num_inference_steps 20 --guidance_scale 2

[[ -f $out/sample.mp4 ]] || "$python" "$out/lora/inference.py" "$other" "$out/sample.mp4"

results "$out/lora"
cat <<END
the LoRA             $out/lora/pytorch_lora_weights.safetensors
a video with it      $out/sample.mp4
another one          $(quoted "$python" "$out/lora/inference.py") "BUNNY a grey rabbit in a meadow" video.mp4
END
