"""Compare our distillation with the usual way to write one, in the same run: images/s, peak memory, and their ratios.

The baseline holds whole copies of the model for every role, encodes prompts in every step, evaluates the
guided teacher in two calls, and compiles nothing. Ours is the trainer of `distill run`. Both train the same geometry
with random weights, which take as long as trained ones, with the same method, batch and precision. The two alternate,
and each measurement has its own process, so that its peak memory is its own.

    python benchmarks/train.py [--teacher FOLDER_OR_NAME] [--kind full|lora] [--batch 64] [--steps 8] [--json]

Ours compiles its blocks on a GPU, and on a CPU only with `--compile`; `docs/scaling.md` says where it pays. Other
questions:

    python benchmarks/train.py --online          our side encodes prompts during training, as it does for SD3's size
    python benchmarks/train.py --profile         where the time of a step goes, and how far it is from matrix products
    python benchmarks/train.py --processes 2     gloo processes that share the cores, against one with a thread on each
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from distill.data.conditions import Conditions
    from distill.models.geometry import Geometry
    from distill.plan.estimate import PlanInput

for _name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):  # their messages would interrupt the output
    os.environ.setdefault(_name, "error")

SHIPPED = Path(__file__).parents[1] / "distill" / "worlds" / "scenes" / "weights" / "teacher"
GUIDANCE = 4.0
WARM = 4  # steps before the clock starts; a CUDA graph is recorded in the fourth


def ours(arguments: argparse.Namespace) -> dict[str, float]:
    """Train with the product's own loop; without --online, conditions are rows in memory, as those of a small cache."""
    import torch

    from distill.config import RunConfig
    from distill.models import attention
    from distill.models.geometry import read_geometry
    from distill.plan.estimate import PlanInput, build
    from distill.run import accelerator
    from distill.training.trainer import train

    compiled = torch.cuda.is_available() if arguments.compile is None else arguments.compile
    geometry = read_geometry(arguments.teacher)
    cadence = dict.fromkeys(("log", "sample", "checkpoint", "evaluate"), 10**9)
    config = RunConfig.model_validate(
        {
            "networks": {
                "kind": arguments.kind,
                "gradient_checkpointing": arguments.gradient_checkpointing,
                "compile": compiled,
            },
            "method": {"name": "fgm", "guidance": {"scale": GUIDANCE}},
            "images": 10**9,
            "batch": arguments.batch,
            "cadence": cadence | {"log": arguments.batch} if arguments.profile else cadence,
            "trackers": [],
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        machine = accelerator(config, Path(folder))
        dtype = torch.bfloat16 if machine.mixed_precision == "bf16" else torch.float32
        networks = build(geometry, config.networks, dtype, device=str(machine.device))
        for model in networks.modules():
            attention.use(attention.resolve(config.networks.attention, dtype, machine.device), model)
        shape, size = geometry.transformer, arguments.size or geometry.image_size
        rows = random_conditions(geometry)
        if arguments.online:
            rows = online_conditions(geometry, machine.device, dtype, Path(folder))
        latents = (shape["in_channels"], *[size // geometry.pixels_per_latent] * 2)
        began = time.perf_counter()
        with closing(train(config, Path(folder), networks, rows, [latents], machine)) as progress:
            for _ in range(WARM):
                next(progress)
            started = _clock(machine.device)
            with torch.profiler.profile() if arguments.profile else nullcontext() as profile:
                rounds = [next(progress) for _ in range(arguments.steps)]
                metrics = _metrics(started, machine.device, arguments)
        if profile is not None:
            setting = PlanInput(geometry, config.networks, dtype, arguments.batch, size, config.method)
            _tell(profile, [each.metrics for each in rounds], setting, metrics["images_per_second"], machine.device)
        machine.end_training()
        return {**metrics, "seconds_to_start": started - began}


def random_conditions(geometry: "Geometry") -> "Conditions":
    """Random text conditions, which take as long as real ones."""
    import torch

    from distill.models.text import TextCondition

    width, pooled = (geometry.transformer[name] for name in ("joint_attention_dim", "pooled_projection_dim"))

    class Rows:
        sha256 = ""

        def __init__(self) -> None:
            self._all = TextCondition(torch.randn(64, geometry.tokens, width), torch.randn(64, pooled))
            self.null = self._all[0]

        def __len__(self) -> int:
            return len(self._all)

        def rows(self, indices: torch.Tensor) -> TextCondition:
            return self._all[indices]

        def shuffle(self, generator: torch.Generator) -> torch.Tensor:
            return torch.randperm(len(self), generator=generator)

    return Rows()


def online_conditions(geometry: "Geometry", device: "torch.device", dtype: "torch.dtype", folder: Path) -> "Conditions":
    """Conditions of distinct prompts, encoded online by text encoders with random weights."""
    import torch

    from distill.data.online_conditions import OnlineConditions
    from distill.data.prompt_texts import PromptTexts, write_texts
    from distill.models.text import SD3TextEncoder

    class Tokenizer:
        """Token ids of the right shape; their values do not affect the time."""

        model_max_length = geometry.clip_tokens

        def __call__(self, prompts: list[str], max_length: int, **_: object) -> SimpleNamespace:
            return SimpleNamespace(input_ids=torch.ones(len(prompts), max_length, dtype=torch.long))

    def load() -> SD3TextEncoder:
        encoders = _text_encoders(geometry, device, dtype)
        t5 = encoders.pop("text_encoder_3", None)
        token, width = Tokenizer(), geometry.transformer["joint_attention_dim"]
        return SD3TextEncoder(list(encoders.values()), [token, token], t5, token, width, geometry.t5_tokens)

    write_texts(map(str, range(10_000)), folder / "prompts.jsonl")
    return OnlineConditions(PromptTexts(folder / "prompts.jsonl"), device, load)


def _text_encoders(geometry: "Geometry", device: "torch.device", dtype: "torch.dtype") -> dict[str, "torch.nn.Module"]:
    """The text encoders of a geometry with random weights, by the names of their folders."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    with device:
        return {
            name: (
                T5EncoderModel(T5Config(**kind))
                if name == "text_encoder_3"
                else CLIPTextModelWithProjection(CLIPTextConfig(**kind))
            )
            .to(dtype)
            .eval()
            for name, kind in geometry.text.items()
        }


def _tell(
    profile: "torch.profiler.profile",
    rounds: list[dict[str, float]],
    setting: "PlanInput",
    images_per_second: float,
    device: "torch.device",
) -> None:
    """Print where the time went: by part of the loop, by operation, and relative to the time of the matrix products."""
    import torch

    seconds: dict[str, float] = {}
    for metrics in rounds:
        for name, value in metrics.items():
            if name.startswith("seconds/"):
                seconds[name] = seconds.get(name, 0) + value
    print("\n".join(f"{name:20} {value / sum(seconds.values()):6.1%}" for name, value in seconds.items()))
    order = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    print(profile.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60))

    side = 4096 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=setting.dtype)
    times = []
    for _ in range(8):
        started = _clock(device)
        a @ a
        times.append(_clock(device) - started)
    rate, flop = 2 * side**3 / min(times), setting.plan().flop_per_image
    print(f"{flop / 1e9:.1f} GFLOP an image at {images_per_second:.2f} images/s: {flop * images_per_second / 1e9:.0f}")
    print(
        f"GFLOP/s; matrices of {side} x {side} are multiplied at {rate / 1e9:.0f}, which would make {rate / flop:.2f}"
    )
    print("images/s. A profiled run is slower than another.")


def baseline(arguments: argparse.Namespace) -> dict[str, float]:
    """Train as a straightforward script does: three modules, online encoders, one velocity at a time."""
    import torch
    from diffusers import SD3Transformer2DModel
    from torch.nn import functional as F
    from transformers import T5EncoderModel

    from distill.config import RunConfig
    from distill.models.geometry import read_geometry
    from distill.run import accelerator

    geometry = read_geometry(arguments.teacher)
    machine = accelerator(RunConfig(), Path(tempfile.gettempdir()))
    device, bf16 = machine.device, machine.mixed_precision == "bf16"
    torch.manual_seed(0)
    with device:
        teacher, fake, student, average = (SD3Transformer2DModel.from_config(geometry.transformer) for _ in range(4))
    encoders = list(_text_encoders(geometry, device, torch.bfloat16 if bf16 else torch.float32).values())
    for model in (teacher, average, *encoders):
        model.requires_grad_(False)
    teacher.to(torch.bfloat16 if bf16 else torch.float32)
    if arguments.gradient_checkpointing:
        for model in (teacher, fake, student):
            model.enable_gradient_checkpointing()
    optimizers = [torch.optim.Adam(model.parameters(), 1e-4, betas=(0.0, 0.999)) for model in (fake, student)]
    shape, batch = geometry.transformer, arguments.batch
    side = (arguments.size or geometry.image_size) // geometry.pixels_per_latent
    width, clip_tokens = shape["joint_attention_dim"], min(geometry.tokens, 77)

    @torch.no_grad()
    def encode() -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids to joint and pooled text, as the stock pipeline lays them out."""
        clips, pooled, t5 = [], [], []
        for encoder in encoders:
            if isinstance(encoder, T5EncoderModel):
                ids = torch.ones(batch, geometry.tokens - clip_tokens, dtype=torch.long, device=device)
                t5.append(encoder(ids).last_hidden_state)
            else:
                ids = torch.ones(batch, clip_tokens, dtype=torch.long, device=device)
                out = encoder(ids, output_hidden_states=True)
                clips.append(out.hidden_states[-2])
                pooled.append(out.text_embeds)
        joint = torch.cat(clips, -1)
        return torch.cat([F.pad(joint, (0, width - joint.shape[-1])), *t5], 1), torch.cat(pooled, -1)

    def velocity(model, x, t, embeds, pooled):
        kind = model.dtype
        out = model(x.to(kind), embeds.to(kind), pooled.to(kind), 1000 * t, return_dict=False)[0]
        return out.float()

    def generate(embeds, pooled):
        z = torch.randn(batch, shape["in_channels"], side, side, device=device)
        return z - velocity(student, z, torch.ones(batch, device=device), embeds, pooled)

    def noised(x_0):
        t = torch.sigmoid(torch.randn(batch, device=device) * 1.6 + 0.69).clamp(0.02, 0.98)
        eps, s = torch.randn_like(x_0), t.view(-1, 1, 1, 1)
        return t, (1 - s) * x_0 + s * eps, eps - x_0

    def step() -> None:
        embeds, pooled = encode()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                x_0 = generate(embeds, pooled)
            t, x_t, w = noised(x_0)
            loss = F.mse_loss(velocity(fake, x_t, t, embeds, pooled), w)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(fake.parameters(), 1.0)
        optimizers[0].step()
        optimizers[0].zero_grad()

        embeds, pooled = encode()
        null, null_pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            x_0 = generate(embeds, pooled)
            t, x_t, w = noised(x_0)
            u_null = velocity(teacher, x_t, t, null, null_pooled)
            u = u_null + GUIDANCE * (velocity(teacher, x_t, t, embeds, pooled) - u_null)
            v = velocity(fake, x_t, t, embeds, pooled)
            with torch.no_grad():
                f_u = x_t - t.view(-1, 1, 1, 1) * u
                weight = t**2 / (x_0 - f_u).abs().flatten(1).mean(1)
            loss = (weight * ((u - v) * (v - w)).flatten(1).mean(1)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizers[1].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        with torch.no_grad():
            for mean, new in zip(average.parameters(), student.parameters(), strict=True):
                mean.lerp_(new, 0.01)

    for _ in range(WARM):
        step()
    started = _clock(device)
    for _ in range(arguments.steps):
        step()
    return _metrics(started, device, arguments)


def _clock(device) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _metrics(started: float, device, arguments: argparse.Namespace) -> dict[str, float]:
    """Images/s since `started`, and the peak memory in bytes: of the device's allocator, or of the process on a CPU."""
    import torch

    seconds = _clock(device) - started
    peak = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    return {"images_per_second": arguments.steps * arguments.batch / seconds, "peak_bytes": peak}


MODELS = {"ours": ours, "baseline": baseline}


def main() -> None:
    """Measure both sides alternately and print the medians and their ratios, or profile ours."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default=str(SHIPPED), help="folder, sd3-medium, sd3.5-medium or sd3.5-large")
    parser.add_argument("--kind", choices=("full", "lora"), default="full", help="what our side trains")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, help="side of the images in pixels; native if not given")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="gradient checkpointing, on both sides")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="of our blocks; on GPUs if not given")
    parser.add_argument("--online", action="store_true", help="our side encodes prompts during training")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side")
    parser.add_argument("--processes", type=int, help="gloo processes on the CPU's cores, against one process")
    parser.add_argument("--profile", action="store_true", help="say where our side's time goes; no comparison")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=MODELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side or arguments.profile:
        metrics = MODELS[arguments.side or "ours"](arguments)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(metrics))
        return

    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(arguments.rounds):
        for name, command, environment in _sides(arguments.processes):
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
            found.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        side: {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
        for side, rounds in found.items()
    }
    a, b = medians.values()
    ratios = {name: a[name] / b[name] for name in ("images_per_second", "peak_bytes")}
    if arguments.json:
        print(json.dumps({**medians, "ratios": ratios}, indent=2))
        return
    for side, metrics in medians.items():
        print(f"{side:12} {metrics['images_per_second']:8.2f} images/s  {metrics['peak_bytes'] / 2**30:6.2f} GiB")
    print(f"{'ratio':12} {ratios['images_per_second']:8.2f}           {ratios['peak_bytes']:6.2f}")


def _sides(processes: int | None) -> list[tuple[str, list[str], dict[str, str]]]:
    """Name, command and variables of the two that are compared; memory is that of one process."""
    script = [__file__, *sys.argv[1:], "--side"]
    if processes is None:
        return [(side, [sys.executable, *script, side], {}) for side in MODELS]
    cores = len(os.sched_getaffinity(0))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    on_cpu = {"ACCELERATE_USE_CPU": "true"}
    return [
        (f"{processes} processes", [sys.executable, *launch, *script, "ours"], on_cpu | _threads(cores // processes)),
        ("1 process", [sys.executable, *script, "ours"], on_cpu | _threads(cores)),
    ]


def _threads(count: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(max(1, count))}


if __name__ == "__main__":
    main()
