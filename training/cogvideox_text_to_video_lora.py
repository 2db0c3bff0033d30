r"""Trains a text-to-video LoRA for CogVideoX on a folder of clips and captions.

    python training/cogvideox_text_to_video_lora.py \
        --pretrained_model_name_or_path THUDM/CogVideoX-5b --data_root my-clips --id_token MYSTYLE \
        --train_resolution 49x480x720 --video_reshape_mode center --preset style --mixed_precision bf16 \
        --validation_prompt "MYSTYLE a lighthouse in a storm" --output_dir my-lora

Clips and captions are encoded once, before training. If prepare_dataset.py has encoded them, give its output folder as
--data_root, and --load_tensors. The run chooses a plan that fits into the memory of the GPU; --dry_run says what the
run will need. The result loads with CogVideoXPipeline.load_lora_weights; inference.py in the output folder makes videos
with it. The same command continues a stopped run.
"""

from cogvideox.checks import TRAINING_CHECKS as CHECKS
from cogvideox.config import args
from cogvideox.config.options import LoraOptions


def main(options: LoraOptions) -> int:
    """Trains, and returns the exit status. A signal ends the run early with everything saved and with status 75."""
    from cogvideox.loop import fine_tune
    from cogvideox.model.methods import Lora
    from cogvideox.model.tasks import TextToVideo

    return fine_tune(options, TextToVideo, Lora)


if __name__ == "__main__":
    args.run_script(main, LoraOptions, __doc__, CHECKS)
