"""STAGES: what each training stage of a recipe computes. Its settings stand in `recipe/stages.py`, row by row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from luthier.pipeline.methods import (
    Method,
    contrastive_method,
    direct_method,
    feedback_method,
    identity_method,
    language_method,
    odds_ratio_method,
    process_reward_method,
    reward_method,
    simple_method,
)

__all__ = ["STAGES", "StageKind"]


@dataclass(frozen=True, slots=True)
class StageKind:
    """method: from the stage's settings to what is computed. summary: one line for `luthier --help`."""

    method: Callable[[Any], Method]
    summary: str


STAGES: dict[str, StageKind] = {
    "pretrain": StageKind(language_method, "Go on pretraining on plain text, with general text mixed in."),
    "sft": StageKind(language_method, "Fine-tune on conversations."),
    "dpo": StageKind(direct_method, "Learn from pairs of answers, against a reference model."),
    "ipo": StageKind(identity_method, "Learn from pairs of answers, towards a bounded margin."),
    "kto": StageKind(feedback_method, "Learn from single answers that are desirable or not."),
    "orpo": StageKind(odds_ratio_method, "Imitate the better answers and avoid the worse, without a reference model."),
    "simpo": StageKind(simple_method, "Learn from pairs of answers by their mean log-probabilities."),
    "cpo": StageKind(contrastive_method, "Learn from pairs of answers and imitate the better, without a reference."),
    "reward": StageKind(reward_method, "Train a reward model on pairs of answers."),
    "process_reward": StageKind(process_reward_method, "Train a reward model on answers whose steps are labelled."),
    "iterative_dpo": StageKind(
        direct_method, "Sample answers, let a judge rank them, learn from the pairs, and again."
    ),
    "rlaif": StageKind(direct_method, "The same with a language model as the judge."),
}
