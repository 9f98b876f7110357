"""The cache of real images holds the results of autoencoder and text encoders, for every form of source."""

import io
import json
import shutil
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import invoke
from PIL import Image
from safetensors.torch import load_file
from tiny import make_teacher

from distill.config import load_config
from distill.data.embedding_cache import text_dtype
from distill.data.image_cache import EncodeProgress, ImageCache, check_examples, encode_examples
from distill.data.images import read_examples
from distill.errors import CacheError, ConfigError, ImageError
from distill.models.sd3 import encode_images, load_vae
from distill.models.sd3_folder import SD3Folder
from distill.models.text import SD3TextEncoder
from distill.models.vae import to_pixels
from distill.training import checkpoint

CAPTIONS = ["a red circle", "a blue square", "red and blue"]
SIDE = 16  # of the tiny teacher's images


def picture(seed: int, width: int = SIDE, height: int = SIDE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def captioned_folder(folder: Path) -> None:
    for i, caption in enumerate(CAPTIONS):
        (folder / f"{i}.png").write_bytes(png(picture(i)))
        (folder / f"{i}.txt").write_text(caption + "\n")


def listed_folder(folder: Path) -> None:
    lines = []
    for i, caption in enumerate(CAPTIONS):
        (folder / f"{9 - i}.png").write_bytes(png(picture(i)))  # the list's order stands, not the names'
        lines.append(json.dumps({"file_name": f"{9 - i}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def shards_folder(folder: Path) -> None:
    for number, rows in enumerate(([0, 1], [2])):
        with tarfile.open(folder / f"part-{number}.tar", "w") as shard:
            for i in rows:
                caption = {"json": json.dumps({"caption": CAPTIONS[i]})} if i else {"txt": CAPTIONS[i]}
                for suffix, data in [*((s, text.encode()) for s, text in caption.items()), ("png", png(picture(i)))]:
                    member = tarfile.TarInfo(f"deep/{i:03d}.{suffix}")
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))


def tar(path: Path, files: list[tuple[str, bytes | str]]) -> Path:
    """Write a shard of files in this order; text is a link to another file."""
    with tarfile.open(path, "w") as shard:
        for name, data in files:
            member = tarfile.TarInfo(name)
            if isinstance(data, str):
                member.type, member.linkname = tarfile.LNKTYPE, data
                shard.addfile(member)
            else:
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    return path


def last(teacher: Path, source: Path | str, out: Path, **options: int) -> EncodeProgress:
    *_, encoded = encode_examples(SD3Folder.read(teacher), read_examples(str(source)), out, **options)
    return encoded


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("write", [captioned_folder, listed_folder, shards_folder])
def test_rows_are_what_the_encoders_make(write, teacher, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write(source)
    assert last(teacher, source, tmp_path / "cache", shard_rows=2) == EncodeProgress(3, 0, 0)
    rows = ImageCache(tmp_path / "cache", SD3Folder.read(teacher)).rows(torch.tensor([2, 0, 1]))
    pixels = to_pixels(np.stack([np.asarray(picture(i)) for i in (2, 0, 1)]))
    torch.testing.assert_close(rows.x_0, encode_images(load_vae(SD3Folder.read(teacher)), pixels))
    cond = SD3TextEncoder.load(SD3Folder.read(teacher), dtype=text_dtype("cpu")).encode(
        [CAPTIONS[i] for i in (2, 0, 1)]
    )
    torch.testing.assert_close(rows.cond.embeds, cond.embeds)
    torch.testing.assert_close(rows.cond.pooled, cond.pooled)


def test_the_middle_is_cut_out_upright_and_on_white(teacher, tmp_path):
    """A wide image whose middle is red, a transparent one, and one that EXIF turns upside down."""
    wide = Image.new("RGB", (5 * SIDE, SIDE), "blue")
    wide.paste("red", (2 * SIDE, 0, 3 * SIDE, SIDE))
    clear = Image.new("RGBA", (SIDE, SIDE), (255, 0, 0, 0))
    turned = Image.new("RGB", (2 * SIDE, 2 * SIDE), "green")
    turned.paste("blue", (0, SIDE, 2 * SIDE, 2 * SIDE))
    exif = Image.Exif()
    exif[0x0112] = 3
    wide.save(tmp_path / "0.png")
    clear.save(tmp_path / "1.webp", lossless=True)
    turned.save(tmp_path / "2.png", exif=exif)
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("")
    last(teacher, tmp_path, tmp_path / "cache")
    expected = [Image.new("RGB", (SIDE, SIDE), color) for color in ("red", "white", "blue")]
    expected[2].paste("green", (0, SIDE // 2, SIDE, SIDE))
    rows = ImageCache(tmp_path / "cache", SD3Folder.read(teacher)).rows(torch.tensor([0, 1]))
    pixels = to_pixels(np.stack([np.asarray(image) for image in expected]))
    latents = encode_images(load_vae(SD3Folder.read(teacher)), pixels)
    torch.testing.assert_close(rows.x_0, latents[:2], atol=1e-4, rtol=1e-3)
    third = ImageCache(tmp_path / "cache", SD3Folder.read(teacher)).rows(torch.tensor([2])).x_0
    away = encode_images(load_vae(SD3Folder.read(teacher)), to_pixels(np.asarray(expected[2])[None, ::-1].copy()))
    assert (third - latents[2:]).abs().mean() < 0.2 * (third - away).abs().mean()


@pytest.mark.parametrize(
    ("names", "captions", "passed", "unused"),
    [
        (["2.0 a.png", "2.0 a.txt", "2.0 b.png", "2.0 b.txt"], ["2.0 a.txt", "2.0 b.txt"], [], []),
        (["0.png", "0.mask.png", "0.txt"], ["0.txt"], [], ["0.mask.png"]),
        (["0.thumb.png", "0.png", "0.cls", "0.txt", "LICENSE"], ["0.txt"], [], ["0.thumb.png", "LICENSE"]),
        (["0.png", "0.txt", "0.seg.png", "0.seg.txt"], ["0.txt", "0.seg.txt"], [], []),
        (["a/0.png", "b/0.txt", "b/0.png", "a/0.txt"], ["a/0.txt", "b/0.txt"], [], []),
        (["1.txt", "0.png", "0.txt", "1.png"], ["1.txt", "0.txt"], [], []),
        (["0.PNG", "0.TXT"], ["0.TXT"], [], []),
        (["0.png", "0.jpg", "0.txt", "1.png", "1.txt"], ["1.txt"], ["0"], []),
        (["0.png", "0.txt", "0.png", "1.png", "1.txt"], ["1.txt"], ["0"], []),
        (["0.png", "0.txt", "0.txt", "1.png", "1.txt"], ["1.txt"], ["0"], []),
        (["0.avif", "0.txt", "1.png", "1.txt", "2.png"], ["1.txt"], ["0", "2"], []),
        (["._0.png", "0.png", "._0.txt", "0.txt"], ["0.txt"], [], ["._0.png", "._0.txt"]),
        (["0.png", "0.txt", "1.png -> 0.png", "1.txt -> 0.txt"], ["0.txt"], [], ["1.png", "1.txt"]),
    ],
)
def test_a_sample_of_a_shard_is_an_image_and_a_caption_of_one_name(names, captions, passed, unused, teacher, tmp_path):
    """Captions are the names of their files; everything that is not encoded is listed."""
    files = []
    for name, _, target in (each.partition(" -> ") for each in names):
        data = png(picture(0)) if name.lower().endswith((".png", ".jpg")) else name.encode()
        files.append((name, target or data))
    shard = tar(tmp_path / "part.tar", files)
    found = last(teacher, shard, tmp_path / "cache")
    assert (found.images, found.skipped, found.unused) == (len(captions), len(passed), len(unused))
    rows, skipped = (
        [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for path in (tmp_path / "cache" / "images.jsonl", tmp_path / "cache" / "skipped.jsonl")
    )
    assert [row["caption"] for row in rows] == captions
    assert sorted(line["name"] for line in skipped) == sorted(f"part.tar/{name}" for name in (*passed, *unused))


@pytest.mark.parametrize(
    ("entry", "caption", "fault"),
    [
        ({"text": 3}, "", "holds a number as 'text', not text"),
        ({"caption": [["a"]]}, "", "holds a list as 'caption', not text"),
        ({"caption": ["a", "b"]}, "a", ""),
        ({"Text": "a"}, "a", ""),
        ({"prompt": None, "text": "a"}, "a", ""),
        ({"text": ""}, "", ""),
        ({"text": None}, "", "it has no caption"),
        ({"words": "a"}, "", "has no column prompt or caption or text, only file_name, words"),
        ({"text": "\ud83d"}, "", "half of a character"),
    ],
)
def test_a_caption_is_text_or_its_fault_is_named(entry, caption, fault, tmp_path):
    (tmp_path / "0.png").write_bytes(png(picture(0)))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png"} | entry))
    (example,) = read_examples(str(tmp_path))
    assert example.caption == caption
    assert fault in example.fault
    assert bool(fault) == bool(example.fault)
    if "words" in entry:
        (example,) = read_examples(str(tmp_path), column="words")
        assert example.caption == "a"


def test_texts_without_an_image_are_named_and_hidden_files_are_not_read(teacher, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    captioned_folder(source)
    (source / "._0.png").write_bytes(b"what macOS leaves")
    (source / ".ipynb_checkpoints").mkdir()
    for suffix in ("png", "txt"):  # a copy that Jupyter leaves
        shutil.copy(source / f"0.{suffix}", source / ".ipynb_checkpoints" / f"0-checkpoint.{suffix}")
    (source / "2.5 b.JPG").write_bytes(png(picture(0)))
    (source / "2.5 b.TXT").write_text("a circle")
    (source / "3.bmp").write_bytes(b"BM")
    (source / "3.txt").write_text("a circle")
    assert last(teacher, source, tmp_path / "cache") == EncodeProgress(4, 1, 0)
    assert '"name": "3.txt"' in (tmp_path / "cache" / "skipped.jsonl").read_text()


@pytest.mark.parametrize("write", [captioned_folder, listed_folder, shards_folder])
def test_images_that_were_changed_in_place_are_known(write, teacher, tmp_path):
    """Even if the new image has the name and the size of the old one."""
    source = tmp_path / "source"
    source.mkdir()
    write(source)
    last(teacher, source, tmp_path / "cache")
    check_examples(SD3Folder.read(teacher), read_examples(str(source)), tmp_path / "cache")
    path = next(path for path in sorted(source.iterdir()) if path.suffix in (".png", ".tar"))
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match="made of other images than the source holds now"):
        check_examples(SD3Folder.read(teacher), read_examples(str(source)), tmp_path / "cache")


def test_what_cannot_be_used_is_named_and_passed_over(teacher, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    captioned_folder(source)
    whole = (source / "1.png").read_bytes()
    (source / "1.png").write_bytes(whole[: len(whole) // 2])
    (source / "2.txt").unlink()
    (source / "3.jpg").write_text("no image")
    (source / "3.txt").write_text("a circle")
    assert last(teacher, source, tmp_path / "cache") == EncodeProgress(1, 3, 0)
    lines = [json.loads(line) for line in (tmp_path / "cache" / "skipped.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["1.png", "2.png", "3.jpg"]
    assert "caption" in lines[1]["reason"]
    assert len(ImageCache(tmp_path / "cache", SD3Folder.read(teacher))) == 1


def test_too_many_that_cannot_be_used_are_an_error(teacher, tmp_path):
    for i in range(11):
        (tmp_path / f"{i:02d}.png").write_text("no image")
        (tmp_path / f"{i:02d}.txt").write_text("a circle")
    with pytest.raises(
        ImageError,
        match=r"11 of 11 images cannot be used, the last of them 10\.png: it is not a JPEG, PNG or WebP image",
    ):
        last(teacher, tmp_path, tmp_path / "cache")


def test_the_error_of_images_none_of_which_can_be_used_says_why(teacher, tmp_path):
    shard = tar(tmp_path / "0.tar", [("0.left.jpg", b"x"), ("0.right.jpg", b"x"), ("0.txt", b"both")])
    with pytest.raises(ImageError, match=r"3 were skipped, the last of them 0\.tar/0: it has no image"):
        last(teacher, shard, tmp_path / "cache")


def test_sources_that_are_none_are_named(teacher, tmp_path):
    with pytest.raises(ImageError, match=r"no images at .*missing"):
        next(read_examples(str(tmp_path / "missing")))
    with pytest.raises(ImageError, match="holds no images"):
        next(read_examples(str(tmp_path)))
    for line in ('{"file": "a.png"}', "[" * 100_000):
        (tmp_path / "metadata.jsonl").write_text(line)
        with pytest.raises(ImageError, match="line 1 is not a JSON object with a `file_name`"):
            next(read_examples(str(tmp_path)))
    (tmp_path / "metadata.jsonl").unlink()
    shards_folder(tmp_path)
    shard = tmp_path / "part-0.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(ImageError, match=r"part-0\.tar is not a complete, uncompressed tar file"):
        list(read_examples(str(tmp_path)))


def test_a_killed_call_continues_to_the_same_bytes(teacher, tmp_path):
    out = tmp_path / "killed"
    killed = encode_examples(SD3Folder.read(teacher), read_examples("scenes", 9), out, shard_rows=4)
    while not (out / "images.unfinished.json").exists():
        next(killed)
    killed.close()
    with pytest.raises(CacheError, match=r"not a complete image cache .*encode again, which continues it"):
        ImageCache(out, SD3Folder.read(teacher))
    with pytest.raises(CacheError, match="begun with other images"):
        list(encode_examples(SD3Folder.read(teacher), read_examples("scenes", 9, seed=1), out, shard_rows=4))
    first = (out / "shard-00000.safetensors").stat().st_mtime_ns
    for folder in (out, tmp_path / "whole"):
        list(encode_examples(SD3Folder.read(teacher), read_examples("scenes", 9), folder, shard_rows=4))
    assert (out / "shard-00000.safetensors").stat().st_mtime_ns == first
    assert contents(out) == contents(tmp_path / "whole")
    assert len(ImageCache(out, SD3Folder.read(teacher))) == 9
    assert len(ImageCache(out, SD3Folder.read(teacher), count=5)) == 5
    with pytest.raises(CacheError, match="teacher_digest"):
        ImageCache(out, SD3Folder.read(make_teacher(tmp_path / "other", seed=5)))
    with pytest.raises(CacheError, match="holds images already"):
        list(encode_examples(SD3Folder.read(teacher), [], out))


def test_a_scene_is_the_same_however_many_are_asked_for():
    few, many = list(read_examples("scenes", 2, seed=3)), list(islice(read_examples("scenes", 5, seed=3), 2))
    assert [(each.caption, each.read()) for each in few] == [(each.caption, each.read()) for each in many]
    assert few[0].read() != few[1].read()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method.name=dmd", "method.gan.fake=1e-2"], ["real.source", "dmd"]),
        (["method.alpha=0.5", "method.realuid.a=0.95", "method.realuid.b=0.9"], ["real.source", "fgm"]),
        (["method={name: dmd, gan: {}}", "real.source=scenes", "sizes=[[64, 64]]"], ["sizes", "native size"]),
        (["real.source=scenes"], ["real", "takes no real images"]),
        (["real.source=scenes", "real.sauce=1"], ["real.sauce", "did you mean 'source'"]),
    ],
)
def test_real_images_are_named_where_they_are_needed_and_only_there(overrides, words):
    with pytest.raises(ConfigError) as caught:
        load_config("scenes-debug", overrides)
    assert all(word in str(caught.value) for word in words)


def test_a_run_takes_real_images_from_a_cache(teacher, tmp_path):
    arguments = ["encode", str(teacher), "scenes", "--out", str(tmp_path / "real"), "--count", "8", "--device", "cpu"]
    encoded = invoke(*arguments)
    assert encoded.exit_code == 0, encoded.output
    assert "The latents of 8 images are in" in encoded.output

    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    values = [f"teacher={teacher}", f"prompts.source={tmp_path / 'prompts.txt'}", f"real.source={tmp_path / 'real'}"]
    values += [
        "method={name: dmd, gan: {}, fake_steps: 1}",
        "networks.kind=lora",
        "batch=4",
        "images=8",
        "cadence.checkpoint=8",
        "cadence.log=4",
        "cadence.sample=8",
    ]
    done = invoke("run", "scenes-debug", *(f"--set={value}" for value in values), "--out", str(tmp_path / "run"))
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "student" / "onestep.json").exists()
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics.keys() >= {"critic", "doubt", "gap", "flow_matching"}
    state = load_file(checkpoint.latest(tmp_path / "run" / "checkpoints") / "state.safetensors")
    assert "fake/critic.logit.weight" in state
    assert not any("critic" in name for name in state if not name.startswith("fake"))
    assert not (tmp_path / "run" / "images").exists()
