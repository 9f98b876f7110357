"""CIFAR-10 in pixel space, the first experiment of the FGM paper: data and teacher. The preset has the same name.

An identity autoencoder makes pixels the latents, and an unconditional model has a single caption. The teacher is
therefore a model folder like any other: the same code distills, exports, serves and evaluates it.
"""
