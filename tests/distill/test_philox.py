"""Random numbers of images: Philox's published values, distributions, and what they depend on."""

import pytest
import torch
from scipy import stats

from distill.philox import Draw, philox4x32

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (*PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_words_are_those_of_the_authors_known_answers(counter, key, words):
    found = philox4x32([torch.tensor([word]) for word in counter], key)
    assert tuple(int(word) for word in found) == words


def test_numbers_follow_their_distributions():
    draw = Draw(0, "times", range(20_000))
    assert stats.kstest(draw.uniform().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(draw.normal(()).numpy(), "norm").pvalue > 1e-3
    counts = torch.bincount(draw.integers(7), minlength=7).numpy()
    assert len(counts) == 7
    assert stats.chisquare(counts).pvalue > 1e-3
    few = Draw(0, "noise", range(4)).normal((16, 32, 32))
    assert stats.kstest(few.flatten().double().numpy(), "norm").pvalue > 1e-3


def test_all_numbers_of_all_draws_are_independent():
    first, second = Draw(0, "fake 0", range(2000)), Draw(0, "student 0", range(2000))
    numbers = [first.normal((6,)), first.normal((6,)), second.normal((6,)), Draw(1, "fake 0", range(2000)).normal((6,))]
    correlation = torch.corrcoef(torch.cat(numbers, 1).T) - torch.eye(24)
    assert correlation.abs().max() < 5 / 2000**0.5


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 16, 16), (3, 5, 7)])
def test_numbers_depend_on_the_image_alone_in_any_batch(shape):
    whole = Draw(1, "student", range(37)).normal(shape)
    assert whole.shape == (37, *shape)
    for start, stop in ((0, 1), (1, 37), (5, 22)):
        part = Draw(1, "student", torch.arange(start, stop))
        assert torch.equal(whole[start:stop], part.normal(shape))


def test_seed_purpose_image_and_call_each_matter():
    mine = Draw(1, "student", [0]).normal((3,))
    others = [Draw(2, "student", [0]), Draw(1, "fake", [0]), Draw(1, "student", [1]), Draw(1, "student", [2**32])]
    others += [Draw(1 + 2**32, "student", [0]), Draw(1 + 2**63, "student", [0])]
    assert not any(torch.equal(mine, other.normal((3,))) for other in others)
    again = Draw(1, "student", [0])
    assert torch.equal(mine, again.normal((3,)))
    assert not torch.equal(mine, again.normal((3,)))
