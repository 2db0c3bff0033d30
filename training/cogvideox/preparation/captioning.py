"""Writes the missing captions of a data set: frames of a clip -> a vision-language model -> the place of the caption.

``Captioning`` does this for all clips. Worker processes decode frames while threads wait for the model. Captions are
written in the order of the clips, as soon as they arrive, so that the same command continues an interrupted run.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from cogvideox import stopping
from cogvideox.config.flags import CaptionFlags
from cogvideox.data.forms.uncaptioned import Uncaptioned
from cogvideox.data.media.stills import Stills, stills_of
from cogvideox.data.media.workers import Killed, Limits, Workers
from cogvideox.errors import UsageError, first_of, one_line
from cogvideox.preparation.captions import plural, tokens_of
from cogvideox.preparation.vision_server import ClipRefused

MOST_REFUSED = 3  # clips that the model may refuse one after the other before the script ends
Answer = str | ClipRefused


class VisionModel(Protocol):
    """Describes clips."""

    def describe(self, stills: Stills, instruction: str) -> str:
        """Returns the caption of a clip; raises ClipRefused if there is none for it."""


@dataclass
class Captioning:
    """Captions clips, and counts them.

    Attributes:
        model: The model that describes clips.
        flags: The flags of captions.
        limits: Time and memory that decoding the frames of one clip may use.
        tokenizer: The tokenizer of T5.
        length: Number of tokens that T5 reads.
        say: Prints a line.
        written: Number of captions that were written.
        failed: A line for each clip without a caption.
        cut: Number of captions that T5 cuts off.
    """

    model: VisionModel
    flags: CaptionFlags
    limits: Limits
    tokenizer: Any
    length: int
    say: Callable[[str], None] = print
    written: int = field(default=0, init=False)
    failed: list[str] = field(default_factory=list, init=False)
    cut: int = field(default=0, init=False)

    def run(self, clips: Sequence[Uncaptioned]) -> None:
        """Captions the clips. What is captioned is written, also if this is interrupted.

        Raises:
            UsageError: The model cannot be used, or refuses several clips one after the other.
        """
        refused: list[str] = []
        try:
            for clip, answer in self._answers(clips[: self.flags.max_captions]):
                if isinstance(answer, str):
                    self._write(clip, answer)
                    refused.clear()
                else:
                    line = one_line(f"{clip.name}: {answer}")
                    self.failed.append(line)
                    self.say(line)
                    refused.append(line)
                if len(refused) == MOST_REFUSED:
                    raise UsageError([f"{MOST_REFUSED} clips in a row got no caption:", *refused])
                stopping.unit("caption")
        finally:
            for store in {id(clip.store): clip.store for clip in clips}.values():
                store.flush()

    def _write(self, clip: Uncaptioned, caption: str) -> None:
        clip.write(caption)
        self.written += 1
        (tokens,) = tokens_of(self.tokenizer, [caption], self.length)
        self.cut += tokens.count > self.length
        note = f", of which T5 reads {self.length}" if tokens.count > self.length else ""
        self.say(f"{clip.name}: {tokens.count} tokens{note}: {' '.join(caption.split())}")

    def _answers(self, clips: Sequence[Uncaptioned]) -> Iterator[tuple[Uncaptioned, Answer]]:
        """Yields each clip with its caption, or with why it has none, in the order of the clips."""
        number, size = self.flags.caption_frames, self.flags.caption_size
        jobs = ((stills_of, clip.video, number, size, clip.section) for clip in clips)
        asked: deque[tuple[Uncaptioned, Future[Answer]]] = deque()
        pool = ThreadPoolExecutor(self.flags.concurrency)
        try:
            with Workers(1, self.limits) as workers:
                for clip, stills in zip(clips, workers.run(jobs), strict=True):
                    asked.append((clip, pool.submit(self._ask, clip, stills)))
                    if len(asked) == self.flags.concurrency:
                        yield _result(*asked.popleft())
                while asked:
                    yield _result(*asked.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, clip: Uncaptioned, stills: Stills | str | Killed) -> Answer:
        if not isinstance(stills, Stills):
            return ClipRefused(stills.reason if isinstance(stills, Killed) else stills.removeprefix(f"{clip.video}: "))
        try:
            return self.model.describe(stills, instruction_for(clip.video, stills, self.flags.caption_prompt))
        except ClipRefused as error:
            return error

    def report(self, present: int) -> list[str]:
        """Returns the lines at the end; ``present`` is the number of clips that had a caption before."""
        lines = [f"{plural(self.written, 'caption', 'captions')} written; {present} were there and are unchanged"]
        if self.cut:
            rule = f"{plural(self.cut, 'caption has', 'captions have')} more than the {self.length} tokens of T5"
            lines.append(f"{rule}; shorten them, or delete them and ask for fewer words in --caption_prompt")
        if self.failed:
            lines += [f"{plural(len(self.failed), 'clip has', 'clips have')} no caption:", *first_of(self.failed)]
        return lines


def _result(clip: Uncaptioned, answer: "Future[Answer]") -> tuple[Uncaptioned, Answer]:
    return clip, answer.result()


def instruction_for(video: str, stills: Stills, template: str) -> str:
    """Returns the instruction for one clip: the template with its placeholders filled in."""
    folder, name = os.path.split(video)
    values = {"frames": len(stills.jpegs), "seconds": f"{stills.duration:.1f}"}
    values |= {"file": os.path.splitext(name)[0], "folder": os.path.basename(folder)}
    for placeholder, value in values.items():
        template = template.replace(f"{{{placeholder}}}", str(value))
    return template
