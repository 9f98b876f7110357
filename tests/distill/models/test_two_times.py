"""The second time follows its formula, and a damaged file is refused."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_transformer

from distill.errors import TeacherError
from distill.models.two_times import FILE, add_second_time, load_second_time, save_second_time, split


@pytest.fixture
def moved():
    """A transformer of two times whose second time has an effect."""
    torch.manual_seed(0)
    transformer = make_transformer()
    for parameter in add_second_time(transformer).values():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return transformer


def features(angle: torch.Tensor) -> torch.Tensor:
    """The 256 cosines and sines of time, in float64."""
    frequencies = torch.tensor([10_000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    turned = angle.double()[:, None] * frequencies
    return torch.cat([turned.cos(), turned.sin()], dim=1)


def network(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Two layers with x sigmoid(x) between them, in float64."""
    w1, b1, w2, b2 = (weights[f"{name}.linear_{i}.{kind}"].double() for i in (1, 2) for kind in ("weight", "bias"))
    hidden = x.double() @ w1.T + b1
    return (hidden / (1 + torch.exp(-hidden))) @ w2.T + b2


def test_the_embedding_is_that_of_t_and_s_times_a_network_of_s(moved):
    embed = moved.time_text_embed
    weights = dict(embed.named_parameters())
    t, s = torch.tensor([1.0, 0.6, 0.3]), torch.tensor([0.9, 0.5, 0.0])
    pooled = torch.randn(3, 40)
    with torch.no_grad():
        found = embed(1000 * torch.stack([t, s], dim=1), pooled)
        plain = embed(1000 * t, pooled)
        text = embed.text_embedder(pooled).double()
        expected = network(features(1000 * t), weights, "timestep_embedder") + text
        torch.testing.assert_close(plain.double(), expected, atol=1e-4, rtol=1e-4)
        expected += s[:, None] * network(features(10 * s), weights, "second_time")
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
    assert found[2].equal(plain[2])
    assert (found - plain)[:2].abs().amax(dim=1).min() > 0.01


def test_weights_are_split_saved_in_fp32_and_read_again(moved, tmp_path):
    plain, second = split(dict(moved.bfloat16().named_parameters()))
    assert {name.rpartition("second_time.")[2] for name in second} == {
        f"linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }
    assert plain.keys() == {name for name, _ in make_transformer().named_parameters()}
    save_second_time(second, tmp_path)
    again = make_transformer()
    load_second_time(again, tmp_path)
    for name, tensor in split(dict(again.named_parameters()))[1].items():
        assert tensor.dtype == torch.float32
        assert tensor.equal(second[name].float())
        assert not tensor.requires_grad


@pytest.mark.parametrize("fault", ["missing", "cut", "lacks", "narrow", "nan"])
def test_a_file_that_is_not_whole_is_refused(fault, moved, tmp_path):
    save_second_time(split(dict(moved.named_parameters()))[1], tmp_path)
    path = tmp_path / FILE
    tensors = load_file(path)
    name = "time_text_embed.second_time.linear_1.weight"
    if fault == "missing":
        path.unlink()
    elif fault == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        changed = {"lacks": None, "narrow": tensors[name][:, 1:].contiguous(), "nan": tensors[name] * math.nan}[fault]
        others = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file(others if changed is None else {**others, name: changed}, path)
    with pytest.raises(TeacherError, match=rf"{FILE} is .*damaged.*export the student again"):
        load_second_time(make_transformer(), tmp_path)
