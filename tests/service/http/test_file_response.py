"""Responses with a file that may be deleted at any time."""

import asyncio

import pytest

from service.errors import NotFound
from service.http.file_response import StoredFileResponse


async def body(path, headers=()) -> bytes:
    """Send a response, and delete its file as soon as the response has started."""
    sent = []

    async def send(message):
        if message["type"] == "http.response.start":
            path.unlink()
        sent.append(message.get("body", b""))

    scope = {"type": "http", "method": "GET", "headers": headers, "asgi": {"spec_version": "2.4"}}
    await StoredFileResponse(path)(scope, None, send)
    return b"".join(sent)


def test_a_deletion_does_not_interrupt_a_response(tmp_path):
    content = bytes(range(256)) * 1024
    for headers, expected in ([(), content], [[(b"range", b"bytes=5-200000")], content[5:200_001]]):
        (tmp_path / "file").write_bytes(content)
        assert asyncio.run(body(tmp_path / "file", headers)) == expected


def test_a_deleted_file_is_not_found(tmp_path):
    with pytest.raises(NotFound, match="any more") as missing:
        asyncio.run(body(tmp_path / "file"))
    assert missing.value.code == "file_not_found"
