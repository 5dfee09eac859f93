"""The colours of a picture as its ICC profile means them, in sRGB."""

from __future__ import annotations

import io
import logging

from PIL import Image, ImageCms

_log = logging.getLogger(__name__)
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # Pillow's mode -> what a profile for it calls itself


def to_srgb(image: Image.Image) -> Image.Image:
    """`image` without its profile, in sRGB; as it is when it has no profile, or one that cannot be used.

    Transparency is kept. Pictures of 16 or more bits a channel are given back as they are.
    """
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or not profile or image.mode[0] in "IF":
        return image
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    plain = image.convert({"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB"))
    space = profile[16:20].decode("latin-1").strip()
    if space != _SPACES[plain.mode]:
        _log.warning("a colour profile for %r is ignored: the picture is %s", space, image.mode)
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(plain, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        _log.warning("a damaged colour profile is ignored: %s", error)
        return image
    if converted is None:  # only when it would work in place
        return image
    if alpha is not None:
        converted.putalpha(alpha)
    converted.info = {}
    return converted
