"""A toy dataset of colored shapes after GenEval's six tasks, in which text-to-image quality is exact.

`shapes` are its alphabet, `captions` its prompts; `render` draws scenes for them and `score` evaluates images. `data`
makes the training scenes, and `train` the teacher.
"""
