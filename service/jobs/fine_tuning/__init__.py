"""Distillation jobs: `distill run` in a process of its own, in the format of OpenAI's fine-tuning jobs."""
