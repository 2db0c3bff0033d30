"""Color profiles of pictures: srgb_transform() gives the conversion to sRGB that an RGB profile asks for.

Phones write photographs in Display P3, whose numbers shown as sRGB look pale. Profiles of CMYK and grey pictures are
not followed.
"""

import io

import numpy as np
from PIL import Image, ImageCms

_STEPS = 9  # a channel, of the colors at which a profile is compared with sRGB
_ROUNDING = 2  # levels; profiles of sRGB differ from each other by as much


def srgb_transform(picture: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """The conversion of RGB pixels to sRGB; None without a profile, or where it is sRGB's own or unreadable."""
    content = picture.info.get("icc_profile")
    if not content:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        if profile.profile.xcolor_space.strip() != "RGB":
            return None
        srgb, intent = ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC
        transform = ImageCms.buildTransform(profile, srgb, "RGB", "RGB", intent)
    except (ImageCms.PyCMSError, OSError):  # as in browsers, what cannot be read is not followed
        return None
    return transform if _changes(transform) else None


def _changes(transform: ImageCms.ImageCmsTransform) -> bool:
    levels = np.linspace(0, 255, _STEPS).astype(np.uint8)
    colors_HWC = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(_STEPS, -1, 3)
    converted = np.asarray(transform.apply(Image.fromarray(colors_HWC)), int)
    return bool(np.abs(converted - colors_HWC).max() > _ROUNDING)
