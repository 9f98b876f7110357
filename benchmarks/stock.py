"""Stock diffusers as the model of the servers that `serve.py` compares ours with."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path


class Stock:
    """A student in stock diffusers."""

    def __init__(self, folder: str) -> None:
        import torch
        from diffusers import StableDiffusion3Pipeline

        self._record = json.loads((Path(folder) / "onestep.json").read_text())
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        without_t5 = {} if (Path(folder) / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
        self._pipeline = StableDiffusion3Pipeline.from_pretrained(
            folder, local_files_only=True, dtype=dtype, **without_t5
        ).to(device)
        self._pipeline.set_progress_bar_config(disable=True)

    def answer(self, bodies: Sequence[dict]) -> list[dict]:
        """Generate the images of requests, as PNG in the format of the Images API."""
        import torch

        size = self._record["image_size"]
        images = self._pipeline(
            [body["prompt"] for body in bodies],
            num_inference_steps=1,
            guidance_scale=0,
            height=size,
            width=size,
            max_sequence_length=self._record["max_sequence_length"],
            generator=[torch.Generator().manual_seed(body["seed"]) for body in bodies],
        ).images
        answers = []
        for image in images:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            answers.append({"data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode()}]})
        return answers
