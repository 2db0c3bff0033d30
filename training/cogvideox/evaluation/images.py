"""Reads or downloads the images of --validation_images, from which image-to-video validation starts.

``fetch_images`` stores them as PNG files in the output folder, where the validation and inference.py find them.
Downloads are limited in time, in size and to http and https.
"""

import http.client
import io
import threading
import urllib.request
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import Request

from cogvideox.config.options import TrainOptions, is_url
from cogvideox.config.prompts import images_of
from cogvideox.data.clips import IMAGE_STRETCH
from cogvideox.data.media.faults import VideoError
from cogvideox.data.media.pixels.pictures import probe_picture, read_picture
from cogvideox.data.media.transforms import fit_image
from cogvideox.errors import UsageError, public_urls
from cogvideox.files import temporary_of, write_atomically
from cogvideox.model.tasks import IMAGE_NAME
from cogvideox.runtime.run import Run

if TYPE_CHECKING:
    from PIL import Image

FETCH_SECONDS, FETCH_BYTES = 60, 2**28  # limits for one image in total


def fetch_images(run: Run, options: TrainOptions) -> list[Path]:
    """Writes OUTPUT_DIR/image-0.png and so on, one for each of --validation_images, as upright RGB.

    Each is cropped to the shape of the validation videos if clips are cropped; if clips are stretched, the pipeline
    stretches it too. Prints which images are cropped or stretched.

    Returns:
        The paths of the images.

    Raises:
        UsageError: An image cannot be read or downloaded.
    """
    texts = images_of(options)
    paths = [run.output_dir / IMAGE_NAME.format(number) for number in range(len(texts))]
    width, height = options.validation.width, options.validation.height
    if run.is_main:
        assert width is not None
        assert height is not None
        for text, path in zip(texts, paths, strict=True):
            image = fetch(text, temporary_of(path)) if is_url(text) else read_upright(Path(text))
            image, note = fit_image(image, width, height, crops_images(options), IMAGE_STRETCH)
            if note:
                run.say(f"--validation_images {public_urls(text)}: {note}")
            content = io.BytesIO()
            image.save(content, "PNG")
            write_atomically(path, content.getvalue())
    run.barrier()
    return paths


def crops_images(options: TrainOptions) -> bool:
    """Returns whether images are cropped to the shape of videos, as clips are; the pipeline itself stretches them."""
    return options.data.video_reshape_mode in ("center", "random")


def fetch(url: str, temporary: Path) -> "Image.Image":
    """Downloads an image. Messages omit the query of the URL, which may be a signature."""
    shown, fix = f"--validation_images {public_urls(url)}", "download it and give its path"
    try:
        temporary.write_bytes(download(url))
        return read_upright(temporary)
    except (OSError, http.client.HTTPException) as error:
        raise UsageError(f"{shown}: cannot be fetched ({error}); {fix}") from None
    except ValueError:  # includes the UsageError of read_upright
        raise UsageError(f"{shown}: is not a readable image; {fix}") from None
    finally:
        temporary.unlink(missing_ok=True)


class WebRedirectsOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects only to http and https, not to files or ftp."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> Request | None:
        """Returns the request for the new URL. Raises OSError if its scheme is neither http nor https."""
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise OSError(f"redirects to {public_urls(newurl)}, which is not http or https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str) -> bytes:
    """Downloads the content of an http or https URL.

    The download runs in a thread, which is abandoned if it takes too long in total. A socket timeout would not do: it
    limits neither a server that sends one byte per minute nor a slow name lookup.

    Raises:
        OSError: The download fails, takes longer than FETCH_SECONDS, or is larger than FETCH_BYTES.
        HTTPException: The answer is not HTTP.
    """
    result: list[bytes | Exception] = []

    def fetch() -> None:
        try:
            opener = urllib.request.build_opener(WebRedirectsOnly)
            with opener.open(url, timeout=FETCH_SECONDS) as reply:
                result.append(reply.read(FETCH_BYTES + 1))
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(FETCH_SECONDS)
    if not result:
        raise OSError(f"no complete answer after {FETCH_SECONDS} s")
    content = result[0]
    if isinstance(content, ValueError):  # the URL has no host, or invalid characters in it
        raise OSError(str(content))
    if isinstance(content, Exception):
        raise content
    if len(content) > FETCH_BYTES:
        raise OSError(f"larger than {FETCH_BYTES // 2**20} MiB")
    return content


def read_upright(path: Path) -> "Image.Image":
    """Reads an image file and returns it upright and in RGB."""
    from PIL import Image

    try:
        info = probe_picture(path)
        frame_HWC = read_picture(path, info, 1, info.height, info.width)[0]
    except (OSError, VideoError) as error:
        raise UsageError(f"--validation_images {error}") from None
    return Image.fromarray(frame_HWC)
