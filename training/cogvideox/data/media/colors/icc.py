"""Converts the colors of pictures with an ICC profile to sRGB.

``srgb_transform`` returns the conversion that the RGB profile of a picture requires. Phones store photographs in
Display P3, whose numbers look pale if they are shown as sRGB. Profiles of CMYK and gray pictures are ignored.
"""

import io

import numpy as np
from PIL import Image, ImageCms

_STEPS = 9  # values of each channel at which a profile is compared with sRGB
_ROUNDING = 2  # levels of 255 by which different profiles of sRGB differ from each other


def srgb_transform(picture: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """Returns the conversion of a picture's RGB pixels to sRGB.

    It is None if there is no profile, or if the profile is unreadable, not for RGB, or equal to sRGB.
    """
    content = picture.info.get("icc_profile")
    if not content:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        if profile.profile.xcolor_space.strip() != "RGB":
            return None
        srgb, intent = ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC
        transform = ImageCms.buildTransform(profile, srgb, "RGB", "RGB", intent)
    except (ImageCms.PyCMSError, OSError):  # an unreadable profile is ignored, as browsers do
        return None
    return transform if _changes(transform) else None


def _changes(transform: ImageCms.ImageCmsTransform) -> bool:
    """Returns whether a conversion changes any color by more than rounding."""
    levels = np.linspace(0, 255, _STEPS).astype(np.uint8)
    colors_HWC = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(_STEPS, -1, 3)
    converted = np.asarray(transform.apply(Image.fromarray(colors_HWC)), int)
    return bool(np.abs(converted - colors_HWC).max() > _ROUNDING)
