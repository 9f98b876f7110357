"""A small world of coloured shapes after GenEval's six tasks, in which text-to-image quality is exact.

`shapes` draws, `captions` asks, `render` answers, `score` judges, `train` makes the teacher.
"""
