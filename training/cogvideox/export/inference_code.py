"""Generates the Python programs that make a video with the result: inference.py, and the example of the model card.

Both are the same program: load the pipeline with the trained weights, fit it into memory, sample, and write the file.
``TEMPLATE`` is that program, and ``generate`` fills it in. The example is short, because people copy it; inference.py
takes its inputs from the command line, chooses how to fit into the GPU's memory, and reproduces the first validation
video. Texts of users enter the code only through repr(), so a prompt cannot run as code.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cogvideox.config.args import NOISY
from cogvideox.config.flags import ModelFlags
from cogvideox.config.options import TrainOptions
from cogvideox.config.prompts import prompts_of
from cogvideox.data.clips import IMAGE_STRETCH
from cogvideox.data.media.transforms import fit_image
from cogvideox.evaluation.images import crops_images
from cogvideox.evaluation.validation import Validator
from cogvideox.model.methods import Method
from cogvideox.model.tasks import Task
from cogvideox.runtime.run import Run

MIN_DIFFUSERS = (0, 40)  # older versions ignore dtype= and load in fp32, or cannot write videos

TEMPLATE = """\
{setup}
pipe = diffusers.{pipeline}.from_pretrained(
    {parts}
)
{load}{memory}
video = pipe(
    {arguments}
).frames[0]
{output}
"""

FIRST_VIDEO = "The default values make the first validation video."
NO_VIDEO = "The default prompt is only an example, because the run had none."

SCRIPT_SETUP = '''\
"""Makes a video with the trained weights in plain diffusers.

{default_values} Prompt{and_image} and output, in this order, need no flags.
"""

import argparse
import logging
from pathlib import Path

here = Path(__file__).parent
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
for name in ({names}):
    parser.add_argument(name, nargs="?", default=argparse.SUPPRESS, help=f"same as --{{name}}")
parser.add_argument(
    "--prompt",
    default={prompt},
    help="what the video shows",
)
{image_flag}parser.add_argument("--output", default="output.mp4", help="video file; a number is added to the default")
{numbers}
args = parser.parse_intermixed_args()
if Path(args.output).suffix.lower() not in (".mp4", ".mov", ".mkv"):
    parser.error(f"--output {{args.output}}: must end in .mp4, .mov or .mkv")
if Path(args.output).exists() and args.output != "output.mp4":
    parser.error(f"--output {{args.output}}: exists and would be replaced; move it away, or give another name")
number = 1
while Path(args.output).exists():
    number += 1
    args.output = f"output-{{number}}.mp4"
for name in ("height", "width"):
    if getattr(args, name) % {multiple}:
        parser.error(f"--{{name}} {{getattr(args, name)}}: must be a multiple of {multiple}")
{image_check}Path(args.output).parent.mkdir(parents=True, exist_ok=True)

# These packages, if they are installed, warn about extras that are not used here.
for name in (
    {noisy},
):
    logging.getLogger(name).setLevel(logging.ERROR)

import diffusers
import torch

if tuple(map(int, diffusers.__version__.split(".")[:2])) < {diffusers}:
    raise SystemExit(f"diffusers {{diffusers.__version__}} is too old: pip install -U 'diffusers>={oldest}'")

from diffusers.hooks import apply_group_offloading
from diffusers.utils.export_utils import encode_video
{image_code}'''

SCRIPT_IMAGE = """from PIL import Image


def to_rgb(image: Image.Image) -> Image.Image:
    \"""Converts an image as training does: to the upper 8 of 16 bits, and on black where it is transparent.\"""
    if image.mode.startswith("I"):
        image = image.point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return image.convert("RGB")


{function}

try:
    image = diffusers.utils.load_image(str(args.image), to_rgb)
except (OSError, ValueError) as error:
    parser.error(f"--image {{args.image}}: {{error}}")
image, note = fit_image(image, args.width, args.height, crop={crop}, tolerance={tolerance})
if note:
    print(f"--image {{args.image}}: {{note}}")
"""

STRENGTH = "args.strength"  # code for the scale of the LoRA
# The flags of numbers, by what they are in Validator.sampling or in the program.
NUMBERS = {
    "seed": ("seed", "another number gives another video"),
    "num_inference_steps": ("steps", "number of denoising steps"),
    "guidance_scale": ("guidance", "guidance scale; 1 is without guidance"),
    STRENGTH: ("strength", "scale of the LoRA; 0 gives the base model"),
    "num_frames": ("frames", "number of frames; 9, 17, 25, ... are made exactly"),
    "height": ("height", "in pixels"),
    "width": ("width", "in pixels"),
}

SCRIPT_MEMORY = """
parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
for part in parts:  # diffusers only warns about files without some weights
    if missing := [name for name, p in part.named_parameters() if p.is_meta]:
        raise SystemExit(f"{{part.config._name_or_path}}: its files lack {{missing[0]}}; get the folder again")

# The GPU holds all models if they fit, else the two blocks that compute and come next.
size = sum(p.nbytes for part in parts for p in part.parameters())
free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
room = 2**30 * (1 + 3 * args.frames * args.height * args.width / (49 * 480 * 720))  # for sampling
if free > size + 5 * room:  # the rest is for decoding
    pipe.to("cuda")
elif free:
    streams = {{"onload_device": torch.device("cuda"), "use_stream": True}}
    pipe.transformer.enable_group_offload(**streams, num_blocks_per_group=1)
    apply_group_offloading(pipe.text_encoder, **streams, offload_type="leaf_level", low_cpu_mem_usage=True)
    pipe.vae.to("cuda")
pipe.set_progress_bar_config(disable=None)  # shows a bar on a terminal only
{slicing}

def decode(latents, decode=pipe.vae.decode):
    # None decodes complete frames. The tiles after it are for memory in which they do not fit.
    tiles = {tiles}
    for tile in tiles:
        torch.cuda.empty_cache()
        if tile:
            pipe.vae.enable_tiling(*tile)
        try:
            return decode(latents)
        except torch.OutOfMemoryError:
            if tile == tiles[-1]:
                raise
        finally:
            pipe.vae.disable_tiling()  # images are never encoded in tiles


pipe.vae.decode = decode
"""

SCRIPT_OUTPUT = """
frames = (video.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8).cpu()
encode_video(frames, fps={fps}, output_path=args.output)
print(args.output)"""


def oldest_diffusers() -> str:
    """Returns the oldest version of diffusers that runs the programs, such as 0.40."""
    return ".".join(map(str, MIN_DIFFUSERS))


def literal(text: str) -> str:
    """Returns a text as a Python literal, with the quotes that ruff format would choose."""
    body = repr(f"'\"{text}")[4:-1]  # with both kinds of quotes in it, repr() puts single ones around
    if text.count('"') > text.count("'"):
        return f"'{body}'"
    return '"' + body.replace("\\'", "'").replace('"', '\\"') + '"'


def generate(
    setup: str,
    pipeline: str,
    model: ModelFlags,
    path: str,
    dtype: str,
    weights: tuple[str, str],
    memory: str,
    arguments: Sequence[str],
    output: str,
) -> str:
    """Returns the program that loads a pipeline with the trained weights and makes a video.

    Args:
        setup: Code for imports and inputs. It defines ``here``, the folder of the result.
        pipeline: Class name of the diffusers pipeline.
        model: The base model; its revision and variant are used.
        path: Path or hub id of the base model.
        dtype: Name of a torch dtype, such as "bfloat16".
        weights: Code that loads the trained weights, from ``Method.inference``.
        memory: Code that fits the pipeline ``pipe`` into the memory.
        arguments: Code of the arguments of the pipeline's call, one per line.
        output: Code that writes ``video``.
    """
    part, load = weights
    choices = {"revision": model.revision, "variant": model.variant}
    parts = [
        f"{literal(path)},",
        *(f"{name}={literal(value)}," for name, value in choices.items() if value),
        f"dtype=torch.{dtype},",
        *([part] if part else []),
    ]
    return TEMPLATE.format(
        setup=setup,
        pipeline=pipeline,
        parts="\n    ".join(parts),
        load=f"{load}\n" if load else "",
        memory=memory,
        arguments="\n    ".join(arguments),
        output=output,
    )


def inference_script(options: TrainOptions, task: Task, method: Method, validator: Validator, run: Run) -> str:
    """Returns inference.py, a command whose default values reproduce the first validation video, if there is one."""
    flags, model, dtype = options.validation, options.model, str(run.dtype).removeprefix("torch.")
    folder = Path(model.pretrained_model_name_or_path)
    weights = method.inference(dtype, STRENGTH)
    numbers = {"seed": options.data.seed, **validator.sampling}
    if STRENGTH in weights[1]:
        numbers[STRENGTH] = 1.0
    sampling = {
        name: f"args.{NUMBERS[name][0]}" if name in NUMBERS else value for name, value in validator.sampling.items()
    }
    arguments = [
        "prompt=args.prompt,",
        *task.inference["arguments"].splitlines(),
        f"negative_prompt={literal(flags.negative_prompt)},",
        *(f"{name}={value}," for name, value in sampling.items()),
        "generator=torch.Generator().manual_seed(args.seed),",
        'output_type="pt",',
    ]
    return generate(
        setup=script_setup(options, task, numbers, validator.size_multiple),
        pipeline=task.pipeline,
        model=model,
        path=str(folder.resolve()) if folder.is_dir() else model.pretrained_model_name_or_path,
        dtype=dtype,
        weights=weights,
        memory=SCRIPT_MEMORY.format(
            slicing="pipe.vae.enable_slicing()\n" if flags.enable_slicing else "", tiles=validator.tiles
        ),
        arguments=arguments,
        output=SCRIPT_OUTPUT.format(fps=validator.whole_fps),
    )


def script_setup(options: TrainOptions, task: Task, numbers: dict[str, Any], multiple: int) -> str:
    """Returns the code that reads and checks the command line, before anything is loaded.

    Args:
        options: The flags of the run.
        task: The task of the run.
        numbers: The default values of the numbers.
        multiple: The number of pixels of which the height and width must be multiples.
    """
    prompts = prompts_of(options.validation)
    example = f"{options.data.id_token or ''} a video".strip()
    lines = [
        f'parser.add_argument("--{flag}", type={type(numbers[name]).__name__}, default={numbers[name]}, help="{help_}")'
        for name, (flag, help_) in NUMBERS.items()
        if name in numbers
    ]
    has_image = "image" in task.inference["names"]
    return SCRIPT_SETUP.format(
        **task.inference,
        image_code=image_code(crops_images(options)) if has_image else "",
        default_values=FIRST_VIDEO if prompts else NO_VIDEO,
        prompt=literal(prompts[0] if prompts else example),
        numbers="\n".join(lines),
        multiple=multiple,
        noisy=",\n    ".join(map(literal, NOISY)),
        diffusers=MIN_DIFFUSERS,
        oldest=oldest_diffusers(),
    )


def image_code(crop: bool) -> str:
    """Returns the code that loads the image and fits it as the validation does."""
    return SCRIPT_IMAGE.format(function=inspect.getsource(fit_image), crop=crop, tolerance=IMAGE_STRETCH)
