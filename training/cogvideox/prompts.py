"""The validation prompts: of the command line, or of a file with one a line."""

from collections.abc import Iterator
from pathlib import Path

from cogvideox.args import TrainOptions, ValidationFlags


def prompts_of(flags: ValidationFlags) -> list[str]:
    """The validation prompts, one by one; none with --do_validation false."""
    if flags.do_validation is False:
        return []
    if flags.validation_prompts:
        texts = list_file(flags).read_text(encoding="utf-8-sig").splitlines()
    else:
        texts = (flags.validation_prompt or "").split(flags.validation_prompt_separator)
    return [text.strip() for text in texts if text.strip()]


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
