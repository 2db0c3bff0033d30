r"""Encodes a folder of clips and captions once, so that training needs neither the VAE nor T5.

    python training/prepare_dataset.py --model_id THUDM/CogVideoX-5b --data_root my-clips --output_dir my-tensors \
        --id_token MYSTYLE --train_resolution 49x480x720 --video_reshape_mode center

Before that, --suggest_buckets 4 prints a value of --train_resolution that suits the clips, and --dry_run prints what
would be encoded; neither needs captions. report.html in the output folder shows the clips, and those that look odd
first. Then train with --data_root my-tensors --load_tensors.

The same command continues an interrupted preparation, encodes clips and captions that have changed, and otherwise does
nothing. --save_image_latents adds what image-to-video needs. --verify lists damaged or outdated tensors, and --repair
encodes them again.

On several GPUs or machines, start the script with accelerate launch or torchrun, or start it as often as you like, for
example as a SLURM job array, always with the same flags and the same folder, which all machines must share. All
processes divide the work as they go. Each may be killed, and started again by itself.
"""

import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from cogvideox.config import args
from cogvideox.config.flags import FirstFrameFlags
from cogvideox.config.geometry import check_preparation, read_geometry
from cogvideox.config.launch import adopt_tasks
from cogvideox.config.options import PrepareOptions, launched_processes, needs_captions
from cogvideox.data.forms.samples import check_data_roots
from cogvideox.data.media.pixels.decord_reader import check_reader
from cogvideox.errors import UsageError, plural
from cogvideox.files import what_is_safe


def check_folder(options: PrepareOptions) -> Iterator[str]:
    """Yields the files of other programs in --output_dir that would be replaced."""
    from cogvideox.data.cache import foreign_files

    return foreign_files("--output_dir", Path(options.prepare.output_dir))


CHECKS = (check_preparation, check_folder, check_data_roots, check_reader)


def main(options: PrepareOptions) -> int:
    """Prepares the data set, and returns the exit status."""
    from cogvideox.runtime.ranks import lost_ranks_reported

    folder, safe = Path(options.prepare.output_dir), "the tensors encoded so far are safe"
    lost = lost_ranks_reported(lambda: f"{safe}; the same command encodes the others")
    with what_is_safe(folder, lambda: safe), lost:
        return prepare_into(folder, options)


def prepare_into(folder: Path, options: PrepareOptions) -> int:
    """Plans which tensors to make, then verifies or encodes them, and returns the exit status."""
    from cogvideox.data.cache import publishing
    from cogvideox.preparation.prepare import Preparation
    from cogvideox.preparation.report import describe, prepare_and_report, suggest
    from cogvideox.preparation.verify import check_flags, find_faults, repair
    from cogvideox.runtime.ranks import Ranks, start_processes, unconnected

    prepare = options.prepare
    if prepare.verify or prepare.repair:  # the ranks gather the faults that they have found
        check_connection("--verify" if prepare.verify else "--repair")
        ranks = Ranks(start_processes(), prepare.nccl_timeout)
        ranks.check_shared(folder, "--output_dir")
    else:
        ranks = unconnected(prepare.nccl_timeout)
    geometry = read_geometry(options.model)
    with_images = geometry.image_to_video if prepare.save_image_latents is None else prepare.save_image_latents
    image_variants = options.first_frames.num_image_noise_variants if with_images else 0
    for line in images_without_effect(options) if ranks.is_main_process and not with_images else ():
        print(line, file=sys.stderr)
    preparation = Preparation(
        options.model,
        options.data,
        options.encode,
        geometry,
        folder,
        ranks,
        image_variants,
        needs_captions(options),
    )
    if prepare.suggest_buckets:
        suggest(preparation, prepare.suggest_buckets)
        return 0
    if prepare.verify or prepare.repair:
        check_flags(preparation)
        records = preparation.plan()
        faults = ranks.gather(find_faults(preparation, records))
        ranks.print(*(fault.text for fault in faults), f"faults: {len(faults)}")
        if prepare.verify:
            return 1 if faults else 0
        repair(preparation, faults, records)
    if prepare.dry_run:
        with preparation.workers_kept():
            records = preparation.plan()
            with publishing(folder, ranks.print):
                ranks.print(describe(preparation, records, costs=True))
        preparation.check(records)
        return 0
    index = prepare_and_report(preparation, ranks.print, prepare.batch_size)
    given = shlex.quote(str(folder))
    ranks.print(f"{plural(len(index.samples), 'sample')} in {folder}; train with --data_root {given} --load_tensors")
    return 0


def check_connection(flag: str) -> None:
    """Raises UsageError if srun has started several processes, which cannot connect without an address."""
    if launched_processes() > 1 and "MASTER_ADDR" not in os.environ and "SLURM_PROCID" in os.environ:
        rule = "its processes must be connected, which srun does not do"
        raise UsageError(f"{flag}: {rule}; start one task, such as with srun --ntasks 1, or use torchrun")


def images_without_effect(options: PrepareOptions) -> Iterator[str]:
    """Yields a line for each flag about first frames that is given, if these are not encoded."""
    given = {
        "image_column": options.data.image_column is not None,
        "num_image_noise_variants": options.first_frames != FirstFrameFlags(),
    }
    rule = "no first frames are encoded; give --save_image_latents if they are for an image-to-video model"
    yield from (f"--{name}: has no effect; {rule}" for name, is_given in given.items() if is_given)


if __name__ == "__main__":
    adopt_tasks()
    args.run_script(main, PrepareOptions, __doc__, CHECKS)
