r"""Finds the cuts in the clips of a folder, and writes a table in which each scene is a clip.

    python training/split_scenes.py --data_root my-clips --table my-clips-scenes.csv
    python training/prepare_dataset.py --model_id THUDM/CogVideoX-5b --data_root my-clips \
        --dataset_file my-clips-scenes.csv --output_dir my-tensors --dry_run

The folder may have any form. Videos are not encoded again: a scene is a row with the path of its file, and its start
and end in seconds. Clips without cuts, images, clips that already are sections, and clips with a first frame of their
own have one row each. A picture next to the table shows the frames before and after each cut.

The table can be edited in a spreadsheet or a text editor. The same command never changes rows that are there, and adds
only the files that it has not handled yet. So it also continues an interrupted run, and rows that were deleted stay
deleted. To start again, delete the table.
"""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from cogvideox.config import args
from cogvideox.config.options import SceneOptions


def check_splitting(options: SceneOptions) -> Iterator[str]:
    """Yields the problems of the packages and of the table."""
    if importlib.util.find_spec("scenedetect") is None:
        yield "split_scenes.py needs PySceneDetect; install it with: pip install scenedetect-headless"
    given = options.data.dataset_file
    table = os.path.abspath(options.scenes.table or "")
    if given is not None and table == os.path.abspath(given):
        yield f"--table {options.scenes.table}: is --dataset_file, the data set itself; name another file"
    from cogvideox.preparation.scenes.cut_sheet import foreign_sheets

    yield from foreign_sheets(Path(table))


CHECKS = (check_splitting,)


def main(options: SceneOptions) -> int:
    """Writes the table and the picture of its cuts."""
    from cogvideox.data.forms.scene_table import clips_of
    from cogvideox.data.forms.unused import Unused
    from cogvideox.preparation.scenes.splitting import SceneSplitter
    from cogvideox.preparation.unusable import unused_notes

    splitter, unused = SceneSplitter(options), Unused()
    splitter.run(clips_of(options.data, unused))
    print(*unused_notes(unused), *splitter.report(), sep="\n")
    return 0


if __name__ == "__main__":
    args.run_script(main, SceneOptions, __doc__, CHECKS)
