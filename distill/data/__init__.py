"""What a training step is fed with: prompts, images, text conditions and noise."""
