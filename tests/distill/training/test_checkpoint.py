"""Checkpoints are complete or absent, and damage is found."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.errors import CheckpointError, DivergedError
from distill.plan.meter import Meter
from distill.training import checkpoint


def test_a_full_disk_is_one_sentence_and_the_checkpoint_before_stays(tmp_path):
    import resource

    tensors = {"x": torch.zeros(1000)}
    checkpoint.save(tmp_path / "000000000001", tensors, {"images": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(CheckpointError, match="make room"):
            checkpoint.save(tmp_path / "000000000002", {"x": torch.zeros(1 << 20)}, {"images": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert checkpoint.latest(tmp_path) == tmp_path / "000000000001"
    assert [path.name for path in tmp_path.iterdir()] == ["000000000001"]
    assert torch.equal(checkpoint.load(tmp_path / "000000000001")[0]["x"], tensors["x"])


def test_a_checkpoint_takes_the_memory_of_one_tensor(tmp_path):
    """Transposed tensors are copied before they are written, as those of a GPU are."""
    tensors = {str(number): torch.randn(64, 48).T for number in range(20)}
    with Meter() as meter:
        checkpoint.save(tmp_path / "000000000001", tensors, {"images": 1})
    assert 0 < meter.peak <= 2.5 * tensors["0"].nbytes  # a copy, or what the check of its numbers needs
    for name, tensor in checkpoint.load(tmp_path / "000000000001")[0].items():
        assert torch.equal(tensor, tensors[name])


def test_tensors_of_any_type_and_shape_are_read_as_they_were_written(tmp_path):
    kinds = [torch.bool, torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64]
    shapes = [(), (3,), (0, 2), (5, 1)]
    tensors = {f"{kind} {shape}": torch.full(shape, 1).to(kind) for kind in kinds for shape in shapes}
    checkpoint.save(tmp_path / "000000000001", tensors, {"images": 1})
    found = load_file(tmp_path / "000000000001" / "state.safetensors")
    assert found.keys() == tensors.keys()
    assert all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in tensors.items()
    )


@pytest.mark.parametrize(("name", "content"), [("state.safetensors", "cut off"), ("state.json", "[" * 100_000)])
def test_a_damaged_checkpoint_is_named(tmp_path, name, content):
    folder = tmp_path / "000000000001"
    checkpoint.save(folder, {"x": torch.zeros(1000)}, {"images": 1})
    (folder / name).write_text(content)
    assert checkpoint.latest(tmp_path) is None
    with pytest.raises(CheckpointError, match="000000000001"):
        checkpoint.load(folder)


def test_a_damaged_newest_checkpoint_is_passed_over_said_and_written_anew(tmp_path, caplog):
    for images in (1, 2):
        checkpoint.save(tmp_path / checkpoint.state_name(images), {"x": torch.full((9,), images)}, {"images": images})
    newest = tmp_path / checkpoint.state_name(2)
    with (newest / "state.safetensors").open("r+b") as file:
        file.truncate(100)
    assert checkpoint.latest(tmp_path) == tmp_path / checkpoint.state_name(1)
    assert str(newest) in caplog.text
    checkpoint.save(newest, {"x": torch.full((9,), 2)}, {"images": 2})
    assert checkpoint.latest(tmp_path) == newest
    assert checkpoint.load(newest)[0]["x"][0] == 2


def test_states_that_cannot_be_read_do_not_count_among_those_that_are_kept(tmp_path):
    """A run whose two newest checkpoints are damaged goes on from the third one, and stops again before them."""

    def save(images):
        checkpoint.save(tmp_path / checkpoint.state_name(images), {"x": torch.ones(9)}, {"images": images})
        return tmp_path / checkpoint.state_name(images)

    def there():
        return [int(path.name) for path in checkpoint.states(tmp_path)]

    for images in (1, 2, 5, 6):
        save(images)
    for images in (5, 6):
        (tmp_path / checkpoint.state_name(images) / "state.safetensors").write_text("cut off")
    checkpoint.prune(save(3), 2)
    assert there() == [2, 3, 5, 6]
    checkpoint.prune(newest := save(4), 1)
    assert there() == [4, 5, 6]
    assert checkpoint.latest(tmp_path) == newest
    checkpoint.keep_only(newest)
    assert there() == [4]


@pytest.mark.parametrize("at", [0.3, 0.9])
@pytest.mark.parametrize("damage", [b"\xff" * 8, b"\x01"])
def test_a_checkpoint_with_other_bytes_than_were_written_is_passed_over(at, damage, tmp_path, caplog):
    for images in (1, 2):
        checkpoint.save(tmp_path / checkpoint.state_name(images), {"x": torch.ones(999)}, {"images": images})
    newest = tmp_path / checkpoint.state_name(2)
    file = newest / "state.safetensors"
    with file.open("r+b") as opened:
        opened.seek(int(at * file.stat().st_size))
        opened.write(damage)
    assert checkpoint.latest(tmp_path) == tmp_path / checkpoint.state_name(1)
    assert f"{newest} cannot be read (the checksum of state.safetensors" in caplog.text
    with pytest.raises(CheckpointError, match=r"checksum.*remove it to go on from the one before"):
        checkpoint.load(newest)
    record = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps([record]))
    assert checkpoint.latest(tmp_path) == tmp_path / checkpoint.state_name(1)


def test_a_number_that_is_not_finite_is_neither_saved_nor_loaded(tmp_path):
    folder = tmp_path / checkpoint.state_name(2)
    for bad in (float("nan"), float("-inf")):
        with pytest.raises(DivergedError, match="average/x is not finite after 2 images"):
            checkpoint.save(folder, {"average/x": torch.tensor([0.0, bad])}, {"images": 2})
        assert not folder.exists()
    checkpoint.save(folder, {"average/x": torch.zeros(2)}, {"images": 2})
    save_file({"average/x": torch.tensor([0.0, float("nan")])}, folder / "state.safetensors")
    (folder / "state.json").write_text('{"images": 2}')  # as an earlier version wrote it, without a checksum
    for part in ("", "average"):
        with pytest.raises(CheckpointError, match="average/x is not finite"):
            checkpoint.load(folder, part)
