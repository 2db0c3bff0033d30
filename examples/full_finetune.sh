#!/usr/bin/env bash
# The demo with all weights instead of a LoRA: encodes clips of a cartoon rabbit and trains the transformer on them.
source "$(dirname "$0")/rabbit.sh"
model=examples/model

encode "$model" "$out/tensors"

"$python" training/cogvideox_text_to_video_sft.py --pretrained_model_name_or_path "$model" \
    --data_root "$out/tensors" --load_tensors --output_dir "$out/sft" --train_resolution 9x64x96 \
    --train_batch_size 3 --max_train_steps 600 --checkpointing_steps 100 --checkpoints_total_limit 1 \
    --optimizer adamw --learning_rate 3e-4 --lr_scheduler cosine --lr_warmup_steps 10 \
    --validation_prompt "$prompt:::$other" --num_inference_steps 20 --guidance_scale 2

results "$out/sft"
cat <<END
the transformer      $out/sft/transformer
another video        $(quoted "$python" "$out/sft/inference.py") "BUNNY a grey rabbit in a meadow" video.mp4
END
