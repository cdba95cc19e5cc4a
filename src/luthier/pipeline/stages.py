"""STAGES: what each training stage of a recipe computes. Its settings stand in `recipe/stages.py`, row by row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from luthier.objectives.preference import cpo, dpo, ipo, orpo, simpo
from luthier.pipeline.methods import (
    Method,
    feedback_method,
    language_method,
    on_pairs,
    policy_method,
    process_reward_method,
    reward_method,
)

__all__ = ["STAGES", "StageKind"]


@dataclass(frozen=True, slots=True)
class StageKind:
    """method: from the stage's settings to what is computed. summary: one line for `luthier --help`."""

    method: Callable[[Any], Method]
    summary: str


_dpo = on_pairs(dpo, "loss_type", "beta", "label_smoothing", "sft_weight")

STAGES: dict[str, StageKind] = {
    "pretrain": StageKind(language_method, "Go on pretraining on plain text, with general text mixed in."),
    "sft": StageKind(language_method, "Fine-tune on conversations."),
    "dpo": StageKind(_dpo, "Learn from pairs of answers, against a reference model."),
    "ipo": StageKind(on_pairs(ipo, "beta", "sft_weight"), "Learn from pairs of answers, towards a bounded margin."),
    "kto": StageKind(feedback_method, "Learn from single answers that are desirable or not."),
    "orpo": StageKind(
        on_pairs(orpo, "beta", "sft_weight"),
        "Imitate the better answers and avoid the worse, without a reference model.",
    ),
    "simpo": StageKind(
        on_pairs(simpo, "beta", "gamma", "sft_weight"), "Learn from pairs of answers by their mean log-probabilities."
    ),
    "cpo": StageKind(
        on_pairs(cpo, "beta", "label_smoothing", "sft_weight"),
        "Learn from pairs of answers and imitate the better, without a reference model.",
    ),
    "reward": StageKind(reward_method, "Train a reward model on pairs of answers."),
    "process_reward": StageKind(process_reward_method, "Train a reward model on answers whose steps are labelled."),
    "iterative_dpo": StageKind(_dpo, "Sample answers, let a judge rank them, learn from the pairs, and again."),
    "rlaif": StageKind(_dpo, "Sample answers, let a language model rank them, learn from the pairs, and again."),
    "ppo": StageKind(policy_method, "Learn from rewards, with a value head that says what was to be expected."),
    "grpo": StageKind(policy_method, "Learn from rewards, each answer compared with others to its prompt."),
    "dr_grpo": StageKind(policy_method, "GRPO without its biases of length and difficulty."),
    "dapo": StageKind(policy_method, "GRPO for long answers: decoupled clipping, dynamic sampling."),
    "gspo": StageKind(policy_method, "GRPO by the ratios of whole answers."),
    "rloo": StageKind(policy_method, "Learn from rewards by plain policy gradients, leave-one-out baselines."),
    "reinforce_pp": StageKind(policy_method, "Learn from rewards without a baseline, advantages whitened."),
}
