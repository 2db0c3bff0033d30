r"""Writes captions for the clips of a folder that have none, with a vision-language model.

    vllm serve Qwen/Qwen2.5-VL-7B-Instruct --max-model-len 16384 --limit-mm-per-prompt '{"image": 8}'
    python training/caption_dataset.py --model_id THUDM/CogVideoX-5b --data_root my-clips \
        --endpoint http://localhost:8000/v1 --max_captions 5

The first command starts a server, and the second one is for another terminal. Any server with OpenAI's chat API works.
Without --endpoint, transformers runs the model that --caption_model names, which is slower for many clips.

Captions go to a text file next to each clip, to prompts.txt if videos.txt names the clips, or into the blank cells of a
table. A text that is already there is never changed, so the same command continues an interrupted run, and captions can
be edited at any time. Each caption is printed with its number of T5 tokens. Without --max_captions, all clips are
captioned.
"""

from collections.abc import Iterator

from cogvideox.config import args
from cogvideox.config.geometry import read_geometry
from cogvideox.config.options import CaptionOptions
from cogvideox.errors import UsageError, plural


def check_captioning(options: CaptionOptions) -> Iterator[str]:
    """Yields the problems of the model and of the flags that choose the captioning model."""
    from cogvideox.preparation.captioning.vision_server import check_endpoint

    read_geometry(options.model)
    yield from check_endpoint(options.caption)


CHECKS = (check_captioning,)


def main(options: CaptionOptions) -> int:
    """Captions the clips, and returns the exit status: 1 if a clip has no caption because of an error."""
    from cogvideox.data.forms.uncaptioned import find_uncaptioned
    from cogvideox.data.forms.unused import Unused
    from cogvideox.data.media.workers import Limits
    from cogvideox.model.models import load_tokenizer
    from cogvideox.preparation.captioning.missing_captions import Captioning
    from cogvideox.preparation.captioning.vision_local import LocalVisionModel
    from cogvideox.preparation.captioning.vision_server import VisionServer
    from cogvideox.preparation.unusable import unused_notes

    unused = Unused()
    clips, present = find_uncaptioned(options.data, unused)
    if not clips:
        have = "the only clip has" if present == 1 else f"all {present} clips have"
        print(f"{have} a caption; nothing to do")
        return 0
    for line in unused_notes(unused):  # there may be captions among these files
        print(line)
    if options.caption.endpoint is None and options.caption.caption_model is None:
        have = plural(present + len(clips), "clip has", "clips have")
        rule = f"{len(clips)} of {have} no caption, the first is {clips[0].video}"
        fix = "give --endpoint with the URL of a server, or --caption_model with the hub id of a model"
        raise UsageError(f"{rule}; {fix}; or write captions yourself, that one into {clips[0].place}")
    flags, cache_dir = options.caption, options.model.cache_dir
    model = VisionServer(flags) if flags.endpoint else LocalVisionModel(flags, cache_dir)
    model.connect()
    limits = Limits(options.data.decode_timeout, int(options.data.decode_memory * 2**30))
    length = read_geometry(options.model).max_text_seq_length
    captioning = Captioning(model, flags, limits, load_tokenizer(options.model), length)
    try:
        captioning.run(clips)
    finally:
        print(*captioning.report(present), sep="\n")
    return 1 if captioning.failed else 0


if __name__ == "__main__":
    args.run_script(main, CaptionOptions, __doc__, CHECKS)
