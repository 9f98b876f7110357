"""The input of training steps: prompts, images, text conditions and noise."""
