"""The training loop: sums of gradients, random numbers, and prefetching."""

import threading
from functools import partial

import parity
import pytest
import torch
from accelerate import Accelerator
from commands import GARBAGE
from parity import IMAGES, SHAPE, Prompts
from tiny import make_teacher

from distill.config import Optimizer
from distill.data import batches
from distill.errors import CacheError, ConfigError, DivergedError, RunError
from distill.methods.base import Real, TrainedNetworks
from distill.models.sd3 import load_transformer
from distill.models.sd3_folder import SD3Folder
from distill.models.text import TextCondition
from distill.training import checkpoint, trainer
from distill.training.initial_weights import read_initial_weights
from distill.training.networks import build
from distill.training.optimizers import adam


def metrics(teacher, out, **more):
    """Return the metrics of one round."""
    config = parity.run(images=IMAGES, **more)
    (progress,) = trainer.train(config, out, parity.shared(teacher), Prompts(), [SHAPE], Accelerator(cpu=True))
    return progress.metrics


def test_micro_batches_add_up_to_the_whole_batch_s_gradient(teacher, tmp_path):
    whole = metrics(teacher, tmp_path / "whole")
    for micro in (1, 2):
        parts = metrics(teacher, tmp_path / str(micro), micro_batch=micro)
        for role in ("fake", "student"):
            assert parts[f"gradient_norm/{role}"] == pytest.approx(whole[f"gradient_norm/{role}"], rel=1e-3)
            assert parts[f"loss/{role}"] == pytest.approx(whole[f"loss/{role}"], rel=1e-3, abs=1e-4)


class Damaged(Prompts):
    """Conditions whose first batch, that of the fake's first step, is NaN."""

    asked = 0

    def rows(self, indices):
        self.asked += 1
        cond = super().rows(indices)
        return TextCondition(cond.embeds * torch.nan, cond.pooled) if self.asked == 1 else cond


def test_a_gradient_that_is_not_finite_is_skipped_and_counted_and_the_run_goes_on(teacher, tmp_path):
    networks = parity.shared(teacher)
    before = {role: {name: t.detach().clone() for name, t in networks.trainable(role).items()} for role in parity.ROLES}
    config = parity.run(images=2 * IMAGES, **{"cadence.log": IMAGES, "optimizer.max_skipped_steps": 1})
    rounds = trainer.train(config, tmp_path, networks, Damaged(), [SHAPE], Accelerator(cpu=True))
    first = next(rounds)
    assert (first.metrics["skipped/fake"], first.metrics["skipped/student"]) == (1, 0)
    assert "gradient_norm/fake" not in first.metrics
    fake, student = (networks.trainable(role) for role in parity.ROLES)
    assert all(torch.equal(tensor, before["fake"][name]) for name, tensor in fake.items())
    assert any(not torch.equal(tensor, before["student"][name]) for name, tensor in student.items())
    (second,) = rounds
    assert (second.metrics["skipped/fake"], second.metrics["skipped/student"]) == (0, 0)
    assert any(not torch.equal(tensor, before["fake"][name]) for name, tensor in fake.items())
    assert all(tensor.isfinite().all() for tensor in (*fake.values(), *student.values()))


def test_steps_that_were_skipped_in_a_row_end_the_run_also_if_the_next_is_sound(teacher, tmp_path):
    """As with a CUDA graph, whose counts are read at lines of the log only."""
    config = parity.run(images=2 * IMAGES, **{"cadence.log": IMAGES, "optimizer.max_skipped_steps": 0})
    rounds = trainer.train(config, tmp_path, parity.shared(teacher), Damaged(), [SHAPE], Accelerator(cpu=True))
    with pytest.raises(DivergedError, match="the fake's gradient was not finite 1 times in a row after 0 images"):
        next(rounds)


def test_a_folder_that_vanishes_ends_the_run_which_goes_on_where_it_went(teacher, tmp_path):
    def rounds(out):
        return trainer.train(parity.run(), out, parity.shared(teacher), Prompts(), [SHAPE], Accelerator(cpu=True))

    here, there = tmp_path / "here", tmp_path / "there"
    going = rounds(here)
    assert [next(going).images, next(going).images] == [IMAGES, 2 * IMAGES]  # a checkpoint after the second
    here.rename(there)
    with pytest.raises(RunError, match="here is gone; if it was moved, the same command"):
        next(going)
    assert not here.exists()
    assert [progress.images for progress in rounds(there)] == [2 * IMAGES, 3 * IMAGES, 4 * IMAGES]


def starting(config, teacher):
    """Return the initial weights that `distill run` passes to the trainer."""
    if config.init_from is None:
        return None
    return partial(read_initial_weights, config, SD3Folder.read(teacher), parity.CPU)


def test_a_run_starts_where_another_stands(teacher, tmp_path):
    first = parity.shared(teacher)
    machine = Accelerator(cpu=True)
    *_, end = trainer.train(parity.run(), tmp_path / "first", first, Prompts(), [SHAPE], machine)
    expected = {role: {name: t.clone() for name, t in first.trainable(role).items()} for role in parity.ROLES}
    average = {name: tensor.clone() for name, tensor in end.average.items()}

    second = parity.shared(teacher)
    config = parity.run(
        init_from=tmp_path / "first", images=IMAGES, **{"optimizer.warmup_images": 10**12, "method.alpha": 0.5}
    )
    (progress,) = trainer.train(
        config, tmp_path / "second", second, Prompts(), [SHAPE], machine, start=starting(config, teacher)
    )
    for role in parity.ROLES:
        for name, tensor in second.trainable(role).items():
            torch.testing.assert_close(tensor.detach(), expected[role][name])  # a rate of nothing moved nothing
    for name, tensor in progress.average.items():
        between = torch.stack([average[name], expected["student"][name]])
        assert (tensor >= between.amin(0) - 1e-6).all()
        assert (tensor <= between.amax(0) + 1e-6).all()


def test_a_critic_begins_anew_or_is_left_behind_where_only_one_of_two_runs_has_one(teacher, tmp_path):
    class Reals:
        def __len__(self):
            return 3

        def rows(self, indices):
            return Real(torch.zeros(len(indices), *SHAPE), Prompts().rows(torch.zeros(len(indices), dtype=torch.int64)))

        def shuffle(self, generator):
            return torch.randperm(len(self), generator=generator)

    gan = {"method": "{name: dmd, fake_steps: 1, gan: {}}", "real": "{source: scenes}"}

    def end(out, critic, **more):
        config = parity.run(images=IMAGES, **{"networks.kind": "full", "optimizer.warmup_images": 10**12, **more})
        networks = build(
            SD3Folder.read(teacher), config.networks, torch.float32, parity.CPU, TrainedNetworks(critic=critic)
        )
        reals = Reals() if critic else None
        start = starting(config, teacher)
        list(trainer.train(config, out, networks, Prompts(), [SHAPE], Accelerator(cpu=True), reals, start=start))
        return networks.trainable("fake")

    first = end(tmp_path / "fgm", False)
    second = end(tmp_path / "gan", True, init_from=tmp_path / "fgm", **gan)
    third = end(tmp_path / "again", False, init_from=tmp_path / "gan")
    assert second.keys() - first.keys() == {name for name in second if name.startswith("critic.")} != set()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor)
        torch.testing.assert_close(third[name], tensor)


def test_a_run_starts_from_a_student_folder(teacher, tmp_path):
    """The student takes its weights; the fake starts from the teacher."""
    student = make_teacher(tmp_path / "student", seed=7)
    config = parity.run(
        init_from=student, images=IMAGES, **{"networks.kind": "full", "optimizer.warmup_images": 10**12}
    )
    networks = build(SD3Folder.read(teacher), config.networks, torch.float32, parity.CPU)
    start = starting(config, teacher)
    (progress,) = trainer.train(
        config, tmp_path / "out", networks, Prompts(), [SHAPE], Accelerator(cpu=True), start=start
    )
    for role, folder in (("student", student), ("fake", teacher)):
        expected = load_transformer(SD3Folder.read(folder)).state_dict()
        for name, tensor in networks.trainable(role).items():
            torch.testing.assert_close(tensor.detach(), expected[name])
    for name, tensor in progress.average.items():
        torch.testing.assert_close(tensor, networks.trainable("student")[name].detach())


def test_a_start_of_other_networks_is_refused(teacher, tmp_path):
    start = {"student": {"x": torch.zeros(1)}}.copy
    with pytest.raises(ConfigError, match="other weights for the student"):
        next(trainer.train(parity.run(), tmp_path, parity.shared(teacher), Prompts(), [SHAPE], Accelerator(cpu=True),
                           start=start))  # fmt: skip


def test_a_log_goes_back_to_its_state_also_when_the_disk_was_full_in_the_middle_of_a_line(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b'{"images": 8}\n' + GARBAGE + b'{"images": 16}\n{"images": 24}\n{"ima')
    checkpoint.trim_lines(log, 16)
    assert log.read_text() == '{"images": 8}\n{"images": 16}\n'


def test_shares_of_processes_are_the_whole_batch_in_one_size_a_step():
    shapes = [(4, 8, 8), (4, 8, 4), (4, 4, 8)]
    config = parity.run(images=20 * IMAGES)

    def share(offset, local):
        made = batches.batches(config, 0, offset, local, Prompts(), shapes, pinned=False)
        return [part.batch(config.seed) for part in made]

    whole, left, right = share(0, IMAGES), share(0, IMAGES // 2), share(IMAGES // 2, IMAGES // 2)
    for a, b, c in zip(whole, left, right, strict=True):
        assert torch.equal(a.z, torch.cat([b.z, c.z]))
        assert torch.equal(a.cond.embeds, torch.cat([b.cond.embeds, c.cond.embeds]))
    assert {tuple(batch.z.shape[1:]) for batch in whole} == set(shapes)
    resumed = batches.batches(config, 8 * IMAGES, 0, IMAGES, Prompts(), shapes, pinned=False)
    assert all(torch.equal(a.z, b.batch(config.seed).z) for a, b in zip(whole[16:], resumed, strict=True))


def test_a_run_takes_sizes_that_are_not_square(teacher, tmp_path):
    config = parity.run()
    steps = trainer.train(
        config, tmp_path, parity.shared(teacher), Prompts(), [(4, 8, 8), (4, 4, 8)], Accelerator(cpu=True)
    )
    assert [progress.images for progress in steps] == [IMAGES, 2 * IMAGES, 3 * IMAGES, 4 * IMAGES]


def test_seeds_have_64_bits(teacher, tmp_path):
    def gaps(seed):
        config = parity.run(images=IMAGES, seed=seed)
        (progress,) = trainer.train(
            config, tmp_path / str(seed), parity.shared(teacher), Prompts(), [SHAPE], Accelerator(cpu=True)
        )
        return progress.metrics["gap"]

    seeds = (0, 2**32, 2**63, 2**64 - 1)
    assert len({gaps(seed) for seed in seeds}) == len(seeds)
    for seed in (-1, 2**64):
        with pytest.raises(ConfigError, match="seed"):
            parity.run(seed=seed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_round_as_a_cuda_graph_is_the_same_round(kind, teacher, tmp_path):
    def end(graph):
        config = parity.run(images=8 * IMAGES, **{"networks.kind": kind, "networks.cuda_graph": graph})
        networks = build(SD3Folder.read(teacher), config.networks, torch.float32, torch.device("cuda"))
        machine = Accelerator()
        *_, last = trainer.train(config, tmp_path / str(graph), networks, Prompts(), [SHAPE], machine)
        return last

    replayed, taken = end(True), end(False)
    for name, tensor in taken.average.items():
        torch.testing.assert_close(replayed.average[name], tensor)
    for name in ("gap", "gradient_norm/fake", "gradient_norm/student"):
        assert replayed.metrics[name] == pytest.approx(taken.metrics[name], rel=1e-4)


def test_what_is_read_ahead_comes_in_order_with_its_errors_and_leaves_no_thread():
    def damaged():
        yield from range(1, 4)
        raise CacheError("shard 7")

    before = threading.active_count()
    ahead, found = batches.prefetch(damaged()), []
    with pytest.raises(CacheError, match="shard 7"):
        found.extend(ahead)
    stopped = batches.prefetch(iter(range(1, 9)))
    assert (found, next(stopped)) == ([1, 2, 3], 1)
    stopped.close()
    assert threading.active_count() == before


def test_adam_takes_the_steps_of_its_definition():
    weight, gradient = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.25])
    config = Optimizer(betas=(0.5, 0.9), eps=1e-3)
    tensor = weight.clone().requires_grad_(True)
    optimizer = adam([tensor], config, 0.1)
    m, v = torch.zeros(2), torch.zeros(2)
    for step in (1, 2, 3):
        tensor.grad = gradient * step
        optimizer.step()
        m = 0.5 * m + 0.5 * gradient * step
        v = 0.9 * v + 0.1 * (gradient * step) ** 2
        weight = weight - 0.1 * (m / (1 - 0.5**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-3)
    torch.testing.assert_close(tensor.detach(), weight)
