"""Writes the model card: README.md in the output folder, for readers and for the hub.

``write_card`` collects ``Facts`` from the run, and ``card_text`` turns them into front matter (YAML) and text
(Markdown), one function per section. Prompts and names may contain any characters: huggingface_hub quotes them in the
YAML, repr() in the code, and ``escape_markdown`` in the text.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cogvideox.config.flags import ModelFlags
from cogvideox.config.geometry import hub_file
from cogvideox.config.hub import CARD_NAME
from cogvideox.config.lora_file import FOLDED_ROUNDED, NOT_FOLDED
from cogvideox.config.options import TrainOptions
from cogvideox.data.cache import CacheIndex
from cogvideox.errors import plural
from cogvideox.evaluation.before_after import SHEET_NAME
from cogvideox.evaluation.validation import Validator
from cogvideox.export.inference_code import generate, literal, oldest_diffusers
from cogvideox.files import write_atomically
from cogvideox.model.methods import Method
from cogvideox.model.tasks import IMAGE_NAME, Task
from cogvideox.runtime.curves import CURVES_NAME
from cogvideox.runtime.resume import earlier_lines
from cogvideox.runtime.run import Run

# Pictures that the card shows if the run has them, with their captions.
PICTURES = {
    SHEET_NAME: "Validation prompts before and after training",
    CURVES_NAME: "Loss, learning rate and gradient norm",
}
# Characters with a meaning in Markdown, its tables and formulas, or HTML. Within a word, _ has no meaning.
SPECIAL_CHARACTERS = re.compile(r"[&<>\\`*\[\]{}|~$#]|(?<![^\W_])_|_(?![^\W_])")
# After pipe.vae.enable_tiling(), a program for image-to-video would also encode the image in tiles.
TILED_DECODING = """

def decode(latents, decode=pipe.vae.decode):
    pipe.vae.enable_tiling()
    video = decode(latents)
    pipe.vae.disable_tiling()  # images are never encoded in tiles
    return video


pipe.vae.decode = decode
"""
INFERENCE_PACKAGES = "transformers accelerate peft sentencepiece protobuf av imageio imageio-ffmpeg"
HUB_URL = "https://huggingface.co"


@dataclass(frozen=True)
class Video:
    """Holds the paths of the validation videos of a prompt, before the first and after the last step.

    Attributes:
        prompt: The prompt.
        before: Path of the video before training, relative to the output folder; None if it does not exist.
        after: Path of the video after training.
        image: Path of the image that the video begins with, for image-to-video.
    """

    prompt: str
    before: str | None
    after: str
    image: str | None = None


@dataclass(frozen=True)
class Facts:
    """Holds everything that a card states, as plain values."""

    name: str  # namespace/name on the hub, or the name of the output folder
    on_hub: bool
    model: ModelFlags
    pipeline: str
    dtype: str
    code: tuple[str, str]  # code that loads the trained weights, from method.inference()
    negative: str  # the negative prompt; empty without one
    sampling: dict[str, Any]
    decoding: list[str]  # methods of the VAE that the flags enable
    fps: int
    token: str | None
    clips: int  # number of clips, each counted once
    buckets: dict[str, int]  # number of clips in each bucket
    videos: list[Video]
    pictures: list[str]
    base_license: dict[str, Any]  # license of the base model, as fields of the front matter
    made: dict[str, Any]  # content of recipe.json

    @property
    def task(self) -> str:
        """Returns text-to-video or image-to-video."""
        return re.sub("(?<!^)(?=[A-Z])", "-", self.made["task"]).lower()

    @property
    def is_lora(self) -> bool:
        """Returns whether a LoRA was trained rather than all weights."""
        return bool(self.made["method"] == "Lora")

    @property
    def base(self) -> str | None:
        """Returns the base model's id on the hub, or None for a local folder."""
        name = self.model.pretrained_model_name_or_path
        return None if Path(name).is_dir() else name

    @property
    def base_folder(self) -> str:
        """Returns the name of the base model's local folder, without its parents."""
        return Path(self.model.pretrained_model_name_or_path).resolve().name


def write_card(
    run: Run,
    options: TrainOptions,
    task: Task,
    method: Method,
    validator: Validator,
    index: CacheIndex,
    made: dict[str, Any],
) -> list[Path]:
    """Writes README.md into the output folder.

    Args:
        run: The processes and the output folder.
        options: The flags.
        task: What is generated from what.
        method: What was trained.
        validator: Has the settings and the videos of validation.
        index: The training data.
        made: The content of recipe.json.

    Returns:
        The paths of README.md and of the files that it shows.
    """
    folder, dtype = run.output_dir, str(run.dtype).removeprefix("torch.")
    samples = {sample.video_keys: sample for sample in index.samples}.values()  # those of --repeats share their tensors
    facts = Facts(
        name=run.repository or folder.resolve().name,
        on_hub=run.repository is not None,
        model=options.model,
        pipeline=task.pipeline,
        dtype=dtype,
        code=method.inference(dtype),
        negative=options.validation.negative_prompt,
        sampling=validator.sampling,
        decoding=[name for name in ("enable_slicing", "enable_tiling") if getattr(options.validation, name)],
        fps=validator.whole_fps,
        token=(options.data.id_token or "").strip() or None,
        clips=len({sample.clip for sample in samples}),
        buckets=dict(sorted(Counter(str(sample.bucket) for sample in samples).items())),
        videos=list(videos_of(validator, folder, made["step"])),
        pictures=[name for name in PICTURES if (folder / name).is_file()],
        base_license=read_license(options.model),
        made=made,
    )
    write_atomically(folder / CARD_NAME, card_text(facts).encode())
    shown = [name for video in facts.videos for name in (video.image, video.before, video.after) if name]
    return [folder / name for name in dict.fromkeys((CARD_NAME, *facts.pictures, *shown))]


def videos_of(validator: Validator, folder: Path, step: int) -> Iterator[Video]:
    """Yields the validation videos of the first and the last step."""

    def name_of(path: Path) -> str:
        return path.relative_to(folder).as_posix()

    for index, prompt in enumerate(validator.prompts.texts):
        for number in range(validator.flags.num_validation_videos):
            before, after = (validator.path(at, index, number) for at in (0, step))
            image = folder / IMAGE_NAME.format(index)
            others = [name_of(path) if path.is_file() else None for path in (before, image)]
            if after.is_file():  # a video that did not fit into memory is missing
                yield Video(prompt, others[0], name_of(after), others[1])


def read_license(model: ModelFlags) -> dict[str, str]:
    """Returns the license fields of the base model's own card; "license: other" if they cannot be read."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    folder = Path(model.pretrained_model_name_or_path)
    try:
        card = folder / CARD_NAME if folder.is_dir() else hub_file(model, CARD_NAME)
        data = metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):  # an unreachable hub raises UsageError, which is a ValueError
        data = {}
    fields = ("license", "license_name", "license_link")
    found = {name: data[name] for name in fields if isinstance(data.get(name), str)}
    if "://" not in found.get("license_link", "://"):  # relative to the base model
        relative = found.pop("license_link")
        found |= {} if folder.is_dir() else {"license_link": f"{HUB_URL}/{folder.as_posix()}/blob/main/{relative}"}
    return found if "license" in found else {"license": "other"}


def card_text(facts: Facts) -> str:
    """Returns the text of the card."""
    sections = (front_matter, heading, usage, results, training, license_section)
    return "\n\n".join(text for section in sections if (text := section(facts))) + "\n"


def front_matter(facts: Facts) -> str:
    """Returns the front matter, which the hub reads."""
    from huggingface_hub import ModelCardData

    widget = [{"text": video.prompt, "output": {"url": video.after}} for video in facts.videos]
    data = ModelCardData(
        **facts.base_license,
        base_model=facts.base,  # the hub accepts only ids
        base_model_relation=("adapter" if facts.is_lora else "finetune") if facts.base else None,
        library_name="diffusers",
        pipeline_tag=facts.task,
        tags=["cogvideox", facts.task, *(("lora", "template:sd-lora") if facts.is_lora else ())],
        instance_prompt=facts.token,
        widget=widget or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def escape_markdown(text: str) -> str:
    """Returns a text on one line, in which all characters with a meaning in Markdown or HTML are escaped."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return SPECIAL_CHARACTERS.sub(lambda match: f"&#{ord(match[0])};", line)


def markdown_link(text: str, target: str) -> str:
    """Returns a link in Markdown, or only the text if the target has a scheme other than https."""
    if re.match("[A-Za-z][A-Za-z0-9+.-]*:", target) and not target.startswith("https://"):
        return escape_markdown(text)
    return f"[{escape_markdown(text)}]({quote(target, safe='/:?=&#%')})"


def heading(facts: Facts) -> str:
    """Returns the title, one sentence about the model, and the tag for the hub's gallery of videos."""
    what = "A LoRA for" if facts.is_lora else "A full fine-tune of"
    if facts.base:
        base = markdown_link(facts.base, f"{HUB_URL}/{facts.base}")
    else:
        base = f"a CogVideoX from a local folder ({escape_markdown(facts.base_folder)})"
    clips, steps = plural(facts.clips, "clip"), plural(facts.made["step"], "step")
    text = f"{what} {base}, {facts.task}, trained on {clips} for {steps}."
    token = f"\n\nBegin prompts with {escape_markdown(facts.token)} to use what was learned." if facts.token else ""
    return f"# {escape_markdown(facts.name)}\n\n{text}{token}" + ("\n\n<Gallery />" if facts.videos else "")


def usage(facts: Facts) -> str:
    """Returns the section on how to make a video."""
    image = "first_frame.png " if facts.task == "image-to-video" else ""
    script = f'inference.py in this folder is a command: `python inference.py "a prompt" {image}video.mp4`; see --help.'
    again = " Without one it reproduces the first video of the table below." if facts.videos else ""
    oldest = oldest_diffusers()
    blocks = [
        "## Use it",
        f"This needs diffusers {oldest} or newer: older ones ignore `dtype` and load the model in fp32.",
        f"```bash\npip install 'diffusers>={oldest}' {INFERENCE_PACKAGES}\n```",
        f"```python\n{example(facts)}\n```",
        script + again,
    ]
    if facts.base is None:
        blocks.append(
            f"The base model was a folder named {escape_markdown(facts.base_folder)} on the machine of the training: "
            "replace its path by the path or the hub id of your copy, in inference.py too."
        )
    return "\n\n".join(blocks)


def example(facts: Facts) -> str:
    """Returns a short program that makes a video with the trained weights."""
    is_image_task = facts.task == "image-to-video"
    first = facts.videos[0] if facts.videos else None
    prompt = first.prompt if first else f"{facts.token or ''} a video".strip()
    image = f"str(here / {literal(first.image)})" if first and first.image else '"first_frame.png"'
    setup = [
        "from pathlib import Path",
        "",
        "import diffusers",
        "import torch",
        f"from diffusers.utils import export_to_video{', load_image' if is_image_task else ''}",
        *(["from huggingface_hub import snapshot_download"] if facts.on_hub else []),
        "",
        f"here = Path({f'snapshot_download({literal(facts.name)})' if facts.on_hub else literal(facts.name)})",
    ]
    return generate(
        setup="\n".join(setup),
        pipeline=facts.pipeline,
        model=facts.model,
        path=facts.base or f"path/to/{facts.base_folder}",
        dtype=facts.dtype,
        weights=facts.code,
        memory="\n".join(["pipe.enable_model_cpu_offload()", *decoding_lines(facts)]),
        arguments=[
            f"prompt={literal(prompt)},",
            *([f"image=load_image({image}),"] if is_image_task else []),
            *([f"negative_prompt={literal(facts.negative)},"] if facts.negative else []),
            *(f"{name}={value!r}," for name, value in facts.sampling.items()),
        ],
        output=f'export_to_video(video, "output.mp4", fps={facts.fps})',
    ).rstrip()


def decoding_lines(facts: Facts) -> list[str]:
    """Returns the code that makes the VAE decode as in validation, where images are encoded as a whole."""
    tiled = TILED_DECODING if facts.task == "image-to-video" else "pipe.vae.enable_tiling()"
    lines = {"enable_slicing": "pipe.vae.enable_slicing()", "enable_tiling": tiled}
    return [lines[name] for name in facts.decoding]


def results(facts: Facts) -> str:
    """Returns the section with pictures and a table of the videos."""
    blocks = [f"![{PICTURES[name]}]({name})" for name in facts.pictures]
    if facts.videos:
        rows = [f"| prompt | before | after {plural(facts.made['step'], 'step')} |", "|---|---|---|"]
        for video in facts.videos:
            image = f" ({markdown_link('image', video.image)})" if video.image else ""
            before = markdown_link("video", video.before) if video.before else ""
            rows.append(
                f"| {escape_markdown(video.prompt)}{image} | {before} | {markdown_link('video', video.after)} |"
            )
        blocks.append("\n".join(rows))
    return "\n\n".join(["## What it makes", *blocks]) if blocks else ""


def training(facts: Facts) -> str:
    """Returns the section on how the model was trained and verified."""
    made = facts.made
    buckets = ", ".join(f"{name} ({plural(number, 'clip')})" for name, number in facts.buckets.items())
    rate = f"learning rate {made['learning_rate']:g}, {made['lr_scheduler']}, {made['optimizer']}"
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    checked = made["verification"]
    lines = [
        f"Frames x height x width: {buckets}.",
        f"Optimizer steps: {made['step']}, of {plural(made['samples_per_step'], 'sample')} each; {rate}.",
        f"Precision: {facts.dtype}; seed {made['seed']}.",
        *earlier_lines(made),
        f"Versions: {versions}; Python {made['python']}, {made['device']}.",
        f"Checked: read back by diffusers, the weights were compared with the trained ones on a sample of the data: "
        f"largest difference {checked['max_difference']:.3g}, cosine {checked['cosine']:.7f}.",
    ]
    if facts.is_lora:
        targets = ", ".join(made["target_modules"])
        lines.insert(2, f"LoRA: rank {made['rank']}, alpha {made['lora_alpha']:g}, on {targets}.{scale_note(made)}")
    listed = "\n".join(f"- {escape_markdown(line)}" for line in lines)
    return f"## How it was made\n\n{listed}\n\n[recipe.json](recipe.json) has every setting."


def scale_note(made: dict[str, Any]) -> str:
    """Returns a sentence on where a LoRA's scale is stored, for users of other programs."""
    scale = made["lora_scale"]
    if scale == 1:
        return ""
    if made["lora_scale_folded"] == NOT_FOLDED:
        return f" In the file its scale, {scale:g}, is only in the file's metadata; loaders that ignore it take 1."
    rounded = " (rounded)" if made["lora_scale_folded"] == FOLDED_ROUNDED else ""
    return f" In the file its scale, {scale:g}, is multiplied into its matrices{rounded}: the file's alpha is its rank."


def license_section(facts: Facts) -> str:
    """Returns the section on the license."""
    fields = facts.base_license
    name = fields.get("license_name") or fields["license"]
    text = "The license of the base model applies"
    if fields == {"license": "other"}:
        return f"## License\n\n{text}; it could not be read when this card was made."
    shown = markdown_link(name, fields["license_link"]) if "license_link" in fields else escape_markdown(name)
    return f"## License\n\n{text}: {shown}."
