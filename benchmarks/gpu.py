"""Run everything that needs a GPU in ten minutes: the tests marked gpu, training steps, serving, the toy dataset.

    python benchmarks/gpu.py [--minutes 8] [--only tests,train,serve,scenes] [--json FILE]

The script runs from a bare checkout, without network and without model weights: models of the true geometry get random
weights on the device, which take as long as trained ones. Each part runs in its own process with its own share of the
time, so a part that fails or hangs does not affect the others, and its earlier figures are kept. At the end a table
shows the figures beside their targets. The exit status is 1 if a target is missed or a part fails.

`--device cpu --tiny` tries the script itself on any machine: tiny models, no targets.
"""

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout that is not installed
for _name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
    os.environ.setdefault(_name, "error")

if TYPE_CHECKING:
    import torch

    from distill.config import RunConfig
    from distill.models.geometry import Geometry
    from distill.plan.estimate import Plan

SHARES = {"tests": 0.25, "train": 0.4, "serve": 0.2, "scenes": 0.15}  # of the time
PRESET = "sd3-medium-lora"
BATCH = 4  # images of a training step
CLIENTS = 32
WEIGHTS = ROOT / "distill" / "worlds" / "scenes" / "weights"
GIB = 2**30


@dataclass(frozen=True)
class Figure:
    """A measured value, and its target if it has one: at least `least`, at most `most`."""

    part: str
    name: str
    value: float
    unit: str = ""
    least: float | None = None
    most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.least is None and self.most is None:
            return None
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)

    @property
    def target(self) -> str:
        """The target in words."""
        bounds = [f"{sign} {bound:g}" for sign, bound in ((">=", self.least), ("<=", self.most)) if bound is not None]
        return ", ".join(bounds)


@dataclass(frozen=True)
class Setting:
    """The device, whether models are tiny, and when a part should have ended (of `time.monotonic`)."""

    device: str
    tiny: bool
    end: float

    def left(self) -> float:
        """Seconds until the part should have ended."""
        return self.end - time.monotonic()


def tests(setting: Setting) -> Iterator[Figure]:
    """Run the tests that need a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}"]
        command += [str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
        done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, env=environment())
        if not report.exists():
            raise RuntimeError(f"pytest ended with status {done.returncode}")
        (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    count = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    yield Figure("tests", "passed", count["tests"] - failed - count["skipped"])
    yield Figure("tests", "skipped", count["skipped"])
    yield Figure("tests", "failed", failed, most=0)


def train(setting: Setting) -> Iterator[Figure]:
    """Measure a LoRA step of SD3-medium: images/s, share of the matrix rate, and memory relative to the plan."""
    import torch

    from distill.plan.devices import DEVICES, UTILIZATION

    device = torch.device(setting.device)
    rate = matrix_rate(device, 128 if setting.tiny else 8192)
    yield Figure("train", "matrix product, bf16", rate / 1e12, "TFLOP/s")
    if device.type == "cuda":
        yield from attention_rates(device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    of_plan = any(name in card for name in ("H100", "H200"))  # whose peak the plan takes
    cases = [(size, compiled) for compiled in (False, True) for size in ((16,) if setting.tiny else (1024, 512))]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a plan needs a core for half a minute
        plans: dict[int, Callable[[], Plan]] = {
            size: partial(plan_of, size, True) if setting.tiny else pool.submit(plan_of, size, False).result
            for size, compiled in cases
            if not compiled
        }
        speeds: dict[tuple[int, bool], float] = {}
        for size, compiled in cases:
            if setting.tiny and compiled:
                continue  # takes a minute on a CPU
            if setting.left() < 0:
                return
            speed, peak = train_steps(setting, size, compiled)
            speeds[size, compiled] = speed
            name = f"{size} px, {'compiled' if compiled else 'eager'}"
            yield Figure("train", name, speed, "images/s")
            plan = plans[size]()
            goal = 0.55 if size == 1024 and compiled else None
            share = speed * plan.flop_per_image / rate
            yield Figure("train", f"{name}: share of the matrix rate", share, "", None if setting.tiny else goal)
            if size == 1024 and of_plan:
                reached = UTILIZATION["compiled" if compiled else "eager"] * DEVICES["h200"].bf16 * 1e12
                yield Figure("train", f"{name}: speed over plan", speed * plan.flop_per_image / reached, "", 0.8, 1.2)
            if device.type == "cuda":
                yield Figure("train", f"{name}: peak memory", peak / GIB, "GiB")
                least = None if compiled else 0.9  # fused operations keep less
                yield Figure("train", f"{name}: peak memory over plan", peak / planned(plan), "", least, 1.1)
        if device.type == "cuda" and not setting.tiny:
            speed, _ = train_steps(setting, 1024, True, online=True)
            added = speeds[1024, True] / speed - 1
            yield Figure("train", "1024 px, compiled: time added by online encoding", added, most=0.03)


def serve(setting: Setting) -> Iterator[Figure]:
    """Measure the stages of an image, then the server under load."""
    yield from stages(setting)
    yield from load(setting)


def stages(setting: Setting) -> Iterator[Figure]:
    """Measure network and decoder as a server computes them, with both decoders, and stock diffusers for comparison."""
    import torch

    device = torch.device(setting.device)
    rate = matrix_rate(device, 128 if setting.tiny else 8192)
    sizes = (16,) if setting.tiny else (1024, 512)
    for i, size in enumerate(sizes):
        seconds = max(1.0, setting.left() / (4 * (len(sizes) - i)))  # for the choice of each of two decoders
        targets = size == 1024
        stock = stock_seconds(setting, device, size)
        for batch, took in stock.items():
            yield Figure("serve", f"{size} px, batch {batch}: stock diffusers", 1000 * took, "ms/image")
        for decoder, times, share in (("full", 2.0, 0.5), ("small", 4.0, None)):
            name = f"{size} px, {decoder} decoder"
            found = served_seconds(setting, device, size, decoder == "small", seconds)
            yield Figure("serve", f"{name}: network", 1000 * found.network, "ms/image")
            yield Figure("serve", f"{name}: decoder", 1000 * found.decoder, "ms/image")
            made = found.network + found.decoder
            print(f"{name}: {found.choice}", file=sys.stderr)
            ratio = min(stock.values()) / made
            yield Figure("serve", f"{name}: times as fast as stock", ratio, "", times if targets else None)
            reached = found.flop / made / rate
            yield Figure("serve", f"{name}: share of the matrix rate", reached, "", share if targets else None)
            most = 45.0 if targets and decoder == "small" else None
            yield Figure("serve", f"{name}: one request", 1000 * found.alone, "ms", most=most)


def load(setting: Setting) -> Iterator[Figure]:
    """Measure requests/s of the server, of its engine alone and of a naive server, with the shipped student."""
    seconds = "0.5" if setting.tiny else "8"
    clients = "2" if setting.tiny else str(CLIENTS)
    command = [sys.executable, "benchmarks/serve.py", "--clients", clients, "--seconds", seconds, "--json"]
    done = subprocess.run(
        [*command, "--beside", "naive"], cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True, env=environment()
    )
    rates = {
        name: loads[0]["requests_per_second"] for name, loads in json.loads(done.stdout).items() if name != "clients"
    }
    for name, found in rates.items():
        yield Figure("serve", f"{clients} clients: {name}", found, "requests/s")
    goals = (None, None) if setting.tiny else (0.95, 5.0)
    for other, goal in zip(("engine", "naive"), goals, strict=True):
        yield Figure("serve", f"{clients} clients: server over {other}", rates["service"] / rates[other], "", goal)


def scenes(setting: Setting) -> Iterator[Figure]:
    """Measure images/s of `distill teacher` and `distill run scenes`, over some seconds of training each."""
    window = 0.2 if setting.tiny else max(5.0, setting.left() / 4)
    with tempfile.TemporaryDirectory() as folder:
        speed = teacher_speed(setting, Path(folder), window)
        yield Figure("scenes", "teacher", speed, "images/s", None if setting.tiny else 20_000)
        speed = student_speed(setting, Path(folder), window)
        yield Figure("scenes", "student", speed, "images/s", None if setting.tiny else 5_000)


PARTS: dict[str, Callable[[Setting], Iterator[Figure]]] = {
    "tests": tests,
    "train": train,
    "serve": serve,
    "scenes": scenes,
}


def synchronized(device: "torch.device") -> float:
    """Return the time after the device has finished its work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(call: Callable[[], Any], device: "torch.device", repeats: int = 5) -> float:
    """Return the median seconds of a call, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        began = synchronized(device)
        call()
        times.append(synchronized(device) - began)
    return statistics.median(times)


def matrix_rate(device: "torch.device", side: int) -> float:
    """FLOP/s of the product of two square bf16 matrices."""
    import torch

    a = torch.randn(side, side, device=device).to(torch.bfloat16)
    return 2 * side**3 / seconds_of(lambda: a @ a, device)


def attention_rates(device: "torch.device") -> Iterator[Figure]:
    """FLOP/s of the kernels that `networks.attention` can choose, forward and backward, at SD3-medium's 1024 px."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    rows, heads, tokens, width = 2 * BATCH, 24, 4096 + 77 + 256, 64
    q, k, v = (torch.randn(rows, heads, tokens, width, device=device, dtype=torch.bfloat16) for _ in range(3))
    q.requires_grad_(True), k.requires_grad_(True), v.requires_grad_(True)
    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    for name, allowed in {"sdpa": list(kernels.values()), **kernels}.items():

        def both(allowed: Any = allowed) -> None:
            with sdpa_kernel(allowed):
                scaled_dot_product_attention(q, k, v).sum().backward()

        flop = (4 + 10) * rows * heads * tokens**2 * width
        yield Figure("train", f"attention, {name}", flop / seconds_of(both, device) / 1e12, "TFLOP/s")


def run_config(size: int, compiled: bool, setting: Setting) -> "RunConfig":
    """Return the preset with a batch of one micro-batch and one size, without samples, checkpoints and evaluations."""
    from distill.config import load_config

    never = 10**12
    values: dict[str, Any] = {"batch": BATCH, "micro_batch": BATCH, "sizes": f"[[{size},{size}]]", "images": never}
    values |= {f"cadence.{name}": never for name in ("log", "sample", "checkpoint", "evaluate")}
    values |= {"networks.compile": str(compiled).lower(), "trackers": "[]"}
    if setting.tiny:
        values |= {"precision": "fp32", "networks.rank": 4}
    return load_config(PRESET, [f"{key}={value}" for key, value in values.items()])


def geometry_of(tiny: bool) -> "Geometry":
    """SD3-medium's, or that of a transformer of one narrow block."""
    from distill.models.geometry import read_geometry

    geometry = read_geometry("sd3-medium")
    if not tiny:
        return geometry
    small = {"num_layers": 1, "num_attention_heads": 1, "caption_projection_dim": 64, "pos_embed_max_size": 8}
    vae = {"block_out_channels": (32,) * 4, "layers_per_block": 1}
    return replace(geometry, transformer=geometry.transformer | small, vae=geometry.vae | vae, text={}).with_text(4, 4)


def plan_of(size: int, tiny: bool) -> "Plan":
    """What `distill plan` computes for the step that is measured."""
    import torch

    from distill.plan.estimate import PlanInput

    setting = Setting("cpu", tiny, 0)
    config = run_config(size, False, setting)
    dtype = torch.float32 if tiny else torch.bfloat16
    return PlanInput(geometry_of(tiny), config.networks, dtype, BATCH, size, config.method).plan()


def planned(plan: "Plan") -> int:
    """Bytes at the peak of the update phases, without the autoencoder, which is not loaded here."""
    steps = [size for stage, size in plan.stages.items() if stage.endswith("update") or stage == "optimizer step"]
    return max(steps) - plan.resident["autoencoder for grids"]


def train_steps(setting: Setting, size: int, compiled: bool, online: bool = False) -> tuple[float, int]:
    """Images/s of the trainer's own rounds, and the peak memory of the device in bytes.

    With `online`, text encoders with random weights encode the prompts of each step.
    """
    import torch

    from benchmarks.train import online_conditions, random_conditions
    from distill.plan.estimate import build
    from distill.run import accelerator
    from distill.training.trainer import train

    config, geometry = run_config(size, compiled, setting), geometry_of(setting.tiny)
    if setting.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    side = size // geometry.pixels_per_latent
    latents = (geometry.transformer["in_channels"], side, side)
    gc.collect()  # the networks of the case before, which refer to themselves
    before = torch.cuda.memory_allocated() if setting.device != "cpu" else 0
    with tempfile.TemporaryDirectory() as folder:
        machine = accelerator(config, Path(folder))
        dtype = torch.bfloat16 if machine.mixed_precision == "bf16" else torch.float32
        networks = build(geometry, config.networks, dtype, device=str(machine.device))
        conditions = random_conditions(geometry)
        if online:
            conditions = online_conditions(geometry, machine.device, dtype, Path(folder))
        with closing(train(config, Path(folder), networks, conditions, [latents], machine)) as rounds:
            for _ in islice(rounds, 2):  # optimizer states, compilation
                pass
            if machine.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            began = synchronized(machine.device)
            count, passed = 0, 0.0
            while count < 2 or passed < (0 if setting.tiny else 8):
                next(rounds)
                count += 1
                passed = synchronized(machine.device) - began
            peak = torch.cuda.max_memory_allocated() - before if machine.device.type == "cuda" else 0
    return count * BATCH / passed, peak


@dataclass(frozen=True)
class Served:
    """Seconds of each image in full batches, of an image alone, and the operations of an image."""

    network: float
    decoder: float
    alone: float
    flop: float
    choice: str


def random_networks(setting: Setting, device: "torch.device") -> tuple[Any, Any]:
    """A transformer and an autoencoder of SD3-medium's geometry with random weights."""
    import torch
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    geometry = geometry_of(setting.tiny)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        transformer = SD3Transformer2DModel.from_config(geometry.transformer).to(dtype).eval().requires_grad_(False)
        vae = AutoencoderKL.from_config(geometry.vae).to(dtype).eval().requires_grad_(False)
    return transformer, vae


def conditions_of(setting: Setting, transformer: Any, batch: int) -> Any:
    """Return random conditions of `count` prompts."""
    import torch

    from distill.models.text import TextCondition

    shape, like = transformer.config, {"dtype": transformer.dtype, "device": transformer.device}
    embeds = torch.randn(batch, geometry_of(setting.tiny).tokens, shape.joint_attention_dim, **like)
    return TextCondition(embeds, torch.randn(batch, shape.pooled_projection_dim, **like))


def stock_seconds(setting: Setting, device: "torch.device", size: int) -> dict[int, float]:
    """Seconds of the stock pipeline for each image, by batch."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    transformer, vae = random_networks(setting, device)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock = StableDiffusion3Pipeline(transformer, scheduler, vae, None, None, None, None, None, None)
    stock.set_progress_bar_config(disable=True)
    found = {}
    for batch in (1, 4):
        cond = conditions_of(setting, transformer, batch)

        def call(cond: Any = cond, batch: int = batch) -> None:
            generators = [torch.Generator(device).manual_seed(seed) for seed in range(batch)]
            stock(
                prompt_embeds=cond.embeds, pooled_prompt_embeds=cond.pooled, num_inference_steps=1, guidance_scale=0,
                height=size, width=size, generator=generators, output_type="np",
            )  # fmt: skip

        found[batch] = seconds_of(call, device) / batch
    return found


def served_seconds(setting: Setting, device: "torch.device", size: int, small: bool, seconds: float) -> Served:
    """Tune a pipeline for about this many seconds, and measure it."""
    from torch.utils.flop_counter import FlopCounterMode

    from distill.models.small_decoder import make_small_decoder
    from distill.pipeline import OneStepPipeline, OneStepSpec, RuntimeOptions
    from distill.student.runtime import unmeasured
    from distill.student.tuner import Tuner

    geometry = geometry_of(setting.tiny)
    transformer, vae = random_networks(setting, device)
    factor = geometry.pixels_per_latent
    if small:
        width = max(16, min(vae.config.block_out_channels) // 2)  # as `distill decoder` makes it
        blocks = [*[3] * (factor.bit_length() - 1), 1]
        vae = make_small_decoder(transformer.config.in_channels, factor, width, blocks).to(device, vae.dtype).eval()
        vae.requires_grad_(False)
    spec = OneStepSpec(
        name="random", digest="", sizes=((size, size),), latent_channels=transformer.config.in_channels,
        vae_scale_factor=factor, patch_size=transformer.config.patch_size, token_limit=77,
        max_sequence_length=256, teacher="", method="", images_seen=0, created=0, decoder="small" if small else "full",
    )  # fmt: skip
    options = RuntimeOptions()
    text: Any = None  # conditions are given
    digest = "random" if small else None
    ours: Any = OneStepPipeline(spec, text, transformer, vae, unmeasured(options, device, spec), digest)
    ours.encode = lambda prompts: conditions_of(setting, transformer, len(prompts))
    cond, noise = conditions_of(setting, transformer, 1), ours.noise([0])
    choice = unmeasured(RuntimeOptions(batch_buckets=(1,)), device, spec)
    single = OneStepPipeline(spec, text, transformer, vae, choice)
    with FlopCounterMode(display=False) as counter:
        single.decode(single.latents(cond, noise))
    flop = counter.get_total_flops()
    choice, _ = Tuner(Path(), device, options, 16, seconds).tune(ours)
    each = choice.sizes[0]
    alone = seconds_of(lambda: ours.decode(ours.latents(cond, ours.noise([0]))), device)
    many = max(each.network[0], each.decoder[0])
    cond, noise = conditions_of(setting, transformer, many), ours.noise(range(many))
    network = seconds_of(lambda: ours.latents(cond, noise), device) / many
    latents = ours.latents(cond, noise)
    decoder = seconds_of(lambda: ours.decode(latents), device) / many
    return Served(network, decoder, alone, flop, choice.description)


def rate_over(rounds: Iterator[Any], seconds: float, warm_up: int) -> float:
    """Return images/s of a training over this many seconds, after some rounds to warm up."""
    for progress in islice(rounds, warm_up):
        first = progress.images
    began, images = time.perf_counter(), first
    while time.perf_counter() - began < seconds:
        images = next(rounds).images
    return (images - first) / (time.perf_counter() - began)


def teacher_speed(setting: Setting, folder: Path, seconds: float) -> float:
    """Images/s of `distill teacher` on images of 64 pixels, from the shipped teacher's autoencoder."""
    import torch

    from distill.worlds.scenes.latents import encode_scenes
    from distill.worlds.scenes.recipe import ScenesRecipe
    from distill.worlds.scenes.teacher import train_teacher

    never, batch = 10**12, 8 if setting.tiny else 1024
    recipe = ScenesRecipe(
        start=str(WEIGHTS / "teacher"), vae_images=None, coarse_images=0, images=never,
        scenes=64 if setting.tiny else 4096, batch=batch,
        learning_rate=1e-3, warmup=never, decay=never, ema_half_life=never, per_task=1, evaluate_every=never,
        checkpoint_every=never, seed=1,
    )  # fmt: skip
    device, out = torch.device(setting.device), folder / "teacher"
    for _ in encode_scenes(recipe, out, device):
        pass
    rounds: Any = train_teacher(recipe, out, device, compiled=not setting.tiny)
    with closing(rounds):
        return rate_over(rounds, seconds, 1 if setting.tiny else 8)


def student_speed(setting: Setting, folder: Path, seconds: float) -> float:
    """Images/s of `distill run scenes`, with its own batch and networks."""
    from distill.config import load_config
    from distill.run import accelerator, run
    from distill.training.trainer import Progress

    if setting.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    never = 10**12
    values: dict[str, Any] = {f"cadence.{name}": never for name in ("log", "sample", "checkpoint", "evaluate")}
    values |= {"images": never, "trackers": "[]", "prompts.max_count": 32 if setting.tiny else 4096}
    values |= {"early_stopping_patience": "null"} | ({"batch": 4} if setting.tiny else {})
    config = load_config("scenes", [f"{key}={value}" for key, value in values.items()])
    with closing(run(config, folder / "run", accelerator(config, folder / "run"))) as rounds:
        trained = (each for each in rounds if isinstance(each, Progress))
        return rate_over(trained, seconds, 1 if setting.tiny else 8)


def environment() -> dict[str, str]:
    """Return the environment of a process that imports this checkout and uses no network."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def run_part(command: list[str], seconds: float) -> tuple[list[Figure], str]:
    """Run a part in its own process; return the figures that it printed, and its error if it failed."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, env=environment(), start_new_session=True)
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            kill_group(process)
        output.seek(0)
        figures = [Figure(**json.loads(line)) for line in output if line.startswith('{"part"')]
    if status is None:
        return figures, f"stopped after {seconds:.0f} s, its share of the time"
    return figures, f"ended with status {status}" if status else ""


def kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Kill a part and the processes that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def show(figures: list[Figure], faults: dict[str, str]) -> None:
    """Print a table of figures and targets, and the errors."""
    words = {True: "met", False: "MISSED", None: ""}
    print("\n| part | figure | value | target | |\n|---|---|---:|---|---|")
    for each in figures:
        print(f"| {each.part} | {each.name} | {each.value:.4g} {each.unit} | {each.target} | {words[each.met]} |")
    for part, fault in faults.items():
        print(f"{part}: {fault}")


def main() -> None:
    """Run the parts one after the other and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="time for all parts; a part's rest goes to the next")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a trial")
    parser.add_argument("--tiny", action="store_true", help="tiny models and no targets: a trial of the script")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        setting = Setting(arguments.device, arguments.tiny, time.monotonic() + 60 * arguments.minutes)
        for figure in PARTS[arguments.part](setting):
            print(json.dumps(asdict(figure)), flush=True)
        return
    chosen = list(dict.fromkeys(part.strip() for part in arguments.only.split(",")))
    if unknown := sorted(set(chosen) - PARTS.keys()):
        parser.error(f"--only: there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if arguments.minutes <= 0:
        parser.error("--minutes must be above 0")
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json: there is no folder {arguments.json.parent}")

    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("not measured: no GPU; --device cpu --tiny tries the script itself")
        raise SystemExit(1)
    print(f"{card}, torch {torch.__version__}", file=sys.stderr)
    figures: list[Figure] = []
    faults: dict[str, str] = {}
    try:
        for part, found, fault in run_parts(chosen, arguments):
            figures += found
            if fault:
                faults[part] = fault
            for each in found:
                print(f"{each.part}: {each.name} {each.value:.4g} {each.unit}", file=sys.stderr)
    except KeyboardInterrupt:
        faults["all"] = "interrupted; the figures are those of the parts before"
    show(figures, faults)
    if arguments.device == "cpu":
        print("not measured: no GPU; these figures only show that the script works")
    if arguments.json:
        lines = [asdict(each) | {"met": each.met} for each in figures]
        values = {"card": card, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
        arguments.json.write_text(json.dumps(values | {"figures": lines, "faults": faults}, indent=2) + "\n")
    if faults or any(each.met is False for each in figures):
        raise SystemExit(1)


def run_parts(chosen: list[str], arguments: argparse.Namespace) -> Iterator[tuple[str, list[Figure], str]]:
    """Run parts one after the other; yield their names, figures and faults."""
    end = time.monotonic() + 60 * arguments.minutes
    for i, part in enumerate(chosen):
        share = SHARES[part] / sum(SHARES[each] for each in chosen[i:])
        seconds = share * (end - time.monotonic())
        command = [sys.executable, str(Path(__file__).resolve()), "--part", part, "--minutes", str(seconds / 60)]
        command += ["--device", arguments.device, *(["--tiny"] if arguments.tiny else [])]
        yield part, *run_part(command, seconds)


if __name__ == "__main__":
    main()
