"""Training steps of a transformer in each precision and attention kernel: what `precision: auto` and
`networks.attention: auto` rest on.

Combinations take turns, so that a busy moment of the machine slows all of them.
"""

import argparse
import time
from statistics import median

import torch

from distill.models import attention
from distill.models.device import fast_bfloat16, resolve_device
from distill.models.sd3 import load_transformer, velocity
from distill.models.sd3_folder import SD3Folder
from distill.models.teacher import TEACHERS
from distill.models.text import TextCondition


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--teacher", default=str(TEACHERS["scenes"]), help="teacher folder; the shipped one if not given"
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    spec, count = SD3Folder.read(arguments.teacher), arguments.batch
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(count, *shape, generator=generator).to(device)

    x_t, t = normal(*spec.latent_shape), torch.rand(count, generator=generator).to(device)
    cond = TextCondition(normal(*spec.text_shape), normal(spec.pooled_dim))
    models = {}
    for name in ("sdpa", "math"):
        models[name] = load_transformer(SD3Folder.read(arguments.teacher), torch.float32, device).requires_grad_(True)
        attention.use(name, models[name])

    def step(precision: str, kernel: str) -> float:
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = velocity(models[kernel], x_t, t, cond).square().mean()
        loss.backward()
        for parameter in models[kernel].parameters():
            parameter.grad = None
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    choices = [(precision, kernel) for precision in ("fp32", "bf16") for kernel in models]
    for choice in choices:
        step(*choice)
    seconds: dict[tuple[str, str], list[float]] = {choice: [] for choice in choices}
    for _ in range(arguments.rounds):
        for choice in choices:
            seconds[choice].append(step(*choice))
    base = median(seconds["fp32", "sdpa"])
    for choice, taken in seconds.items():
        print(f"{' '.join(choice):10} {count / median(taken):8.1f} images/s {base / median(taken):6.2f} of fp32 sdpa")
    precision = torch.bfloat16 if fast_bfloat16(device) else torch.float32
    print(f"auto: {precision}, {attention.resolve('auto', precision, device)}")


if __name__ == "__main__":
    main()
