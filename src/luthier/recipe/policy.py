"""Settings of the stages that learn from rewards: PPO, GRPO and their kin, one algorithm with settings.

What makes a method is its row in POLICY, which gives the defaults of the settings below the row's names; any of them
may be set otherwise. A rollout is `batch_size` times `minibatches` prompts, each answered `group_size` times.
"""

from collections.abc import Iterator
from math import inf
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Gt, Le
from pydantic import Field, model_validator

from luthier.recipe.adapters import DyLoRA, LoRA
from luthier.recipe.policy_methods import POLICY, Aggregate, Baseline, KLPlace, Ratio, Scale
from luthier.recipe.problems import Problem, Problems
from luthier.recipe.rewards import ModelReward, RewardSettings, parts_of
from luthier.recipe.rollout_servers import RolloutServer
from luthier.recipe.rounds import PromptFormat
from luthier.recipe.settings import Count, Word
from luthier.recipe.training import OnChats, usual_rate

__all__ = [
    "DAPO",
    "GRPO",
    "GSPO",
    "PPO",
    "RLOO",
    "DrGRPO",
    "OnPolicy",
    "ReinforcePP",
]

_NotNegative = Annotated[float, Ge(0)]
_Positive = Annotated[float, Gt(0)]


class _OfRow(str):
    """The name of the entry in a method's row that is a field's default."""

    def __call__(self, fields: dict[str, Any]) -> Any:
        return getattr(POLICY[fields["method"]], self)


def _of_row(name: str) -> Any:
    return Field(default_factory=_OfRow(name))


class OnPolicy(OnChats):
    """What stages that learn from rewards share."""

    method: Literal["dapo", "dr_grpo", "grpo", "gspo", "ppo", "reinforce_pp", "rloo"] = "grpo"
    """The row of POLICY that gives the defaults of what makes a method."""

    reward: RewardSettings
    """What gives an answer its number: exact, numeric, math, regex, tags, json, length, code, model, judge, a function
    (`rewards.py:score`), or a list of these with weights."""

    format: PromptFormat | None = None
    """The format of the rows, which are prompts; recognised from the columns where it is not named."""

    batch_size: Count = 8
    """Prompts, with all their answers, that the optimizer sees a step."""

    on_long: Literal["drop", "error"] = "drop"
    """What happens to a prompt that leaves no room for an answer in max_length: dropped and counted, or the run
    stopped."""

    minibatches: Count = 1
    """Steps that one rollout is cut into."""

    rollout_epochs: Count = _of_row("rollout_epochs")
    """How often a rollout is gone through."""

    group_size: Count = _of_row("group_size")
    """Answers to each prompt."""

    epochs: Count = 1
    """How often the prompts are gone through."""

    train_on: Literal["answers"] = "answers"
    """Which tokens are learned: those of the answers."""

    learning_rate: _Positive = Field(default_factory=usual_rate(adapter=2e-5, full=1e-6))
    """The highest learning rate; by default 2e-5 with LoRA, more with adapters that are smaller, 1e-6 without."""

    schedule: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    """How the learning rate goes on after warming up; wsd stays and then decays (Hu et al. 2024, MiniCPM)."""

    max_new_tokens: Count = 256
    """The longest answer, in tokens."""

    temperature: _Positive = 1.0
    """How freely answers are sampled; logits are divided by it in training too."""

    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """The share of the probability, the most likely tokens first, that answers are sampled from."""

    top_k: Annotated[int, Ge(0)] = 0
    """Only so many of the most likely tokens are sampled from; 0 for all."""

    min_p: Annotated[float, Ge(0), Le(1)] = 0.0
    """Only tokens with this share of the most likely one's probability are sampled from."""

    repetition_penalty: _Positive = 1.0
    """Makes tokens that were there already less likely when sampling."""

    stop: tuple[Word, ...] = ()
    """Texts that end an answer, and stand in it."""

    server: RolloutServer | None = None
    """A server that samples the answers; by default the model itself does."""

    rollout_weights: Literal["auto", "dense", "fp16", "int8"] = "auto"
    """How weights are stored while sampling on a CPU: fp16 halves what a token reads, int8 quarters it and is less
    exact; auto is fp16 where that can be had, else dense."""

    rollout_rows: Count = 64
    """Answers in the making at once."""

    importance_cap: _Positive | None = 2.0
    """The highest weight, p of the model over p of what sampled, that a token is given because the two are not quite
    equal (truncated importance sampling); none gives no weights."""

    baseline: Baseline = _of_row("baseline")
    """What an answer's reward is compared with."""

    scale: Scale = _of_row("scale")
    """What advantages are divided by: the rewards' standard deviation in the group or in the rollout, nothing, or that
    of the advantages of all tokens, which then have the mean 0 (whitened)."""

    ratio: Ratio = _of_row("ratio")
    """What p / p_old is taken of: a token, or a sequence's geometric mean; none is the plain policy gradient."""

    clip_low: _Positive | None = _of_row("clip_low")
    """How far below 1 the ratio is rewarded to go."""

    clip_high: _Positive | None = _of_row("clip_high")
    """How far above 1 the ratio is rewarded to go."""

    dual_clip: _Positive | None = None
    """The ratio at which a bad answer's loss ends."""

    aggregate: Aggregate = _of_row("aggregate")
    """What losses are averaged over: all tokens; answers, of each the mean of its tokens, their sum, or their sum over
    max_new_tokens (constant)."""

    beta: _NotNegative = _of_row("beta")
    """The weight of the divergence from the reference, which is the model before the stage; 0 needs no reference."""

    kl_in: KLPlace = _of_row("kl_in")
    """Where the divergence counts: in the loss, or taken off the rewards."""

    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How the divergence in the loss is estimated from the sampled tokens (Schulman 2020)."""

    target_kl: _Positive | None = None
    """Adapts beta so that an answer's divergence, in nats, comes near to this (Ziegler et al. 2019); none keeps it."""

    entropy_weight: _NotNegative = 0.0
    """How much the policy's entropy, a token, is added to what it learns to raise."""

    mask_truncated: bool = _of_row("filtered")
    """Leaves answers that were cut off at max_new_tokens out of the loss."""

    length_margin: Count | None = None
    """The last tokens before max_new_tokens, in which the reward falls by up to 1 (DAPO's soft penalty)."""

    dynamic_sampling: bool = _of_row("filtered")
    """Replaces groups whose answers all have the same reward, which teach nothing, by other prompts."""

    max_resampling: Count = 3
    """How often a rollout is filled up by dynamic sampling, at most."""

    gamma: Annotated[float, Gt(0), Le(1)] = 1.0
    """What a reward is worth a token earlier."""

    max_kl: _Positive | None = None
    """Ends the training where the policy is farther from its reference, in nats a token, and goes back to the best
    checkpoint."""

    min_entropy: _NotNegative = 0.05
    """Warns where the policy's entropy a token, in nats, falls below: it then hardly tries anything new."""

    max_length_correlation: Annotated[float, Gt(0), Le(1)] = 0.8
    """Warns where rewards go with the answers' length more closely than this, as when length is what is learned."""

    eval_prompts: Count = 64
    """Held-out prompts that are answered at an evaluation, at most."""

    @classmethod
    def __pydantic_init_subclass__(cls, **further: Any) -> None:
        row = POLICY[cls.model_fields["method"].default]
        for field in cls.model_fields.values():  # the same as plain defaults, which help and signatures show
            if isinstance(field.default_factory, _OfRow):
                field.default, field.default_factory = getattr(row, field.default_factory), None

    @model_validator(mode="after")
    def _agree_on_policy(self) -> Self:
        if found := [*_problems(self), *_length_problems(self), *_part_problems(self)]:
            raise Problems(found)
        return self


class GRPO(OnPolicy):
    """Group relative policy optimization: an answer is compared with the others to its prompt.

    Shao et al. 2024, arXiv:2402.03300.
    """

    method: Literal["grpo"] = "grpo"
    """The row of POLICY that gives the defaults of what makes a method."""

    output: Word = "runs/grpo"
    """The folder of the run: metrics, checkpoints, adapter, model and report."""


class DrGRPO(OnPolicy):
    """GRPO done right: no division by the group's deviation or by the answer's length.

    Liu et al. 2025, arXiv:2503.20783.
    """

    method: Literal["dr_grpo"] = "dr_grpo"
    """The row of POLICY that gives the defaults of what makes a method."""

    output: Word = "runs/dr_grpo"
    """The folder of the run: metrics, checkpoints, adapter, model and report."""


class DAPO(OnPolicy):
    """Decoupled clip and dynamic sampling policy optimization, for long answers.

    Yu et al. 2025, arXiv:2503.14476.
    """

    method: Literal["dapo"] = "dapo"
    """The row of POLICY that gives the defaults of what makes a method."""

    output: Word = "runs/dapo"
    """The folder of the run: metrics, checkpoints, adapter, model and report."""


class GSPO(OnPolicy):
    """Group sequence policy optimization: ratios of whole answers.

    Zheng et al. 2025, arXiv:2507.18071.
    """

    method: Literal["gspo"] = "gspo"
    """The row of POLICY that gives the defaults of what makes a method."""

    output: Word = "runs/gspo"
    """The folder of the run: metrics, checkpoints, adapter, model and report."""


class RLOO(OnPolicy):
    """REINFORCE leave-one-out: plain policy gradient, with the mean of a group's other answers as the baseline.

    Ahmadian et al. 2024, arXiv:2402.14740.
    """

    method: Literal["rloo"] = "rloo"
    """The row of POLICY that gives the defaults of what makes a method."""

    output: Word = "runs/rloo"
    """The folder of the run: metrics, checkpoints, adapter, model and report."""


class ReinforcePP(OnPolicy):
    """REINFORCE++: the divergence in each token's reward, advantages whitened over the rollout, PPO's clipping.

    Hu et al. 2025, arXiv:2501.03262.
    """

    method: Literal["reinforce_pp"] = "reinforce_pp"
    """The row of POLICY that gives the defaults of what makes a method."""

    output: Word = "runs/reinforce_pp"
    """The folder of the run: metrics, checkpoints, adapter, model and report."""


class PPO(OnPolicy):
    """Proximal policy optimization: a value head says what was to be expected of each token.

    Schulman et al. 2017, arXiv:1707.06347; Ouyang et al. 2022, arXiv:2203.02155.
    """

    method: Literal["ppo"] = "ppo"
    """The row of POLICY that gives the defaults of what makes a method."""

    output: Word = "runs/ppo"
    """The folder of the run: metrics, checkpoints, adapter, model and report."""

    lam: Annotated[float, Ge(0), Le(1)] = 0.95
    """How far generalized advantages look ahead: 0 to the next token, 1 to the answer's end."""

    value_trunk: Literal["own", "shared"] = "shared"
    """What the value head reads: the policy's own hidden states, or those of a second adapter that it trains."""

    value_weight: _Positive = 0.1
    """The weight of the value head's loss."""

    value_clip: _Positive | None = 0.2
    """How far a value may move from what it was in the rollout; none lets it."""

    whiten_rewards: bool = False
    """Divides the rewards of a rollout by their standard deviation."""


_DIVIDED = {
    "group_std": ("group_mean", "leave_one_out"),
    "batch_std": ("batch_mean", "group_mean", "leave_one_out"),
}  # scales of answers by the baselines that they divide


def _problems(settings: OnPolicy) -> Iterator[Problem]:
    if settings.ratio == "none" and (settings.clip_low or settings.clip_high or settings.dual_clip):
        yield Problem(("ratio",), "without a ratio there is nothing to clip; set clip_low and clip_high to none")
    if settings.ratio == "none" and settings.minibatches * settings.rollout_epochs > 1:
        yield Problem(("ratio",), "without a ratio a rollout serves one step; set minibatches and rollout_epochs to 1")
    if settings.baseline in ("group_mean", "leave_one_out") and settings.group_size < 2:
        yield Problem(("group_size",), f"baseline: {settings.baseline} compares answers to one prompt; give 2 or more")
    if settings.baseline not in _DIVIDED.get(settings.scale, (settings.baseline,)):
        yield Problem(("scale",), f"{settings.scale} does not divide what {settings.baseline} leaves; choose whitened")
    if settings.baseline == "value" and not isinstance(settings, PPO):
        yield Problem(("baseline",), "a value head is PPO's; choose another, or the stage ppo")
    if settings.baseline != "value" and isinstance(settings, PPO):
        yield Problem(("baseline",), "PPO's is its value head; leave it out, or choose the stage reinforce_pp or grpo")
    if settings.gamma < 1 and settings.baseline not in ("none", "value"):
        yield Problem(("gamma",), f"baseline: {settings.baseline} looks at whole answers; set gamma: 1")
    if settings.dual_clip and settings.dual_clip <= 1 + (settings.clip_high or inf):
        yield Problem(("dual_clip",), "bounds ratios above 1 + clip_high; set clip_high, and dual_clip over that")


def _length_problems(settings: OnPolicy) -> Iterator[Problem]:
    if settings.max_new_tokens >= settings.max_length:
        yield Problem(("max_new_tokens",), f"leaves no room for a prompt in max_length {settings.max_length}; raise it")
    if settings.length_margin and settings.length_margin > settings.max_new_tokens:
        yield Problem(("length_margin",), "begins before the answer; set max_new_tokens or less")


def _part_problems(settings: OnPolicy) -> Iterator[Problem]:
    """Of the reference, the engine and the value head."""
    if settings.beta and settings.adapter is None:
        yield Problem(("beta",), "the reference is the model with the adapter switched off; train one, or set beta: 0")
    if settings.target_kl is not None and not (settings.beta and settings.kl_in == "reward"):
        yield Problem(("target_kl",), "adapts a beta over 0 with kl_in: reward; set these")
    if settings.max_kl is not None and not settings.beta:
        yield Problem(("max_kl",), "the divergence is measured where it has a weight; set beta over 0")
    if settings.max_kl is not None and not settings.eval_every:
        yield Problem(("max_kl",), "goes back to the best checkpoint; give eval_data or eval_fraction to know it by")
    if settings.dynamic_sampling and settings.group_size < 2:
        yield Problem(("dynamic_sampling",), "one answer alone never differs; raise group_size")
    if settings.adapter is not None and settings.adapter.new_tokens:
        yield Problem(("adapter", "new_tokens"), "nothing has taught them yet; add them in an sft stage before this")
    beside = [one for one in parts_of(settings.reward) if isinstance(one, ModelReward) and one.model is None]
    if beside and settings.adapter is None:
        yield Problem(("reward", "model"), "is the stage's own where it is not named, whose weights change; name one")
    pushed = None if settings.server is None else settings.server.push
    if pushed == "adapter" and not isinstance(settings.adapter, LoRA | DyLoRA):
        yield Problem(("server", "push"), "takes adapters of type lora or dylora; train one, or set weights or none")
    own_trunk = isinstance(settings, PPO) and settings.value_trunk == "own"
    if own_trunk and (settings.adapter is None or settings.gradient_checkpointing):
        yield Problem(("value_trunk",), "own is a second adapter, with all activations kept; choose shared")
