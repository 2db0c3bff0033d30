r"""Encodes a folder of clips and captions once, so that training needs neither the VAE nor T5.

    python training/prepare_dataset.py --model_id THUDM/CogVideoX-5b --data_root video-dataset --output_dir prepared \
        --height_buckets 480 --width_buckets 720 --frame_buckets 49

Train with --data_root prepared --load_tensors. The same command again does nothing; an interrupted one goes on; edited
clips and captions are seen. On several GPUs: accelerate launch --multi_gpu, one share a GPU.
"""

from cogvideox import args
from cogvideox.data.index import check_data
from cogvideox.geometry import check_text_to_video, read_geometry

CHECKS = (check_text_to_video, check_data)


def main(options: args.PrepareOptions) -> int:
    """Returns the exit status."""
    from pathlib import Path

    from accelerate import PartialState

    from cogvideox.prepare import Preparation, check_bad
    from cogvideox.ranks import Ranks

    state = PartialState()
    ranks = Ranks(state)
    folder = Path(options.prepare.output_dir)
    geometry = read_geometry(options.model)
    preparation = Preparation(options.model, options.data, options.encode, geometry, folder, ranks)
    records = preparation.plan()
    if options.prepare.dry_run:
        state.print(preparation.report(records))
        return 0
    check_bad(records, options.data.max_bad_fraction)
    preparation.encode(records, options.prepare.batch_size)
    state.print(preparation.report(records, with_bytes=True))
    return 0


if __name__ == "__main__":
    args.run_script(main, args.PrepareOptions, __doc__, CHECKS)
