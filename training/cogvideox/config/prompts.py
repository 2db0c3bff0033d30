"""Reads the validation prompts and their images from the command line or from files with one per line."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from shlex import quote

from cogvideox.config.flags import ValidationFlags
from cogvideox.config.options import TrainOptions, image_flags, is_url, separated


def prompts_of(flags: ValidationFlags) -> list[str]:
    """Returns the validation prompts; the list is empty with --do_validation false."""
    if flags.do_validation is False:
        return []
    if flags.validation_prompts:
        return lines_of(list_file(flags))
    return separated(flags.validation_prompt, flags.validation_prompt_separator)


def images_of(options: TrainOptions) -> list[str]:
    """Returns the images of the validation prompts as paths or URLs.

    The list is empty for text-to-video and with --do_validation false. With --validation_dir, --validation_images names
    a file in that folder, whose lines are URLs or paths relative to the file.
    """
    image, flags = image_flags(options), options.validation
    if image is None or image.validation_images is None or flags.do_validation is False:
        return []
    if not flags.validation_dir:
        return separated(image.validation_images, flags.validation_prompt_separator)
    file = Path(flags.validation_dir, image.validation_images)
    return [line if is_url(line) else str(file.parent / line) for line in lines_of(file)]


def lines_of(file: Path) -> list[str]:
    """Returns the lines of a text file that are not empty."""
    return separated(file.read_text(encoding="utf-8-sig"), "\n")


def list_file(flags: ValidationFlags) -> Path:
    """Returns the path of the file of --validation_prompts."""
    return Path(flags.validation_dir or "", flags.validation_prompts or "")


def check_prompts(options: TrainOptions) -> Iterator[str]:
    """Yields problems of the file of --validation_prompts, and a file in place of a prompt, for args.parse."""
    flags = options.validation
    text = flags.validation_prompt or ""
    if text.endswith(".txt") and os.path.isfile(text):
        yield f"--validation_prompt {text}: is a file; to read its prompts, give --validation_prompts {quote(text)}"
    if not flags.validation_prompts or flags.do_validation is False:
        return
    try:
        problem = None if prompts_of(flags) else "has no prompt"
    except OSError as error:
        problem = error.strerror
    except UnicodeDecodeError:
        problem = "is not UTF-8"
    if problem:
        yield f"--validation_prompts {list_file(flags)}: {problem}; give a text file with one prompt per line"
    elif flags.validation_dir:
        yield from link_problems(Path(flags.validation_dir), list_file(flags), options.data.allow_path)


def link_problems(folder: Path, file: Path, allowed: Sequence[str]) -> Iterator[str]:
    """Yields a problem if a file is a link out of its folder, because that folder may come from somebody else.

    Args:
        folder: The folder, for --validation_dir.
        file: A file that is named as if it were in the folder.
        allowed: The folders of --allow_path, to which links may lead.
    """
    real = Path(os.path.realpath(file))
    inside = Path(os.path.normpath(file)).is_relative_to(os.path.normpath(folder))
    if inside and not any(real.is_relative_to(os.path.realpath(place)) for place in (str(folder), *allowed)):
        fix = f"move it there or pass --allow_path {quote(str(real.parent))}"
        yield f"{file}: leads outside --validation_dir, to {real}; {fix}"
