r"""Trains an image-to-video LoRA for CogVideoX on a folder of clips and captions.

    python training/cogvideox_image_to_video_lora.py \
        --pretrained_model_name_or_path THUDM/CogVideoX-5b-I2V --data_root my-clips --id_token MYSTYLE \
        --train_resolution 49x480x720 --video_reshape_mode center --preset style --mixed_precision bf16 \
        --validation_prompt "MYSTYLE a lighthouse in a storm" --validation_images lighthouse.png --output_dir my-lora

Clips, their first frames and captions are encoded once, before training. If prepare_dataset.py has encoded them, give
its output folder as --data_root, and --load_tensors. The run chooses a plan that fits into the memory of the GPU;
--dry_run says what the run will need. The result loads with CogVideoXImageToVideoPipeline.load_lora_weights;
inference.py in the output folder makes videos with it. The same command continues a stopped run.
"""

from cogvideox.checks import TRAINING_CHECKS as CHECKS
from cogvideox.config import args
from cogvideox.config.options import ImageLoraOptions


def main(options: ImageLoraOptions) -> int:
    """Trains, and returns the exit status. A signal ends the run early with everything saved and with status 75."""
    from cogvideox.loop import fine_tune
    from cogvideox.model.methods import Lora
    from cogvideox.model.tasks import ImageToVideo

    return fine_tune(options, ImageToVideo, Lora)


if __name__ == "__main__":
    args.run_script(main, ImageLoraOptions, __doc__, CHECKS)
