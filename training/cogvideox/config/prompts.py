"""The validation prompts and their images: of the command line, or of files with one a line."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from shlex import quote

from cogvideox.config.flags import ValidationFlags
from cogvideox.config.options import TrainOptions, image_flags, is_url, separated


def prompts_of(flags: ValidationFlags) -> list[str]:
    """The validation prompts, one by one; none with --do_validation false."""
    if flags.do_validation is False:
        return []
    if flags.validation_prompts:
        return lines_of(list_file(flags))
    return separated(flags.validation_prompt, flags.validation_prompt_separator)


def images_of(options: TrainOptions) -> list[str]:
    """The images of the validation prompts, paths or URLs; none for text-to-video, nor with --do_validation false.

    With --validation_dir they are the lines of a file in it, relative to that file.
    """
    image, flags = image_flags(options), options.validation
    if image is None or image.validation_images is None or flags.do_validation is False:
        return []
    if not flags.validation_dir:
        return separated(image.validation_images, flags.validation_prompt_separator)
    file = Path(flags.validation_dir, image.validation_images)
    return [line if is_url(line) else str(file.parent / line) for line in lines_of(file)]


def lines_of(file: Path) -> list[str]:
    """The lines of a text file that hold something."""
    return separated(file.read_text(encoding="utf-8-sig"), "\n")


def list_file(flags: ValidationFlags) -> Path:
    """The file of --validation_prompts."""
    return Path(flags.validation_dir or "", flags.validation_prompts or "")


def check_prompts(options: TrainOptions) -> Iterator[str]:
    """Problems of the file of prompts."""
    flags = options.validation
    if not flags.validation_prompts or flags.do_validation is False:
        return
    try:
        problem = None if prompts_of(flags) else "holds no prompt"
    except OSError as error:
        problem = error.strerror
    except UnicodeDecodeError:
        problem = "is no UTF-8"
    if problem:
        yield f"--validation_prompts {list_file(flags)}: {problem}; give a file with a prompt a line"
    elif flags.validation_dir:
        yield from link_problems(Path(flags.validation_dir), list_file(flags), options.data.allow_path)


def link_problems(folder: Path, file: Path, allowed: Sequence[str]) -> Iterator[str]:
    """A list in a folder that is a link out of it: somebody else's folder must not choose which file is read."""
    real = Path(os.path.realpath(file))
    inside = Path(os.path.normpath(file)).is_relative_to(os.path.normpath(folder))
    if inside and not any(real.is_relative_to(os.path.realpath(place)) for place in (str(folder), *allowed)):
        fix = f"move it there or pass --allow_path {quote(str(real.parent))}"
        yield f"{file}: leads outside --validation_dir, to {real}; {fix}"
