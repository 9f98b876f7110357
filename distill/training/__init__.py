"""The training loop and what it needs: networks, optimizers, checkpoints and metrics."""
