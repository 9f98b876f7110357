"""A plan from configurations alone agrees with the memory and FLOP of a real training step."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import make_teacher, make_transformer
from typer.testing import CliRunner

from distill.cli import app
from distill.config import Full, Lora
from distill.errors import ConfigError, SizeError, TeacherError
from distill.flow import one_step
from distill.methods import dmd, flow_map, reflow
from distill.methods.base import ROLES, TrainedNetworks, TrainingBatch, Velocities
from distill.methods.fgm import FGMConfig
from distill.methods.policies import Guidance
from distill.models.geometry import NAMES, read_geometry
from distill.models.sd3 import load_transformer
from distill.models.sd3_folder import SD3Folder
from distill.models.text import TextCondition
from distill.philox import Draw
from distill.plan import estimate as plans
from distill.plan.estimate import Plan, PlanInput
from distill.plan.meter import Meter
from distill.plan.options import changes_that_fit
from distill.plan.step_cost import network_calls, simulate_step, skip_share
from distill.training.networks import build

# torch's forward mode scripts some of its own derivatives when it is first used
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
CPU = torch.device("cpu")
DTYPES = {"lora": torch.float32, "full": torch.bfloat16}
KINDS = [Lora(rank=4), Lora(rank=4, gradient_checkpointing=True), Full(), Full(gradient_checkpointing=True)]
METHOD = FGMConfig(guidance=Guidance(guide_fake=True, skip_layers=(0,), skip_interval=(0.0, 1.0)))
PATH = reflow.ReflowConfig(teacher_steps=1)  # the cheapest to plan
BATCH, SIZE = 3, 16


@pytest.fixture(scope="module")
def teacher(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of one block, because a plan takes time for each operation."""
    folder = shutil.copytree(teacher, tmp_path_factory.mktemp("teachers") / "one-block")
    make_transformer(num_layers=1).save_pretrained(folder / "transformer")
    return folder


def label(kind) -> str:
    return kind.kind + ("-checkpointing" if kind.gradient_checkpointing else "")


class Remembered(PlanInput):
    """A plan's input whose plan is computed once for all tests."""

    def plan(self) -> Plan:
        key = (self.geometry.name, self.kind, self.dtype, self.batch, self.method, self.optimizer)
        if key not in _plans:
            _plans[key] = super().plan()
        return _plans[key]


_plans: dict[tuple, Plan] = {}


def setting(teacher: Path, kind, batch: int = BATCH, method=METHOD, optimizer="adam") -> PlanInput:
    geometry = read_geometry(str(teacher))
    return Remembered(geometry, kind, DTYPES[kind.kind], batch, SIZE, method, optimizer)


def inputs(made: PlanInput) -> tuple[torch.Tensor, TextCondition]:
    generator = torch.Generator().manual_seed(0)
    z, cond = plans._inputs(made.geometry, made.batch, made.size)
    z, embeds, pooled = (torch.randn(x.shape, generator=generator) for x in (z, cond.embeds, cond.pooled))
    return z, TextCondition(embeds, pooled)


def held(networks) -> list[torch.Tensor]:
    return [x for model in networks.modules() for x in [*model.parameters(), *model.buffers()]]


def nbytes(tensors) -> int:
    """Count the bytes of all storages, each once."""
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.parametrize("kind", [Lora(rank=4, gradient_checkpointing=True), Full()], ids=label)
def test_a_plan_is_what_a_real_step_leaves_and_takes(teacher, kind):
    guidance = METHOD.guidance.model_copy(update={"skip_interval": (0.0, 0.5)})
    made = replace(setting(teacher, kind), method=METHOD.model_copy(update={"guidance": guidance}))
    plan, dtype = made.plan(), made.dtype
    networks = plans.build(made.geometry, kind, dtype, device="cpu")
    weights = {role: networks.trainable(role) for role in ROLES}
    optimizers = {role: torch.optim.Adam(weights[role].values(), betas=(0.0, 0.999)) for role in ROLES}
    measured = []
    for phase in made.method.update_phases():
        measured.append(simulate_step(networks, phase.role, network_calls(phase), *inputs(made), dtype))
        optimizers[phase.role].step()
        assert plan.gradients == nbytes(x.grad for x in weights[phase.role].values())
        optimizers[phase.role].zero_grad()
        beside = plan.stages[f"{phase.role} update"] - sum(plan.resident.values())
        assert beside == pytest.approx(measured[-1].peak, rel=0.01)

    flop = sum(phase.steps * real.flop for phase, real in zip(made.method.update_phases(), measured, strict=True))
    last = made.method.update_phases()[-1]
    without = [call for call in network_calls(last) if not call.skip_layers]
    spared = measured[-1].flop - simulate_step(networks, last.role, without, *inputs(made), dtype).flop
    share = skip_share(last, BATCH)
    assert 0.2 < share < 0.95
    assert plan.flop_per_image == pytest.approx((flop - (1 - share) * spared) / BATCH, rel=1e-9)
    heaviest = max(measured, key=lambda real: real.peak)
    assert plan.activations == pytest.approx(heaviest.activations, rel=0.01)
    moments = [x for adam in optimizers.values() for state in adam.state.values() for x in state.values() if x.ndim]
    assert plan.resident["optimizer states"] == nbytes(moments)
    assert plan.resident["averaged student"] == nbytes(weights["student"].values())
    assert plan.trainable == sum(x.numel() for x in weights["student"].values())
    assert nbytes(held(networks)) == sum(plan.resident[f"{part} weights"] for part in ("base", "student", "fake"))


@pytest.mark.parametrize("kind", [Lora(rank=4), Full()], ids=label)
def test_the_networks_of_a_plan_are_those_of_a_run(teacher, kind):
    made = setting(teacher, kind)
    real = build(SD3Folder.read(teacher), kind, made.dtype, CPU)
    networks = plans.build(made.geometry, kind, made.dtype)
    assert nbytes(held(real)) == nbytes(held(networks))
    assert made.plan().parameters == sum(x.numel() for x in load_transformer(SD3Folder.read(teacher)).parameters())


@pytest.mark.parametrize("kind", KINDS, ids=label)
def test_what_is_kept_is_what_autograd_saves(kind, tmp_path):
    """In fp32, in which the networks of a run and of a plan compute alike; autograd's hooks count the bytes."""
    teacher = make_teacher(tmp_path)
    made = setting(teacher, kind)
    z, cond = inputs(made)
    networks = build(SD3Folder.read(teacher), kind, torch.float32, CPU)
    own = {x.untyped_storage()._cdata for x in [*held(networks), z, cond.embeds, cond.pooled]}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = one_step(networks.velocity("student"), z, cond)
    assert out.requires_grad
    expected = nbytes(x for x in saved if x.untyped_storage()._cdata not in own)

    with Meter() as meter:
        again = one_step(networks.velocity("student"), z, cond)
        kept = meter.live - again.nbytes  # the images themselves are the caller's
    assert again.requires_grad
    assert kept == pytest.approx(expected, rel=0.02)


def test_arithmetic_is_that_of_the_layers_by_hand(tmp_path):
    made = setting(make_teacher(tmp_path), Lora(rank=4))
    config = made.geometry.transformer
    networks = plans.build(made.geometry, made.kind, made.dtype, device="cpu")
    z, cond = inputs(made)
    with Meter() as meter, torch.no_grad():
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


@pytest.mark.parametrize(
    "method",
    [PATH, flow_map.FlowMapConfig(), dmd.DMDConfig(gan=dmd.Gan())],
    ids=lambda method: method.name,
)
def test_every_role_of_a_method_is_counted_and_no_other(teacher, method):
    trained = TrainedNetworks.of(method.update_phases())
    made = setting(teacher, Full(), method=method)
    plan, networks = made.plan(), build(SD3Folder.read(teacher), Full(), made.dtype, CPU, trained)
    own = {role: nbytes(networks.trainable(role).values()) for role in trained.roles}
    assert [plan.resident[f"{role} weights"] for role in trained.roles] == list(own.values())
    assert plan.resident["fake weights"] == own.get("fake", 0)
    assert plan.resident["optimizer states"] == 2 * sum(own.values())
    assert plan.gradients == max(own.values())


def test_a_path_of_the_teacher_keeps_nothing_and_costs_what_it_really_costs(teacher):
    one, three = (setting(teacher, Full(), method=method) for method in (PATH, reflow.ReflowConfig(teacher_steps=3)))
    assert three.plan().activations == pytest.approx(one.plan().activations, rel=0.02)
    networks = plans.build(three.geometry, three.kind, torch.float32, TrainedNetworks(("student",)), "cpu")
    z, cond = inputs(three)
    nets = Velocities(networks.velocity("student"), networks.field("teacher"), networks.field("fake"), cond[:1])
    (phase,) = three.method.update_phases()
    with Meter() as meter:
        phase.loss(nets, TrainingBatch(z, cond, Draw(0, "x", range(BATCH)))).value.backward()
    assert three.plan().flop_per_image == meter.flop / BATCH


def test_eight_bits_are_a_byte_for_each_moment_and_a_scale_for_each_block(teacher):
    sizes = [x.numel() for x in load_transformer(SD3Folder.read(teacher)).parameters()]
    moment = sum(size + 4 * -(-size // 256) if size >= 4096 else 4 * size for size in sizes)
    plan = setting(teacher, Full(), method=PATH, optimizer="adam-8bit").plan()  # where the student alone learns
    assert plan.resident["optimizer states"] == 2 * moment
    assert 2 * moment < setting(teacher, Full(), method=PATH).plan().resident["optimizer states"]


@pytest.mark.parametrize("kind", [Lora(rank=4), Full()], ids=label)
def test_a_run_that_compiles_its_blocks_is_planned_as_one_that_does_not(teacher, kind):
    compiled = kind.model_copy(update={"compile": True})
    assert setting(teacher, compiled, method=PATH).plan() == setting(teacher, kind, method=PATH).plan()


@pytest.mark.parametrize("kind", [Lora(rank=4), Full()], ids=label)
def test_checkpointing_lowers_activations_and_costs_arithmetic(teacher, kind):
    plain, checkpointed = (
        setting(teacher, kind.model_copy(update={"gradient_checkpointing": on}), method=PATH).plan()
        for on in (False, True)
    )
    assert checkpointed.activations < plain.activations
    assert checkpointed.peak <= plain.peak
    assert plain.flop_per_image < checkpointed.flop_per_image < 1.5 * plain.flop_per_image


def test_lora_keeps_one_base_and_full_three(teacher):
    lora, full = (setting(teacher, kind).plan() for kind in (Lora(rank=4, gradient_checkpointing=True), Full()))
    tables = nbytes(load_transformer(SD3Folder.read(teacher)).buffers())  # of positions, which no role learns
    assert lora.resident["base weights"] == 4 * lora.parameters + tables
    assert lora.resident["student weights"] == 4 * lora.trainable < full.resident["student weights"]
    assert full.resident["student weights"] == full.resident["fake weights"] == 4 * full.parameters
    assert full.resident["base weights"] >= 2 * full.parameters  # the teacher's alone


def test_activations_grow_with_the_batch_in_a_straight_line(teacher):
    plans = (setting(teacher, Full(), batch=batch, method=PATH).plan() for batch in (1, 2, 3))
    one, two, three = (plan.activations for plan in plans)
    assert three - two == pytest.approx(two - one, rel=0.02)


@pytest.mark.parametrize(("name", "low", "high"), [("sd3-medium", 2.0, 2.1), ("sd3.5-medium", 2.2, 2.5),
                                                   ("sd3.5-large", 8.0, 8.2)])  # fmt: skip
def test_named_models_have_the_published_size(name, low, high):
    assert low <= read_geometry(name).parameters / 1e9 <= high


def test_a_change_that_is_said_to_fit_does(teacher):
    made = setting(teacher, Full(), batch=4 * BATCH)
    plan, least = made.plan(), replace(made, batch=1).plan().peak
    assert plan.peak == max(plan.stages.values())
    available = (least + plan.peak + 1) // 2
    changes = changes_that_fit(made, plan, available)
    changed = {
        "--gradient-checkpointing": replace(made, kind=Full(gradient_checkpointing=True)),
        "--optimizer adam-8bit": replace(made, optimizer="adam-8bit"),
        "--mode lora --rank 64": replace(made, kind=Lora()),
    }
    enough = {change for change, other in changed.items() if other.plan().peak <= available}
    assert {change for change in changes if not change.startswith("--batch")} == enough
    (batch,) = [int(change.split()[1]) for change in changes if change.startswith("--batch")]
    assert 1 <= batch < made.batch
    assert replace(made, batch=batch).plan().peak <= available
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
    unknown = CliRunner().invoke(app, ["plan", str(teacher), "--method", "fgn"]).exception
    assert isinstance(unknown, ConfigError)
    assert "no method 'fgn'; did you mean 'fgm'" in str(unknown)
    elsewhere = CliRunner().invoke(app, ["plan", str(teacher), "--set", "images=1"]).exception
    assert isinstance(elsewhere, ConfigError)
    assert "--set images=1: here only method.* can be set" in str(elsewhere)
    with pytest.raises(SizeError, match="multiple of 4 up to 48"):
        PlanInput(read_geometry(str(teacher)), Full(), torch.float32, 1, 18, None).plan()


def test_a_transformer_s_configuration_is_enough(teacher, tmp_path):
    (tmp_path / "transformer").mkdir()
    config = json.loads((teacher / "transformer" / "config.json").read_text())
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    geometry = read_geometry(str(tmp_path))
    assert geometry.tokens == 77 + 256
    assert geometry.vae == read_geometry(NAMES[0]).vae


@pytest.mark.parametrize(
    ("kind", "dual", "method"),
    [
        (Lora(rank=4), 2, FGMConfig(guidance=Guidance(guide_fake=True, skip_layers=(1, 3)))),
        (Full(gradient_checkpointing=True), 0, PATH),
    ],
)
def test_few_blocks_tell_what_many_cost(kind, dual, method, teacher):
    config = dict(make_transformer(num_layers=5, dual_attention_layers=tuple(range(dual))).config)
    made = PlanInput(replace(read_geometry(str(teacher)), transformer=config), kind, torch.float32, BATCH, SIZE, method)
    extended, counted = made._counts_of_all_blocks(), made._counts(made.geometry)
    peaks = {name for name in counted if name.endswith("peak")}
    assert {name: extended[name] for name in counted if name not in peaks} == {
        name: counted[name] for name in counted if name not in peaks
    }
    block = (extended["student activations"] + extended["student weights"]) / 5
    assert all(counted[name] <= extended[name] <= counted[name] + block for name in peaks)


def test_a_preset_gives_the_settings_of_its_plan(tmp_path, teacher):
    preset = tmp_path / "mine.yaml"
    preset.write_text(
        f"teacher: {teacher}\nmethod: {{name: reflow, teacher_steps: 1}}\nnetworks: {{kind: lora, rank: 4}}\n"
        "precision: fp32\nbatch: 8\nmicro_batch: 2\nimages: 64\nprompts: {max_count: 7}\n"
    )
    command = ["plan", str(preset), "--device", "rtx-4090", "--optimizer", "adam-8bit"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "Planned: mode lora of rank 4, batch 2 images of 16 pixels, optimizer adam-8bit" in shown.output
    assert "images/s on rtx-4090; 64 images take about" in shown.output
    assert "Prompts: 7 distinct" in shown.output
    assert "It fits 23.6 GiB" in shown.output
    refused = CliRunner().invoke(app, ["plan", str(preset), "--device", "rtx-3090"])
    assert refused.exit_code == 2
    assert "rtx-4090" in refused.output


def test_the_command_prints_parts_verdict_and_json(teacher):
    command = ["plan", str(teacher), "--size", "16", "--batch", "1", "--dtype", "fp32", "--method", "reflow"]
    shown = CliRunner().invoke(app, [*command, "--mode", "full", "--device-memory", "8"])
    assert shown.exit_code == 0, shown.output
    assert "activations" in shown.output
    assert "fits" in shown.output
    least = ["--gradient-checkpointing", "--optimizer", "adam-8bit", "--device-memory", "0.5", "--json"]
    result = json.loads(CliRunner().invoke(app, [*command, *least]).output)
    assert result["fits"] is False  # what is set aside for the device's own is more than that
    assert result["changes"] == []
    assert result["peak_bytes"] == max(result["stages_bytes"].values())
    assert result["images_per_second"] > 0
