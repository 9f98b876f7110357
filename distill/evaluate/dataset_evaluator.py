"""The evaluator of a dataset with a scorer, such as `scenes`."""

from collections.abc import Sequence

from distill.evaluate.base import Encode, EvalPrompts, Generate, Report, evaluate
from distill.evaluate.evaluator import Evaluation, digest_of


class DatasetEvaluator:
    """Scores one-step students. `fitness`, overall times diversity, decides: a collapsed student may score well."""

    metric = "fitness"
    higher_is_better = True

    def __init__(self, prompts: EvalPrompts, seed: int) -> None:
        self._prompts, self._seed = prompts, seed
        self.prompts: Sequence[str] = prompts.texts
        self.count = prompts.count
        self.digest = digest_of({"prompts": prompts.texts, "seed": seed})

    def evaluate(self, generate: Generate, encode: Encode, report: Report = lambda n: None) -> Evaluation:
        result, _ = evaluate(self._prompts, generate, 1, encode, self._seed, report)
        metrics = {
            "fitness": result.overall * result.diversity,
            "overall": result.overall,
            "frechet": result.frechet,
            "recall": result.recall,
            "diversity": result.diversity,
        }
        return Evaluation(metrics | result.tasks)
