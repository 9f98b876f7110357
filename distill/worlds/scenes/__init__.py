"""A toy dataset of colored shapes with GenEval's six tasks, on which text-to-image quality is measured exactly.

`shapes` defines shapes and colors, `captions` the prompts; `render` draws scenes and `score` scores images. `data`
renders the training scenes, `vae` and `teacher` train the teacher.
"""
