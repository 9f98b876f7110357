"""Evaluation of teachers and students: `base` defines evaluators, `metrics` the statistics, `side_by_side` compares."""
