"""Settings of the stages that learn from preferences: pairs or rankings of answers, or single answers with a verdict.

One step counts `batch_size` prompts with all their answers. A stage that has a reference model takes the model as it is
when the stage begins, unless another is named; never is a second copy of the weights kept.
"""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from annotated_types import Ge, Gt, Lt
from pydantic import Field, model_validator

from luthier.recipe.problems import Problem, Problems
from luthier.recipe.settings import Count, Word
from luthier.recipe.training import OnChats, usual_rate

__all__ = [
    "CPO",
    "DPO",
    "IPO",
    "KTO",
    "ORPO",
    "Direct",
    "FeedbackFormat",
    "OnAnswers",
    "OnPairs",
    "PairLoss",
    "Policy",
    "PreferenceFormat",
    "ProcessReward",
    "Reward",
    "RewardModel",
    "SimPO",
    "WithReference",
]

PreferenceFormat = Literal["dialogues", "preference", "ranking", "sharegpt_preference"]
FeedbackFormat = Literal["feedback", "feedback_messages", "sharegpt_feedback"]
_Positive = Annotated[float, Gt(0)]
_NotNegative = Annotated[float, Ge(0)]
PairLoss = Literal[
    "apo_down",
    "apo_zero",
    "bco_pair",
    "discopop",
    "exo_pair",
    "hinge",
    "ipo",
    "nca_pair",
    "robust",
    "sigmoid",
    "sigmoid_norm",
    "sppo_hard",
]


class OnAnswers(OnChats):
    """What stages that learn from answers to a prompt share."""

    batch_size: Count = 16
    """Prompts, with all their answers, that the optimizer sees a step."""

    epochs: Count = 1
    """How often the data is gone through."""

    train_on: Literal["answers"] = "answers"
    """Which tokens are learned: those of the answers."""

    learning_rate: _Positive = Field(default_factory=usual_rate(adapter=5e-5, full=1e-6))
    """The highest learning rate; by default 5e-5 with LoRA, more with adapters that are smaller, 1e-6 without."""


class Policy(OnAnswers):
    """What stages that train what is to answer share."""

    sft_weight: _NotNegative = 0.0
    """How much the loss of imitating the best answer, a token, is added."""


class WithReference(Policy):
    """What stages with a reference model add."""

    reference: Word | None = None
    """The model that the policy is held to, by name; by default the one that the stage starts from."""

    cache_reference: bool = True
    """Computes the reference's log-probabilities once, before the first step, and keeps them in the stage's folder; off
    computes them in every step, with the adapter switched off."""

    max_kl: _Positive | None = None
    """Ends the training where an evaluation finds the policy farther from its reference, in nats a token, and goes back
    to the best checkpoint."""

    @model_validator(mode="after")
    def _agree_on_reference(self) -> Self:
        if found := list(_reference_problems(self)):
            raise Problems(found)
        return self


class OnPairs(Policy):
    """What stages that learn from pairs and rankings share."""

    format: PreferenceFormat | None = None
    """The format of the rows; recognised from the columns where it is not named."""


class Direct(WithReference):
    """What DPO's loss of a pair takes."""

    loss_type: PairLoss = "sigmoid"
    """The loss of a pair's margin; each is described in docs/alignment.md."""

    beta: _Positive = 0.1
    """How strongly the policy is held to the reference; the smaller, the farther it may go."""

    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = Field(
        default_factory=lambda fields: 1e-3 if fields.get("loss_type") == "exo_pair" else 0.0
    )
    """The share of pairs that is believed to be the wrong way round (sigmoid, sigmoid_norm, robust, exo_pair)."""

    @model_validator(mode="after")
    def _agree_on_loss(self) -> Self:
        if found := list(_loss_problems(self)):
            raise Problems(found)
        return self


class DPO(OnPairs, Direct):  # in this order: pydantic takes a field of several bases from the first
    """Direct preference optimization: pairs against a reference model."""

    output: Word = "runs/dpo"
    """The folder of the run: metrics, checkpoints, adapter, model and report."""


class IPO(OnPairs, WithReference):
    """Identity preference optimization: a bounded margin, for labels without noise."""

    output: Word = "runs/ipo"
    """The folder of the run: metrics, checkpoints, adapter, model and report."""

    beta: _Positive = 0.1
    """The regularisation tau: the margin a token that is aimed at is 1 / (2 beta)."""


class KTO(WithReference):
    """Kahneman-Tversky optimization: single answers, each desirable or not."""

    output: Word = "runs/kto"
    """The folder of the run: metrics, checkpoints, adapter, model and report."""

    format: FeedbackFormat | None = None
    """The format of the rows; recognised from the columns where it is not named."""

    loss_type: Literal["apo_zero_unpaired", "kto"] = "kto"
    """kto compares with a KL baseline, apo_zero_unpaired with nothing."""

    beta: _Positive = 0.1
    """How strongly the policy is held to the reference; the smaller, the farther it may go."""

    desirable_weight: _NotNegative = 1.0
    """The weight of desirable answers; where they are the fewer, raise it until both sides weigh alike."""

    undesirable_weight: _NotNegative = 1.0
    """The weight of undesirable answers."""


class ORPO(OnPairs):
    """Odds-ratio preference optimization: imitation and preference at once, without a reference model."""

    output: Word = "runs/orpo"
    """The folder of the run: metrics, checkpoints, adapter, model and report."""

    beta: _Positive = 0.1
    """The weight of the odds ratio beside the loss of imitation; lambda in the paper."""

    sft_weight: _NotNegative = 1.0
    """How much the loss of imitating the best answer, a token, is added."""


class SimPO(OnPairs):
    """Simple preference optimization: mean log-probabilities and a target margin, without a reference model."""

    output: Word = "runs/simpo"
    """The folder of the run: metrics, checkpoints, adapter, model and report."""

    beta: _Positive = 2.0
    """How strongly a margin of mean log-probabilities counts."""

    gamma: _NotNegative = 1.0
    """The margin that is aimed at, in units of the reward: beta times a mean log-probability."""


class CPO(OnPairs):
    """Contrastive preference optimization: DPO without a reference model, with a term of imitation."""

    output: Word = "runs/cpo"
    """The folder of the run: metrics, checkpoints, adapter, model and report."""

    beta: _Positive = 0.1
    """How strongly a margin of log-probabilities counts."""

    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    """The share of pairs that is believed to be the wrong way round."""

    sft_weight: _NotNegative = 1.0
    """How much the loss of imitating the best answer, a token, is added."""


class RewardModel(OnAnswers):
    """What stages that give a model a scalar head share."""

    learning_rate: _Positive = Field(default_factory=usual_rate(adapter=2e-4, full=1e-5))
    """The highest learning rate; by default 2e-4 with LoRA, more with adapters that are smaller, 1e-5 without."""


class Reward(RewardModel):
    """A reward model: one number for a conversation, higher for the better answer."""

    output: Word = "runs/reward"
    """The folder of the run: metrics, checkpoints, adapter, model and report."""

    format: PreferenceFormat | None = None
    """The format of the rows; recognised from the columns where it is not named."""

    margins: bool = False
    """Asks for at least the difference of two answers' scores; these must be in the reward's own units."""

    center_rewards: _NotNegative = 0.01
    """How strongly the mean of a pair's two rewards is drawn to zero."""


class ProcessReward(RewardModel):
    """A process reward model: one number for each step of an answer, positive for a right one."""

    output: Word = "runs/process_reward"
    """The folder of the run: metrics, checkpoints, adapter, model and report."""

    format: Literal["steps"] | None = None
    """The format of the rows: prompt, completions (a list of steps) and labels."""


def _reference_problems(settings: WithReference) -> Iterator[Problem]:
    if settings.adapter is not None and settings.adapter.new_tokens:
        yield Problem(
            ("adapter", "new_tokens"), "the reference model has none of them; add them in a stage before this"
        )
    if settings.max_kl is not None and (settings.adapter is None or settings.reference is not None):
        yield Problem(("max_kl",), "is measured by switching the adapter off; train one, without another reference")
    if settings.max_kl is not None and not settings.eval_every:
        yield Problem(("max_kl",), "is measured at evaluations; give eval_data or eval_fraction")
    if settings.cache_reference:
        return
    if settings.adapter is None:
        yield Problem(("cache_reference",), "without an adapter the reference is gone after the first step; drop it")
    if settings.reference is not None:
        yield Problem(("cache_reference",), "another model would stay in memory beside the policy; drop it")


def _loss_problems(settings: Direct) -> Iterator[Problem]:
    smoothed = ("exo_pair", "robust", "sigmoid", "sigmoid_norm")
    if settings.label_smoothing and settings.loss_type not in smoothed:
        yield Problem(
            ("label_smoothing",), f"{settings.loss_type} knows none; drop it or choose {' or '.join(smoothed)}"
        )
    if settings.loss_type == "exo_pair" and not settings.label_smoothing:
        yield Problem(("label_smoothing",), "exo_pair needs one above 0; leave it out for 0.001")
