"""Distillation jobs: `distill run` in its own process, in the format of OpenAI's fine-tuning jobs."""
