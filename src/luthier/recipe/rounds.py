"""Settings of preference learning in rounds: answers sampled from the policy, a judge, training, and again."""

from typing import Annotated, Literal, Self

from annotated_types import Ge, Gt, Le
from pydantic import field_validator, model_validator

from luthier.recipe.judges import EndpointJudge, JudgeSettings, LocalJudge
from luthier.recipe.preference import Direct
from luthier.recipe.problems import Problem, Problems
from luthier.recipe.settings import Count, Word

__all__ = ["RLAIF", "IterativeDPO", "PromptFormat"]

PromptFormat = Literal["prompt", "prompt_messages", "sharegpt_prompt"]


_INSTEAD = {
    "eval_fraction": "set eval_prompts",
    "early_stopping": "set patience",
    "max_kl": "lower the learning rate or raise beta",
    "reference": "each round's is the model before it",
}


class IterativeDPO(Direct):
    """Iterative DPO: in every round the policy answers prompts, a judge ranks, and DPO learns from the ranking."""

    output: Word = "runs/iterative_dpo"
    """The folder of the run: metrics, checkpoints, adapter, model and report."""

    format: PromptFormat | None = None
    """The format of the rows, which are prompts; recognised from the columns where it is not named."""

    judge: JudgeSettings
    """Who says which answer is better: rule, reward, local or endpoint."""

    rounds: Count = 3
    """How often answers are sampled, judged and learned from, at most."""

    patience: Count = 2
    """Ends after so many rounds in a row without a higher win rate; the best round's model is kept."""

    prompts_per_round: Count = 256
    """Prompts that are answered in a round; the rows are gone through in an order that the seed gives."""

    eval_prompts: Count = 64
    """Prompts, never trained on, whose answers are compared with those of the model before the first round."""

    num_answers: Annotated[int, Ge(2)] = 2
    """Answers to each prompt, of which the best and the worst make a pair."""

    max_new_tokens: Count = 256
    """The longest answer, in tokens; a longer one is not learned from."""

    temperature: Annotated[float, Gt(0)] = 1.0
    """How freely answers are sampled."""

    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """The share of the probability, the most likely tokens first, that answers are sampled from."""

    eval_every: None = None
    """Evaluations come after each round."""

    @model_validator(mode="after")
    def _agree_on_rounds(self) -> Self:
        given = {"eval_fraction": 0.0, "early_stopping": None, "max_kl": None, "reference": None}
        found = [
            Problem((name,), f"has no effect in rounds; {_INSTEAD[name]}")
            for name, usual in given.items()
            if getattr(self, name) != usual
        ]
        if found:
            raise Problems(found)
        return self


class RLAIF(IterativeDPO):
    """Learning from a model's judgement: iterative DPO whose judge reads the answers."""

    output: Word = "runs/rlaif"
    """The folder of the run: metrics, checkpoints, adapter, model and report."""

    judge: JudgeSettings
    """Who reads two answers and says which is better: local or endpoint. Small models cannot."""

    @field_validator("judge")
    @classmethod
    def _reads(cls, judge: JudgeSettings) -> JudgeSettings:
        if not isinstance(judge, LocalJudge | EndpointJudge):
            raise ValueError(f"{judge.type} gives numbers; choose local or endpoint, or take iterative_dpo")
        return judge
