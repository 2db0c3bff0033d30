"""The images that validation videos begin with: read or fetched once, kept beside the result for inference.py."""

import http.client
import io
import urllib.request
from pathlib import Path

from cogvideox.data.faults import VideoError
from cogvideox.data.pictures import probe_picture, read_picture
from cogvideox.errors import UsageError
from cogvideox.files import temporary_of, write_atomically
from cogvideox.options import TrainOptions, is_url
from cogvideox.prompts import images_of
from cogvideox.run import Run
from cogvideox.tasks import IMAGE_NAME

FETCH_SECONDS, FETCH_BYTES = 60, 2**28


def take_images(run: Run, options: TrainOptions) -> list[Path]:
    """OUTPUT_DIR/image-0.png and so on, one for each of --validation_images; upright RGB.

    Raises:
        UsageError: one cannot be had.
    """
    texts = images_of(options)
    paths = [run.output_dir / IMAGE_NAME.format(number) for number in range(len(texts))]
    if run.is_main:
        for text, path in zip(texts, paths, strict=True):
            write_atomically(path, fetched(text, temporary_of(path)) if is_url(text) else as_png(Path(text)))
    run.barrier()
    return paths


def fetched(url: str, temporary: Path) -> bytes:
    """The image behind a URL as a PNG."""
    fix = "download it and give its path"
    try:
        with urllib.request.urlopen(url, timeout=FETCH_SECONDS) as reply:
            temporary.write_bytes(reply.read(FETCH_BYTES))
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UsageError(f"--validation_images {url}: cannot be fetched ({error}); {fix}") from None
    try:
        return as_png(temporary)
    except UsageError:
        raise UsageError(f"--validation_images {url}: is no image that can be read; {fix}") from None
    finally:
        temporary.unlink(missing_ok=True)


def as_png(path: Path) -> bytes:
    """The content of an image file as an RGB PNG."""
    from PIL import Image

    try:
        info = probe_picture(path)
        frame_HWC = read_picture(path, info, 1, info.height, info.width)[0]
    except (OSError, VideoError) as error:
        raise UsageError(f"--validation_images {error}") from None
    content = io.BytesIO()
    Image.fromarray(frame_HWC).save(content, "PNG")
    return content.getvalue()
