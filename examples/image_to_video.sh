#!/usr/bin/env bash
# The demo for image-to-video: encodes clips of a cartoon rabbit and their first frames, and trains a LoRA.
# The optional argument is the model folder, which examples/train_tiny_image_to_video.py makes.
source "$(dirname "$0")/rabbit.sh"
model=${1:-runs/tiny-i2v/model}
[[ -d $model ]] || { echo "$model: no such folder; make it with $(printf %q "$python") examples/train_tiny_image_to_video.py" >&2; exit 1; }

# Each sample starts at the beginning of its clip, because the pictures below show the first frame.
encode "$model" "$out/i2v-tensors" --frame_selection head
for clip in clips/videos/rabbit_stands unseen/videos/rabbit_yawns; do
    picture=$out/$(basename "$clip").png
    [[ -f $picture ]] || "$python" examples/first_frame.py "$out/$clip.mp4" "$picture" --size 64x96
done

"$python" training/cogvideox_image_to_video_lora.py --pretrained_model_name_or_path "$model" \
    --data_root "$out/i2v-tensors" --load_tensors --output_dir "$out/i2v-lora" --train_resolution 9x64x96 \
    --rank 32 --lora_alpha 32 --target_modules to_q to_k to_v to_out.0 ff.net.0.proj ff.net.2 \
    --train_batch_size 3 --max_train_steps 600 --checkpointing_steps 100 --checkpoints_total_limit 1 \
    --optimizer adamw --learning_rate 2e-3 --lr_scheduler cosine --lr_warmup_steps 10 \
    --validation_prompt "$prompt:::$other" --validation_images "$out/rabbit_stands.png:::$out/rabbit_yawns.png" \
    --num_inference_steps 20 --guidance_scale 2

results "$out/i2v-lora"
cat <<END
the LoRA             $out/i2v-lora/pytorch_lora_weights.safetensors
another video        $(quoted "$python" "$out/i2v-lora/inference.py") "$other" $(quoted "$out/rabbit_yawns.png") video.mp4
END
