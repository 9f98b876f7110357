"""Linked images: their expiry, and who can read them."""

import asyncio

import fsspec
import pytest
from worker_threads import worker_threads

from service.app import create_app
from service.engine.simulator import Simulator
from service.errors import StartError
from service.images.artifacts import ArtifactStore
from service.settings import Settings


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_images_expire_and_are_swept(tmp_path):
    clock = Clock()
    store = ArtifactStore(str(tmp_path), b"secret", 100, clock)
    same = ArtifactStore(f"file://{tmp_path}", b"secret", 100, clock)  # another server with the secret
    (tmp_path / "other.txt").write_text("not an image")

    async def test() -> None:
        old = await store.save(b"data", "png")
        clock.now = 1050.0
        new = await store.save(b"data", "png")
        long = await store.save(b"data", "webp", lifetime=500)
        clock.now = 1099.0
        assert await store.read(old, store.sign(old)) == (b"data", "png")
        assert await store.read(old, store.sign(new)) is None
        clock.now = 1100.0
        assert await store.read(old, store.sign(old)) is None
        outside = "../other.txt"
        assert await store.read(outside, store.sign(outside)) is None
        clock.now = 1120.0
        assert await store.sweep() == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == [new, long, "other.txt"]
        assert await same.read(new, store.sign(new)) == (b"data", "png")
        clock.now = 1500.0
        assert await same.read(long, store.sign(long)) == (b"data", "webp")

    asyncio.run(test())
    store.close()
    same.close()


def test_a_sweep_of_an_object_store_without_the_folder_finds_nothing():
    clock = Clock()
    store = ArtifactStore("memory://links", b"secret", 100, clock)
    files = fsspec.filesystem("memory")
    files.rm("links", recursive=True)

    async def test() -> None:
        assert await store.sweep() == 0
        await store.save(b"one", "png")
        clock.now = 1100.0
        assert await store.sweep() == 1

    asyncio.run(test())
    store.close()


@pytest.mark.parametrize("content", [b"", b"\n", b"half of it", bytes(32)])
def test_a_damaged_secret_is_refused(tmp_path, content):
    (tmp_path / "secret").write_bytes(content)
    with pytest.raises(StartError, match=r"secret, which signs links to images, is damaged"):
        create_app(Settings(data=tmp_path), worker_threads(Simulator()))
    assert (tmp_path / "secret").read_bytes() == content
    (tmp_path / "secret").unlink()
    create_app(Settings(data=tmp_path), worker_threads(Simulator()))
    assert len((tmp_path / "secret").read_bytes()) == 32
