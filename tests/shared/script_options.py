"""Lists the scripts in training/ with their options."""

from __future__ import annotations

from typing import Any

from cogvideox.config.options import (
    CaptionOptions,
    DoctorOptions,
    ImageLoraOptions,
    ImageSftOptions,
    LoraOptions,
    PrepareOptions,
    SceneOptions,
    SftOptions,
)

LORA, SFT = "cogvideox_text_to_video_lora.py", "cogvideox_text_to_video_sft.py"
IMAGE_LORA, IMAGE_SFT = "cogvideox_image_to_video_lora.py", "cogvideox_image_to_video_sft.py"
PREPARE, CAPTION, DOCTOR, SCENES = "prepare_dataset.py", "caption_dataset.py", "doctor.py", "split_scenes.py"
OPTIONS: dict[str, type[Any]] = {
    LORA: LoraOptions,
    SFT: SftOptions,
    IMAGE_LORA: ImageLoraOptions,
    IMAGE_SFT: ImageSftOptions,
    PREPARE: PrepareOptions,
    CAPTION: CaptionOptions,
    DOCTOR: DoctorOptions,
    SCENES: SceneOptions,
}
