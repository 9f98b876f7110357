"""The evaluator of a dataset with a scorer, such as `scenes`."""

from collections.abc import Sequence
from dataclasses import dataclass

from distill.evaluate.base import Encode, EvalPrompts, Generate, Report, evaluate
from distill.evaluate.evaluator import Evaluation, digest_of


@dataclass(frozen=True)
class DatasetEvaluator:
    """Scores one-step students. `fitness`, overall times diversity, decides: a collapsed student may score well."""

    eval_prompts: EvalPrompts
    seed: int
    metric: str = "fitness"
    higher_is_better: bool = True

    @property
    def prompts(self) -> Sequence[str]:
        return self.eval_prompts.texts

    @property
    def count(self) -> int:
        return self.eval_prompts.count

    @property
    def digest(self) -> str:
        return digest_of({"prompts": self.eval_prompts.texts, "seed": self.seed})

    def evaluate(self, generate: Generate, encode: Encode, report: Report = lambda n: None) -> Evaluation:
        result, _ = evaluate(self.eval_prompts, generate, 1, encode, self.seed, report)
        metrics = {
            "fitness": result.overall * result.diversity,
            "overall": result.overall,
            "frechet": result.frechet,
            "recall": result.recall,
            "diversity": result.diversity,
        }
        return Evaluation(metrics | result.tasks)
