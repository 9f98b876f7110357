"""The media type that an `Accept` header asks for."""

import pytest

from service.http.accept import image_type


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", None),
        ("application/json, image/png", None),
        ("image/webp;q=0.5, application/json", None),
        ("application/json;q=0.5, image/webp", "image/webp"),
        ("image/webp;q=0.5, image/jpeg;q=0.8, */*;q=0.1", "image/jpeg"),
        ("image/png;q=0, */*", None),
        ("IMAGE/PNG;q=x", "image/png"),
        ("text/html", None),
        ("text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2", None),  # Java's HttpURLConnection
        ("text/html, application/xml;q=0.9, image/avif, image/webp, */*;q=0.8", None),  # browsers
        ("image/avif, image/webp, image/*, */*;q=0.8", "image/webp"),  # of an <img>
        ("*/*;q=0.9, image/png;q=.1", None),
        ("image/png;q=.9, */*;q=.1", "image/png"),
        ("image/png, application/json", None),
        ("image/webp, image/png", "image/webp"),
        ("image/*", "image/png"),
        ("image/png, garbage", "image/png"),
        ("image/gif", None),
        ("image/png" + 3000 * ";", None),
    ],
)
def test_an_image_is_sent_if_it_is_preferred_over_everything_else(accept, kind):
    assert image_type(accept, None) == kind


@pytest.mark.parametrize("accept", ["image/*", "image/png, image/webp;q=0.9", "image/png, image/webp"])
def test_the_output_format_decides_between_several_accepted_image_types(accept):
    assert image_type(accept, "webp") == "image/webp"
