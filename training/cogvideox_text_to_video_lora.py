r"""Trains a text-to-video LoRA for CogVideoX on a folder of clips and captions.

    python training/cogvideox_text_to_video_lora.py \
        --pretrained_model_name_or_path THUDM/CogVideoX-5b --data_root video-dataset --id_token BW_STYLE \
        --height_buckets 480 --width_buckets 720 --frame_buckets 49 --rank 128 --lora_alpha 128 --mixed_precision bf16 \
        --train_batch_size 1 --max_train_steps 3000 --gradient_checkpointing --output_dir my-lora

Clips and captions are encoded once, before training (or by prepare_dataset.py; then use --load_tensors). The result
loads with CogVideoXPipeline.load_lora_weights; the exported inference.py shows how. The same command continues a
stopped run.
"""

from cogvideox.checks import TRAINING_CHECKS
from cogvideox.config import args
from cogvideox.config.geometry import check_text_to_video
from cogvideox.config.options import LoraOptions

CHECKS = (check_text_to_video, *TRAINING_CHECKS)


def main(options: LoraOptions) -> int:
    """Trains, and returns the exit status. A signal ends the run early with everything saved and with status 75."""
    from cogvideox.loop import fine_tune
    from cogvideox.model.methods import Lora
    from cogvideox.model.tasks import TextToVideo

    return fine_tune(options, TextToVideo, Lora)


if __name__ == "__main__":
    args.run_script(main, LoraOptions, __doc__, CHECKS)
