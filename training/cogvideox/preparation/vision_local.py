"""Runs a vision-language model in this process, with transformers.

``LocalVisionModel`` has the same methods as ``VisionServer``. It describes one clip at a time; a server that batches
requests is faster for a large data set.
"""

import io
import threading
from typing import Any

import torch
from PIL import Image

from cogvideox.config.flags import CaptionFlags
from cogvideox.data.media.stills import Stills
from cogvideox.errors import UsageError, first_line
from cogvideox.preparation.vision_server import caption_in, content_of


class LocalVisionModel:
    """A vision-language model on the GPU, or on the CPU where there is none."""

    def __init__(self, flags: CaptionFlags) -> None:
        """Prepares the model, which ``connect`` loads."""
        self._flags = flags
        self._turn = threading.Lock()  # the model describes one clip at a time
        self._model: Any = None
        self._processor: Any = None

    def connect(self) -> None:
        """Loads the model and its processor.

        Raises:
            UsageError: The files are missing, or are not those of a vision-language model.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        name = self._flags.caption_model
        try:
            self._processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
            # Only safetensors, because other weight files can run code when they are loaded.
            model = AutoModelForImageTextToText.from_pretrained(
                name, dtype="auto", use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            fix = "give the hub id or the folder of a vision-language model, such as Qwen/Qwen2.5-VL-3B-Instruct"
            raise UsageError(f"--caption_model {name}: cannot be loaded ({first_line(error)}); {fix}") from None
        if not getattr(self._processor, "chat_template", None):
            fix = "give one whose name ends in Instruct, or a server with --endpoint"
            raise UsageError(f"--caption_model {name}: has no chat template, so it does not follow instructions; {fix}")
        self._model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def describe(self, stills: Stills, instruction: str) -> str:
        """Returns the caption of a clip; see ``VisionServer.describe``."""
        images = [Image.open(io.BytesIO(jpeg)) for jpeg in stills.jpegs]
        content = content_of(stills, instruction, [{"type": "image", "image": image} for image in images])
        with self._turn, torch.inference_mode():
            inputs = self._processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            ).to(self._model.device, self._model.dtype)
            length = inputs["input_ids"].shape[1]
            limit = self._flags.caption_tokens
            (tokens,) = self._model.generate(**inputs, max_new_tokens=limit, do_sample=False)
        answer = tokens[length:]
        text = self._processor.decode(answer, skip_special_tokens=True)
        reason = "length" if len(answer) >= limit else "stop"
        return caption_in({"choices": [{"message": {"content": text}, "finish_reason": reason}]})
