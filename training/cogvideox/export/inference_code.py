"""Generates the Python programs that make a video with the result: inference.py, and the example of the model card.

Both are the same program: load the pipeline with the trained weights, fit it into memory, sample, and write the file.
``TEMPLATE`` is that program, and ``generate`` fills it in. The example is short, because people copy it; inference.py
takes its inputs from the command line, chooses how to fit into the GPU's memory, and reproduces the first validation
video. Texts of users enter the code only through repr(), so a prompt cannot run as code.
"""

from collections.abc import Sequence
from pathlib import Path

from cogvideox.config.flags import ModelFlags
from cogvideox.config.options import TrainOptions
from cogvideox.config.prompts import prompts_of
from cogvideox.evaluation.validation import Validator
from cogvideox.model.methods import Method
from cogvideox.model.tasks import Task
from cogvideox.runtime.run import Run

MIN_DIFFUSERS = (0, 40)  # older versions ignore dtype= and load in fp32, or cannot write videos

TEMPLATE = """\
{setup}
pipe = diffusers.{pipeline}.from_pretrained(
    {model}, {choices}dtype=torch.{dtype},{parts}
)
{load}{memory}
video = pipe(
    {arguments}
).frames[0]
{output}
"""

SCRIPT_SETUP = '''\
"""Makes a video with the trained weights in plain diffusers: python inference.py ["a prompt"]{usage} [OUTPUT.mp4]"""

import sys
from pathlib import Path

import diffusers
import torch

if tuple(map(int, diffusers.__version__.split(".")[:2])) < {diffusers}:
    sys.exit(f"diffusers {{diffusers.__version__}} is too old; {oldest} or newer is needed: pip install -U diffusers")

from diffusers.utils.export_utils import encode_video

PROMPT = {prompt}
TILES = {tiles}  # tile sizes for decoding, in the order in which they are tried; None decodes complete frames
here = Path(__file__).parent
defaults = [PROMPT,{defaults} "output.mp4"]
prompt,{names} output = sys.argv[1:] + defaults[len(sys.argv) - 1 :]
'''

SCRIPT_MEMORY = """\
parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
largest = max(sum(p.nbytes for p in part.parameters()) for part in parts)
if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > largest + 4 * 2**30:
    pipe.enable_model_cpu_offload()  # keeps one model at a time on the GPU
elif torch.cuda.is_available():
    pipe.enable_sequential_cpu_offload()  # keeps one layer at a time on the GPU: slow, but fits small GPUs
{slicing}

def decode(latents, decode=pipe.vae.decode):
    for tile in TILES:
        torch.cuda.empty_cache()
        if tile:
            pipe.vae.enable_tiling(*tile)
        try:
            return decode(latents)
        except torch.OutOfMemoryError:
            if tile == TILES[-1]:
                raise
        finally:
            pipe.vae.disable_tiling()  # images are never encoded in tiles


pipe.vae.decode = decode"""

SCRIPT_OUTPUT = """\
frames = (video.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8).cpu()
encode_video(frames, fps={fps}, output_path=output)
print(output)"""


def oldest_diffusers() -> str:
    """Returns the oldest version of diffusers that runs the programs, such as 0.40."""
    return ".".join(map(str, MIN_DIFFUSERS))


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
    parts, load = weights
    choices = {"revision": model.revision, "variant": model.variant}
    return TEMPLATE.format(
        setup=setup,
        pipeline=pipeline,
        model=repr(path),
        choices="".join(f"{name}={value!r}, " for name, value in choices.items() if value),
        dtype=dtype,
        parts=f"\n    {parts}" if parts else "",
        load=f"{load}\n" if load else "",
        memory=memory,
        arguments="\n    ".join(arguments),
        output=output,
    )


def inference_script(options: TrainOptions, task: Task, method: Method, validator: Validator, run: Run) -> str:
    """Returns inference.py, a script that reproduces the first validation video in stock diffusers."""
    flags, model, dtype = options.validation, options.model, str(run.dtype).removeprefix("torch.")
    folder = Path(model.pretrained_model_name_or_path)
    prompts = prompts_of(flags) or [f"{options.data.id_token or ''} a video".strip()]
    setup = SCRIPT_SETUP.format(
        **task.inference,
        diffusers=MIN_DIFFUSERS,
        oldest=oldest_diffusers(),
        prompt=repr(prompts[0]),
        tiles=validator.tiles,
    )
    arguments = [
        f"prompt=prompt,{task.inference['arguments']}",
        f"negative_prompt={flags.negative_prompt!r},",
        *(f"{name}={value!r}," for name, value in validator.sampling.items()),
        f"generator=torch.Generator().manual_seed({options.data.seed}),",
        'output_type="pt",',
    ]
    return generate(
        setup=setup,
        pipeline=task.pipeline,
        model=model,
        path=str(folder.resolve()) if folder.is_dir() else model.pretrained_model_name_or_path,
        dtype=dtype,
        weights=method.inference(dtype),
        memory=SCRIPT_MEMORY.format(slicing="pipe.vae.enable_slicing()\n" if flags.enable_slicing else ""),
        arguments=arguments,
        output=SCRIPT_OUTPUT.format(fps=round(validator.fps)),
    )
