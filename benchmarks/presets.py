"""One step of a preset on a whole model with random weights, through `distill run`, and the memory that it takes.

    python benchmarks/presets.py [sd3-medium-lora] [--size 256] [--batch 1] [--set key=value ...] [--layers N]

The teacher has the transformer and the autoencoder of the preset's model, text encoders of one layer and their true
widths, and no T5: its tokens are zeros. The run is the preset's, apart from size, batch and the settings of `--set`. It
makes an update of each role, the average, a checkpoint, a grid and the exported student. The output compares the peak
memory of the updates with the estimate of `distill plan` for the same settings. On a CPU the peak is that of the
process, libraries included.

All files are in a temporary folder (TMPDIR), which is deleted at the end. It holds up to three times the transformer's
weights. `--layers` uses fewer blocks, to try this script.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.utils import logging
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from distill.config import load_config
from distill.models.geometry import Geometry, read_geometry
from distill.models.sd3_folder import SD3Folder
from distill.plan.devices import GIB
from distill.plan.estimate import PlanInput
from distill.run import accelerator
from distill.worlds.tokenizer import build_clip_tokenizer

SHARD = "1GB"


def main() -> None:
    """Make a teacher, distill it for one step, and print its peak memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="sd3-medium-lora")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=1, help="images of the step")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="key=value of the run")
    parser.add_argument("--layers", type=int, help="blocks of the transformer; all if not given")
    arguments = parser.parse_args()
    geometry = read_geometry(arguments.preset.removesuffix("-lora").removesuffix("-full"))
    if arguments.layers:
        geometry = replace(geometry, transformer=geometry.transformer | {"num_layers": arguments.layers})

    with tempfile.TemporaryDirectory() as scratch:
        folder, prompts, out = (Path(scratch) / name for name in ("teacher", "prompts.txt", "run"))
        prompts.write_text("image\n")
        step = {"images": arguments.batch, "batch": arguments.batch, "micro_batch": arguments.batch}
        step |= {"teacher": folder, "prompts.source": prompts, "sizes": f"[[{arguments.size},{arguments.size}]]"}
        sets = [*(f"{key}={value}" for key, value in step.items()), "trackers=[]", *arguments.overrides]
        config = load_config(arguments.preset, sets)
        dtype = torch.bfloat16 if accelerator(config, out).mixed_precision == "bf16" else torch.float32
        make_teacher(geometry, folder, dtype)
        kind, size = config.optimizer.kind, arguments.size
        plan = PlanInput(
            read_geometry(str(folder)), config.networks, dtype, config.batch, size, config.method, kind
        ).plan()

        command = [sys.executable, "-m", "distill.cli", "run", arguments.preset, "--out", str(out)]
        started = time.monotonic()
        subprocess.run([*command, *(word for each in sets for word in ("--set", each))], check=True)
        seconds = time.monotonic() - started
        metrics = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        student = SD3Folder.read(out / "student")  # whole, or an error

    updates = {moment: planned for moment, planned in plan.stages.items() if moment.endswith("update")}
    whole = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"{arguments.preset}: {student.parameters / 1e9:.2f} B parameters, {seconds:.0f} s from start to student")
    for moment, planned in updates.items():
        role = moment.removesuffix(" update")
        print(f"{moment:16} {metrics[f'seconds/{role}']:8.0f} s, planned {planned / GIB:6.2f} GiB")
    print(f"peak of the updates: {metrics['memory/peak'] / GIB:.2f} GiB, planned {max(updates.values()) / GIB:.2f}")
    print(f"peak of the process on the host, grid and export within: {whole / GIB:.2f} GiB")


def make_teacher(geometry: Geometry, folder: Path, dtype: torch.dtype) -> None:
    """Save a pipeline of the geometry with random weights, the transformer in `dtype`."""
    logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    tokenizer = build_clip_tokenizer(["image"], 77)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    clips = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(**geometry.text[name] | ids | {"num_hidden_layers": 1, "vocab_size": len(tokenizer)})
        )
        for name in ("text_encoder", "text_encoder_2")
    ]
    StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel.from_config(geometry.transformer).to(dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL.from_config(geometry.vae),
        text_encoder=clips[0],
        tokenizer=tokenizer,
        text_encoder_2=clips[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(folder, max_shard_size=SHARD)


if __name__ == "__main__":
    main()
