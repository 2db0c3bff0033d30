"""Makes this process write pictures quickly.

PNG files are larger, but their pixels are the same: compressing the contact sheet of a validation takes a tenth of the
time of a short run. The picture of a run's curves is one pixel, because drawing it takes a third of that time.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from types import ModuleType
from typing import IO, Any


def compress_lightly() -> None:
    """Sets the lowest compression level for PNG files whose writer does not choose one."""
    from PIL import Image, PngImagePlugin

    Image.preinit()  # otherwise a later call would register Pillow's own function again
    write = PngImagePlugin._save

    def write_quickly(image: Image.Image, file: IO[bytes], name: str | bytes) -> None:
        chosen: dict[str, Any] = image.encoderinfo
        chosen.setdefault("compress_level", 1)
        write(image, file, name)

    Image.register_save("PNG", write_quickly)


def leave_curves_blank(replace: Callable[[ModuleType, str, Any], None] = setattr) -> None:
    """Replaces the picture of curves by one of a pixel. Like the real one, it needs matplotlib.

    Args:
        replace: Called with the module, the name of a function, and its replacement.
    """
    curves = importlib.import_module("cogvideox.runtime.curves")
    replace(curves, "curves_figure", lambda *_: importlib.import_module("matplotlib.figure"))
    replace(curves, "png", lambda figure: blank_png())


def blank_png() -> bytes:
    """Returns a PNG file of one pixel."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return file.getvalue()
