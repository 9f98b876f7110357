"""Evaluation of teachers and students.

`evaluator` defines what measures the students of a run, `base` the scores on a dataset, `metrics` the statistics.
`dataset_comparison` compares models by the scores of a dataset, `evaluator_comparison` by an evaluator.
"""
