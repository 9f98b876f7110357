"""Decoded images as 8-bit sRGB, upright and on white, for any mode, color profile and orientation."""

from contextlib import suppress
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngImageFile

_LEVELS = {"L;2": 85, "L;4": 17}  # 8-bit value of one step in 2 or 4 bits
_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # pixel mode, by a profile's color space


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert to RGB as a color-managed viewer shows the image on a white page.

    EXIF decides the orientation, and an ICC profile the colors. 16-bit gray is scaled to 8 bits. A profile that cannot
    be read, or is for another color space than the pixels', is ignored, as in browsers.
    """
    profile = image.info.get("icc_profile")
    _scale_clear_color(image)
    colors, alpha = _parts(ImageOps.exif_transpose(image))
    rgb = _managed(colors, profile) if profile else colors.convert("RGB")
    if alpha is None:
        return rgb
    page = Image.new("RGB", rgb.size, "white")
    page.paste(rgb, mask=alpha)
    return page


def _scale_clear_color(image: Image.Image) -> None:
    """Scale a PNG's transparent color to 8 bits, as its pixels are; Pillow does not do so."""
    stored = image.tile[0].args if isinstance(image, PngImageFile) and image.tile else None
    clear = image.info.get("transparency")
    if stored in _LEVELS and isinstance(clear, int):
        image.info["transparency"] = clear * _LEVELS[stored]
    elif stored == "RGB;16B" and clear is not None:
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def _parts(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colors in L, RGB or CMYK, and opacity, if the image is transparent anywhere."""
    if image.mode.startswith("I"):  # 16-bit gray
        values = np.asarray(image).astype(np.int64)
        gray = Image.fromarray(((values.clip(0, 65535) + 128) // 257).astype(np.uint8))
        clear = image.info.get("transparency")
        return gray, None if clear is None else Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
    is_gray = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image = image.convert("LA" if is_gray else "RGBA")
        alpha = image.getchannel("A")
        return image.convert("L" if is_gray else "RGB"), alpha
    return image if image.mode == "CMYK" else image.convert("L" if is_gray else "RGB"), None


def _managed(colors: Image.Image, profile: bytes) -> Image.Image:
    """Convert to RGB by the color profile, if it is usable."""
    with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        mode = _MODES.get(source.profile.xcolor_space.strip())
        if colors.mode == "L" and mode == "RGB":
            colors = colors.convert("RGB")
        if colors.mode == mode:
            converted = ImageCms.profileToProfile(colors, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            assert converted is not None  # it is None only for in-place conversion
            return converted
    return colors.convert("RGB")
