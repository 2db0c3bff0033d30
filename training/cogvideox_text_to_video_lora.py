r"""Trains a text-to-video LoRA for CogVideoX on a folder of clips and captions.

    accelerate launch --config_file accelerate_configs/uncompiled_1.yaml training/cogvideox_text_to_video_lora.py \
        --pretrained_model_name_or_path THUDM/CogVideoX-5b --data_root video-dataset --id_token BW_STYLE \
        --height_buckets 480 --width_buckets 720 --frame_buckets 49 --rank 128 --lora_alpha 128 --mixed_precision bf16 \
        --train_batch_size 1 --max_train_steps 3000 --gradient_checkpointing --output_dir my-lora

Clips and captions are encoded first, once (or beforehand: prepare_dataset.py and --load_tensors). The result loads with
CogVideoXPipeline.load_lora_weights; inference.py beside it shows how. The same command goes on where a run was stopped.
"""

from cogvideox import args
from cogvideox.data.decord_reader import check_reader
from cogvideox.data.index import check_data
from cogvideox.factory import check_tensors
from cogvideox.geometry import check_text_to_video

CHECKS = (check_text_to_video, check_data, check_reader, check_tensors, args.check_trackers)


def main(options: args.LoraOptions) -> int:
    """Returns the exit status: 0, or 75 where a signal ended the run early with everything saved."""
    from cogvideox.loop import Trainer
    from cogvideox.methods import Lora
    from cogvideox.models import load_transformer
    from cogvideox.run import start_run
    from cogvideox.tasks import TextToVideo
    from cogvideox.tensors import open_tensors
    from cogvideox.validation import embed_prompts

    run = start_run(options)
    tensors = open_tensors(run, options)
    prompts = embed_prompts(run, options, tensors)
    transformer = load_transformer(options.model, run.dtype).to(run.device)
    method = Lora(transformer, options.lora, options.data.seed)
    task = TextToVideo(tensors.geometry, run.device, run.dtype)
    trainer = Trainer(run, options, tensors, prompts, task, method)
    return trainer.finish(trainer.train())


if __name__ == "__main__":
    args.run_script(main, args.LoraOptions, __doc__, CHECKS)
