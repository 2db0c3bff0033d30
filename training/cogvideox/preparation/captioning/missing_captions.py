"""Writes the missing captions of a data set: frames of a clip -> a vision-language model -> the place of the caption.

``Captioning`` does this for all clips. Worker processes decode frames while threads wait for the model. Captions are
written in the order of the clips, as soon as they arrive, so that the same command continues an interrupted run.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from cogvideox import stopping
from cogvideox.config.flags import CaptionFlags
from cogvideox.data.forms.uncaptioned import Uncaptioned
from cogvideox.data.media.pixels.stills import Stills, stills_of
from cogvideox.data.media.workers import Killed, Limits, Workers
from cogvideox.errors import UsageError, first_of, one_line, plural
from cogvideox.preparation.captioning.vision_server import Answer, ClipUnreadable, Request
from cogvideox.preparation.captions import tokens_of

MOST_REFUSED = 3  # clips that the model may refuse one after the other before the script ends
Decoded = tuple[Uncaptioned, Stills | str | Killed]  # a clip, and its frames or why it has none


class VisionModel(Protocol):
    """Describes clips.

    Attributes:
        threads: Number of threads that may call ``describe`` at the same time.
        batch_size: Number of clips that one call should get.
    """

    threads: int
    batch_size: int

    def describe(self, requests: Sequence[Request]) -> list[Answer]:
        """Returns for each clip its caption, or why there is none.

        Raises:
            UsageError: The model cannot be used for any clip.
        """


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
                    if not isinstance(answer, ClipUnreadable):
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
        self.say(f"{clip.name}: {plural(tokens.count, 'token')}{note}: {' '.join(caption.split())}")

    def _answers(self, clips: Sequence[Uncaptioned]) -> Iterator[tuple[Uncaptioned, Answer]]:
        """Yields each clip with its caption, or with why it has none, in the order of the clips."""
        number, size = self.flags.caption_frames, self.flags.caption_size
        jobs = ((clip, (stills_of, clip.video, number, size, clip.section)) for clip in clips)
        asked: deque[Future[list[tuple[Uncaptioned, Answer]]]] = deque()
        pool = ThreadPoolExecutor(self.model.threads)
        try:
            with Workers(1, self.limits) as workers:
                decoded = workers.run_keyed(jobs)
                while batch := list(islice(decoded, self.model.batch_size)):
                    asked.append(pool.submit(self._ask, batch))
                    if len(asked) == self.model.threads:
                        yield from asked.popleft().result()
                while asked:
                    yield from asked.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, batch: Sequence[Decoded]) -> list[tuple[Uncaptioned, Answer]]:
        """Returns each clip of a batch with its caption, or with why it has none."""
        template = self.flags.caption_prompt
        read = [(clip, found) for clip, found in batch if isinstance(found, Stills)]
        requests = [(stills, instruction_for(clip.video, stills, template)) for clip, stills in read]
        answers = iter(self.model.describe(requests) if requests else [])
        return [(clip, next(answers) if isinstance(found, Stills) else refusal(clip, found)) for clip, found in batch]

    def report(self, present: int) -> list[str]:
        """Returns the lines at the end; ``present`` is the number of clips that had a caption before."""
        unchanged = "was there and is unchanged", "were there and are unchanged"
        lines = [f"{plural(self.written, 'caption')} written; {plural(present, *unchanged)}"]
        if self.cut:
            rule = f"{plural(self.cut, 'caption has', 'captions have')} more than the {self.length} tokens of T5"
            lines.append(f"{rule}; shorten them, or delete them and ask for fewer words in --caption_prompt")
        if self.failed:
            lines += [f"{plural(len(self.failed), 'clip has', 'clips have')} no caption:", *first_of(self.failed)]
        return lines


def refusal(clip: Uncaptioned, found: str | Killed) -> ClipUnreadable:
    """Returns why a clip has no frames."""
    return ClipUnreadable(found.reason if isinstance(found, Killed) else found.removeprefix(f"{clip.video}: "))


def instruction_for(video: str, stills: Stills, template: str) -> str:
    """Returns the instruction for one clip: the template with its placeholders filled in."""
    folder, name = os.path.split(video)
    values = {"frames": len(stills.jpegs), "seconds": f"{stills.duration:.1f}"}
    values |= {"file": os.path.splitext(name)[0], "folder": os.path.basename(folder)}
    for placeholder, value in values.items():
        template = template.replace(f"{{{placeholder}}}", str(value))
    return template
