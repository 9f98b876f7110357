"""Tiny SD3 folders with random weights, made offline. Every component is of the real class."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from distill import run
from distill.config import load_config
from distill.models.sd3 import load_transformer
from distill.models.sd3_folder import SD3Folder
from distill.student.export import export_student
from distill.worlds.tokenizer import build_clip_tokenizer

WORDS = ("a", "red", "blue", "circle", "square", "and", "left", "of")
CLIP_LENGTH = 8
SD3_KINDS = {  # what their transformers differ in, as arguments of `make_transformer`
    "sd3-medium": {"qk_norm": None},
    "sd3.5-medium": {"dual_attention_layers": (0,)},
    "sd3.5-large": {"num_layers": 3},
}
PROMPTS = ["a red circle", "a blue square left of a red circle", "", "ünknown words"]


def make_transformer(**more: Any) -> SD3Transformer2DModel:
    """A transformer of random weights, for text (L, 48) and pooled text (40,)."""
    geometry = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 48,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 16 + 24,
        "pos_embed_max_size": 12,
        "qk_norm": "rms_norm",
    }
    return SD3Transformer2DModel(**geometry | more)


def make_teacher(
    folder: Path,
    t5: bool = False,
    max_sequence_length: int | None = 0,
    shift: float = 3.0,
    sample_size: int = 8,
    seed: int = 0,
) -> Path:
    """Save a pipeline of about 100 k parameters for 16x16 images; `max_sequence_length` None pins no length."""
    torch.manual_seed(seed)
    tokenizer = build_clip_tokenizer(WORDS, CLIP_LENGTH)
    clips = [_clip(tokenizer, width) for width in (16, 24)]
    transformer = make_transformer(sample_size=sample_size)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        text_encoder=clips[0],
        tokenizer=tokenizer,
        text_encoder_2=clips[1],
        tokenizer_2=tokenizer,
        text_encoder_3=_t5() if t5 else None,
        tokenizer_3=_t5_tokenizer() if t5 else None,
    )
    pipeline.save_pretrained(folder)
    if max_sequence_length is not None:
        (folder / "onestep.json").write_text(json.dumps({"max_sequence_length": max_sequence_length}))
    return folder


def make_clip(folder: Path) -> Path:
    """Save a CLIP of 8x8 patches on 16x16 pixels, with random weights."""
    tokenizer = build_clip_tokenizer(WORDS, CLIP_LENGTH)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**size, **ids, "max_position_embeddings": CLIP_LENGTH}
    torch.manual_seed(0)
    vision = {**size, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    sides = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessorPil(**sides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def stock_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    """Load a folder in stock diffusers, which needs explicit arguments if T5 is absent."""
    absent = {} if (folder / "text_encoder_3").exists() else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _clip(tokenizer, width: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def _t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=64, d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config)


def _t5_tokenizer() -> T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -1.0) for word in WORDS] + [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5TokenizerFast(vocab=pieces, extra_ids=0)


def undistilled(teacher: Path, folder: Path, name: str = "tiny", images_seen: int = 0) -> Path:
    """Export a student with the weights of its teacher."""
    read = SD3Folder.read(teacher)
    weights = dict(load_transformer(read).named_parameters())
    return export_student(read, weights, folder, {"name": name, "method": "fgm", "images_seen": images_seen})


def distilled(teacher: Path, folder: Path, *overrides: str, preset: str = "scenes-debug") -> Path:
    """Run a complete distillation of a teacher over 16 images in this process."""
    folder.mkdir(exist_ok=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[:2]))
    settings = (f"teacher={teacher}", f"prompts.source={prompts}", "images=16", "batch=8", "optimizer.warmup_images=0")
    settings = (*settings, "evaluation.evaluator=none")
    config = load_config(preset, [*settings, *overrides])
    out = folder / "run"
    list(run.run(config, out, run.accelerator(config, out)))
    return out
