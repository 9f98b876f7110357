"""CIFAR-10 in pixel space, the FGM paper's first experiment: its data, its teacher, and a preset of the same name.

Pixels are latents of an autoencoder that changes nothing, and an unconditional model is one with a single caption; so
its teacher is a folder like any other, and all that distills, exports, serves and judges takes it as it is.
"""
