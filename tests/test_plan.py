"""A plan made from configurations alone says what a real training step of the real networks leaves and takes."""

import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

from distill import plan as plans
from distill.cli import app
from distill.config import Full, Lora
from distill.errors import SizeError, TeacherError
from distill.flow import one_step
from distill.methods.fgm import Config
from distill.networks import ROLES, build
from distill.plan import NAMES, Setting, changes_that_fit, read_geometry
from distill.policies import Guidance
from distill.teacher import load_transformer
from distill.text import TextCondition

CPU = torch.device("cpu")
KINDS = [Lora(rank=4), Lora(rank=4, checkpointing=True), Full(), Full(checkpointing=True)]
DTYPES = [torch.float32, torch.bfloat16]
BATCH, SIZE = 3, 16


def label(kind) -> str:
    return kind.kind + ("-checkpointing" if kind.checkpointing else "")


def setting(teacher: Path, kind, dtype=torch.float32, batch: int = BATCH) -> Setting:

    return Setting(read_geometry(str(teacher)), kind, dtype, batch, SIZE, Config(guidance=Guidance(fake="alike")))


def inputs(made: Setting) -> tuple[torch.Tensor, TextCondition]:
    generator = torch.Generator().manual_seed(0)
    z, cond = plans._inputs(made.geometry, made.batch, made.size)
    z, embeds, pooled = (torch.randn(x.shape, generator=generator) for x in (z, cond.embeds, cond.pooled))
    return z, TextCondition(embeds, pooled)


def nbytes(tensors) -> int:
    """Of all storages, each once."""
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=label)
def test_weights_gradients_and_moments_are_a_real_step_s_to_the_byte(teacher, kind, dtype):
    made = setting(teacher, kind, dtype)
    plan = made.plan()
    networks = build(teacher, kind, dtype, CPU)
    models = [networks._model] if isinstance(kind, Lora) else networks._models.values()
    weights = {role: networks.trainable(role) for role in ROLES}
    optimizers = {role: torch.optim.Adam(weights[role].values(), betas=(0.0, 0.999)) for role in ROLES}
    for turn in made.method.turns():
        plans.take_turn(networks, turn.role, plans.asks(turn), *inputs(made), dtype)
        optimizers[turn.role].step()
        assert plan.gradients == nbytes(x.grad for x in weights[turn.role].values())
        optimizers[turn.role].zero_grad()

    held = nbytes(x for model in models for x in [*model.parameters(), *model.buffers()])
    assert held == sum(plan.resident[part] for part in ("base weights", "student weights", "fake weights"))
    moments = [x for adam in optimizers.values() for state in adam.state.values() for x in state.values() if x.ndim]
    assert plan.resident["optimizer states"] == nbytes(moments)
    assert plan.resident["averaged student"] == nbytes(weights["student"].values())
    assert plan.trainable == sum(x.numel() for x in weights["student"].values())
    assert plan.parameters == sum(x.numel() for x in load_transformer(teacher).parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=label)
def test_tensors_without_data_take_a_turn_as_real_ones_do(teacher, kind, dtype):
    made = setting(teacher, kind, dtype)
    networks, _ = plans.build(made.geometry, kind, dtype, device="cpu")
    empty, models = plans.build(made.geometry, kind, dtype)
    fake = FakeTensorMode()
    with fake:
        for model in models:
            plans.without_data(model)
    for turn in made.method.turns():
        asked = plans.asks(turn)
        real = plans.take_turn(networks, turn.role, plans.asks(turn), *inputs(made), dtype)
        with fake:
            found = plans.take_turn(empty, turn.role, asked, *plans._inputs(made.geometry, BATCH, SIZE), dtype)
        assert found.flop == real.flop
        assert found.kept == pytest.approx(real.kept, rel=0.01)
        assert found.peak == pytest.approx(real.peak, rel=0.01)


@pytest.mark.parametrize("kind", KINDS, ids=label)
def test_what_is_kept_is_what_autograd_saves(teacher, kind):
    """In fp32, where the networks that a run builds and those of a plan compute alike; autograd is asked itself."""
    made = setting(teacher, kind)
    z, cond = inputs(made)
    networks = build(teacher, kind, torch.float32, CPU)
    models = [networks._model] if isinstance(kind, Lora) else networks._models.values()
    own = {
        x.untyped_storage()._cdata
        for x in [
            *(x for model in models for x in [*model.parameters(), *model.buffers()]),
            z,
            cond.embeds,
            cond.pooled,
        ]
    }
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = one_step(networks.velocity("student"), z, cond)
    assert out.requires_grad
    expected = nbytes(x for x in saved if x.untyped_storage()._cdata not in own)

    with plans.Meter() as meter:
        again = one_step(networks.velocity("student"), z, cond)
        kept = meter.live - again.nbytes  # the images themselves are the caller's
    assert again.requires_grad
    assert kept == pytest.approx(expected, rel=0.02)


def test_arithmetic_is_that_of_the_layers_by_hand(teacher):
    made = setting(teacher, Lora(rank=4))
    config = made.geometry.transformer
    networks, _ = plans.build(made.geometry, made.kind, made.dtype, device="cpu")
    z, cond = inputs(made)
    with plans.Meter() as meter, torch.no_grad():
        networks.velocity("teacher")(z, torch.ones(BATCH), cond)

    width = config["num_attention_heads"] * config["attention_head_dim"]
    image, text = (config["sample_size"] // config["patch_size"]) ** 2, made.geometry.tokens
    patch = config["patch_size"] ** 2 * config["in_channels"]
    macs = image * 2 * patch * width + text * config["joint_attention_dim"] * width  # patches in and out, words in
    macs += (256 + width + config["pooled_projection_dim"] + width) * width + 2 * width**2  # time, pooled, norm_out
    for last in (False, True):
        macs += (image + text) * 3 * width**2  # queries, keys, values
        macs += 2 * (image + text) ** 2 * width  # attention
        outputs = image if last else image + text
        macs += outputs * (1 + 8) * width**2  # projection out, and two feed-forward layers of four widths
        macs += (6 + (2 if last else 6)) * width**2  # modulation
    assert meter.flop == 2 * BATCH * macs


@pytest.mark.parametrize("kind", [Lora(rank=4), Full()], ids=label)
def test_checkpointing_lowers_activations_and_costs_arithmetic(teacher, kind):
    plain = setting(teacher, kind).plan()
    checkpointed = setting(teacher, kind.model_copy(update={"checkpointing": True})).plan()
    assert checkpointed.activations < plain.activations
    assert checkpointed.peak <= plain.peak
    assert plain.flop_per_image < checkpointed.flop_per_image < 1.5 * plain.flop_per_image


def test_lora_keeps_one_base_and_full_three(teacher):
    lora, full = (setting(teacher, kind).plan() for kind in (Lora(rank=4), Full()))
    tables = nbytes(load_transformer(teacher).buffers())  # of positions, which no role learns
    assert lora.resident["base weights"] == full.resident["base weights"] - 2 * tables
    assert full.resident["student weights"] == 4 * full.parameters
    assert lora.resident["student weights"] == 4 * lora.trainable < full.resident["student weights"]


def test_activations_grow_with_the_batch_in_a_straight_line(teacher):
    one, two, four = (setting(teacher, Lora(rank=4), batch=batch).plan().activations for batch in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.02)


@pytest.mark.parametrize(("name", "low", "high"), [("sd3-medium", 2.0, 2.1), ("sd3.5-medium", 2.2, 2.5),
                                                   ("sd3.5-large", 8.0, 8.2)])  # fmt: skip
def test_named_models_have_the_published_size(name, low, high):
    assert low <= plans._parameters(read_geometry(name)) / 1e9 <= high


def test_a_change_that_is_said_to_fit_does(teacher):
    made = setting(teacher, Full(), batch=8)
    plan = made.plan()
    assert plan.peak == max(plan.moments.values())
    least = setting(teacher, Full(), batch=1).plan().peak
    available = (least + plan.peak) // 2
    changes = changes_that_fit(made, plan, available)
    kinds = {"--checkpointing": Full(checkpointing=True), "--mode lora --rank 64": Lora()}
    enough = {change for change, kind in kinds.items() if setting(teacher, kind, batch=8).plan().peak <= available}
    assert {change for change in changes if not change.startswith("--batch")} == enough
    (batch,) = [int(change.split()[1]) for change in changes if change.startswith("--batch")]
    assert 1 <= batch < 8
    assert setting(teacher, Full(), batch=batch).plan().peak <= available
    assert changes_that_fit(made, plan, 1) == []


def test_what_cannot_be_planned_is_told_in_a_sentence(teacher, tmp_path):
    with pytest.raises(TeacherError, match=r"nearest are sd3\.5-large"):
        read_geometry("sd3.5-lage")
    with pytest.raises(TeacherError, match="is missing"):
        read_geometry(str(tmp_path))
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(TeacherError, match="FluxTransformer2DModel"):
        read_geometry(str(tmp_path))
    with pytest.raises(SizeError, match="multiple of 4 up to 48"):
        Setting(read_geometry(str(teacher)), Full(), torch.float32, 1, 18, None).plan()


def test_a_transformer_s_configuration_is_enough(teacher, tmp_path):
    (tmp_path / "transformer").mkdir()
    config = json.loads((teacher / "transformer" / "config.json").read_text())
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    geometry = read_geometry(str(tmp_path))
    assert geometry.tokens == 77 + 256
    assert geometry.vae == read_geometry(NAMES[0]).vae


def test_the_command_prints_parts_verdict_and_json(teacher):
    command = ["plan", str(teacher), "--mode", "full", "--size", "16", "--batch", "2", "--dtype", "fp32"]
    shown = CliRunner().invoke(app, [*command, "--device-memory", "8"])
    assert shown.exit_code == 0, shown.output
    assert "activations" in shown.output
    assert "fits" in shown.output
    result = json.loads(CliRunner().invoke(app, [*command, "--device-memory", "8", "--json"]).output)
    assert result["fits"] is True
    assert result["peak_bytes"] == max(result["moments_bytes"].values())
    assert result["images_per_second"] > 0
    refused = json.loads(CliRunner().invoke(app, [*command, "--device-memory", "0.5", "--json"]).output)
    assert refused["fits"] is False
    assert refused["changes"] == []  # what is set aside for the device's own is more than that
