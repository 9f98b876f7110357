"""The response type that an `Accept` header prefers: JSON, or the bytes of an image."""

from functools import lru_cache
from typing import Any

import mimeparse

from service.schemas import OutputFormat

IMAGES: dict[str, OutputFormat] = {"image/png": "png", "image/jpeg": "jpeg", "image/webp": "webp"}
MAX_CHARACTERS = 2048  # the parser takes quadratic time; a longer header is disregarded, as RFC 9110 (12.5.1) allows


def image_type(accept: str, output_format: OutputFormat | None) -> str | None:
    """Return the media type of the image, if the client prefers an image over everything else; otherwise None.

    Of several image types it is that of `output_format`, else the preferred one, else the first one named.
    """
    return None if len(accept) > MAX_CHARACTERS else _preferred(accept, output_format)


@lru_cache(maxsize=256)  # clients send few different ones
def _preferred(accept: str, output_format: OutputFormat | None) -> str | None:
    ranges = _ranges(accept)
    named = [f"{kind}/{subtype}" for kind, subtype, _ in ranges]
    others = max((float(params["q"]) for kind, _, params in ranges if kind != "image"), default=0.0)  # including JSON

    def rank(image: str) -> tuple[bool, float, float, int]:
        quality, fitness = mimeparse.quality_and_fitness_parsed(image, ranges)
        place = named.index(image) if image in named else len(named)
        return quality > others and IMAGES[image] == output_format, quality, fitness, -place

    best = max(IMAGES, key=rank)
    return best if mimeparse.quality_parsed(best, ranges) > others else None


def _ranges(accept: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Parse the header's media ranges; malformed ones are left out."""
    ranges = []
    for text in accept.lower().split(","):
        try:
            ranges.append(mimeparse.parse_media_range(text.strip()))
        except mimeparse.MimeTypeParseException:
            continue
    return ranges
