"""Runs a vision-language model in this process, with transformers.

``LocalVisionModel`` has the same methods as ``VisionServer``. It describes --concurrency clips as one batch; a server
that starts a new clip as soon as one is finished is faster for a large data set.
"""

import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from cogvideox.config.flags import CaptionFlags
from cogvideox.data.media.pixels.stills import Stills
from cogvideox.errors import UsageError, first_line
from cogvideox.preparation.captioning.vision_server import Answer, ClipRefused, Request, caption_in, message_parts

SMALLER = "lower --caption_frames or --caption_size, or choose a smaller --caption_model"


class LocalVisionModel:
    """A vision-language model on the GPU, or on the CPU where there is none.

    Attributes:
        threads: Number of threads that may call ``describe``.
        batch_size: Number of clips of one call.
    """

    def __init__(self, flags: CaptionFlags, cache_dir: str | None = None) -> None:
        """Prepares the model, which ``connect`` loads.

        Args:
            flags: The flags of captions.
            cache_dir: The folder for files downloaded from the hub; None for the usual one.
        """
        self.threads, self.batch_size = 1, flags.concurrency
        self._flags, self._cache_dir = flags, cache_dir
        self._model: Any = None
        self._processor: Any = None

    def connect(self) -> None:
        """Loads the model and its processor.

        Raises:
            UsageError: The files are missing, are not those of a vision-language model, or are too large for the GPU.
        """
        from huggingface_hub.errors import HTTPError
        from transformers import AutoModelForImageTextToText, AutoProcessor

        name, given = self._flags.caption_model, {"cache_dir": self._cache_dir, "trust_remote_code": False}
        try:
            self._processor = AutoProcessor.from_pretrained(name, **given)
            # Only safetensors, because other weight files can run code when they are loaded.
            model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", use_safetensors=True, **given)
        except (HTTPError, OSError, ValueError, KeyError, ImportError) as error:
            fix = "give the hub id or the folder of a vision-language model, such as Qwen/Qwen2.5-VL-3B-Instruct"
            raise UsageError(f"--caption_model {name}: cannot be loaded ({first_line(error)}); {fix}") from None
        if not getattr(self._processor, "chat_template", None):
            fix = "give one whose name ends in Instruct, or a server with --endpoint"
            raise UsageError(f"--caption_model {name}: has no chat template, so it does not follow instructions; {fix}")
        # Each answer continues the end of its row, so rows are padded at their start. Attention ignores the padding.
        tokenizer = self._processor.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        try:
            self._model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        except torch.OutOfMemoryError:
            fix = "choose a smaller one, or a server with --endpoint"
            raise UsageError(f"--caption_model {name}: does not fit on the GPU; {fix}") from None

    def describe(self, requests: Sequence[Request]) -> list[Answer]:
        """Returns the answers for a batch of clips; see ``VisionModel.describe``. Only one thread may call this.

        Raises:
            UsageError: The GPU has no room for the batch.
        """
        try:
            texts = self._generate(requests)
        except torch.OutOfMemoryError:
            number = len(requests)
            fix = f"lower --concurrency, to {number // 2} for example" if number > 1 else SMALLER
            clips = "a clip" if number == 1 else f"{number} clips at the same time"
            raise UsageError(f"--caption_model: the GPU has no room for {clips}; {fix}") from None
        return [answer_of(text, ended) for text, ended in texts]

    def _generate(self, requests: Sequence[Request]) -> list[tuple[str, bool]]:
        """Returns what the model says about each clip, and whether it came to an end within --caption_tokens."""
        with torch.inference_mode():
            inputs = self._processor.apply_chat_template(
                [conversation_of(stills, instruction) for stills, instruction in requests],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            ).to(self._model.device, self._model.dtype)
            limit = self._flags.caption_tokens
            tokens = self._model.generate(**inputs, max_new_tokens=limit, do_sample=False)
        answers = tokens[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._text(answer) for answer in answers]

    def _text(self, answer: list[int]) -> tuple[str, bool]:
        """Returns the text of one row, and whether it has an end, after which the row is only padded."""
        given = self._model.generation_config.eos_token_id
        ends = set(given if isinstance(given, list) else [given])
        end = next((place for place, token in enumerate(answer) if token in ends), None)
        return self._processor.decode(answer[:end], skip_special_tokens=True), end is not None


def conversation_of(stills: Stills, instruction: str) -> list[dict[str, object]]:
    """Returns the messages that ask for the caption of a clip."""
    images = [Image.open(io.BytesIO(jpeg)) for jpeg in stills.jpegs]
    content = message_parts(stills, instruction, [{"type": "image", "image": image} for image in images])
    return [{"role": "user", "content": content}]


def answer_of(text: str, ended: bool) -> Answer:
    """Returns the caption in a text, or why there is none."""
    reason = "stop" if ended else "length"
    try:
        return caption_in({"choices": [{"message": {"content": text}, "finish_reason": reason}]})
    except ClipRefused as error:
        return error
