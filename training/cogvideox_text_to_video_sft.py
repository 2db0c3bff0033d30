r"""Trains all weights of a CogVideoX transformer on a folder of clips and captions.

    python training/cogvideox_text_to_video_sft.py \
        --pretrained_model_name_or_path THUDM/CogVideoX-2b --data_root my-clips --output_dir my-model \
        --train_resolution 49x480x720 --video_reshape_mode center --mixed_precision bf16 \
        --train_batch_size 1 --max_train_steps 20000 --learning_rate 1e-5

Clips and captions are encoded once, before training. If prepare_dataset.py has encoded them, give its output folder as
--data_root, and --load_tensors. The run chooses a plan that fits into the memory of the GPU; --dry_run says what the
run will need. The result, a folder named transformer, loads with CogVideoXTransformer3DModel.from_pretrained;
inference.py in the output folder makes videos with it. The same command continues a stopped run.
"""

from cogvideox.checks import TRAINING_CHECKS as CHECKS
from cogvideox.config import args
from cogvideox.config.options import SftOptions


def main(options: SftOptions) -> int:
    """Trains, and returns the exit status. A signal ends the run early with everything saved and with status 75."""
    from cogvideox.loop import fine_tune
    from cogvideox.model.methods import FullFinetune
    from cogvideox.model.tasks import TextToVideo

    return fine_tune(options, TextToVideo, FullFinetune)


if __name__ == "__main__":
    args.run_script(main, SftOptions, __doc__, CHECKS)
