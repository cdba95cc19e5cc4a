"""Advantages: how much better than expected an answer or a token was, made of a whole rollout before it is cut.

Groups are the answers to one prompt. A reward of NaN says that an answer could not be scored: it stands out of all
statistics and its advantage is 0, so it teaches nothing. Tokens of all answers lie end to end, [targets], and
`sequence` says which answer each is of. Everything here is statistics of numbers, and no gradient is wanted of it.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "adapted_kl_weight",
    "carries_signal",
    "gae",
    "group_advantages",
    "returns_to_go",
    "soft_length_penalty",
    "token_rewards",
    "whitened",
]


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    baseline: Literal["group_mean", "leave_one_out", "batch_mean", "none"],
    scale: Literal["group_std", "batch_std", "none"],
) -> Tensor:
    """(r - baseline) / (std + 1e-4), one an answer, [answers]

    Shao et al. 2024, GRPO, section 4.1.2: group_mean, group_std. Liu et al. 2025, Dr. GRPO: no scale. Ahmadian et al.
    2024, RLOO: the mean over the group's other answers, leave_one_out, and no scale. rewards: [answers]. groups:
    [answers] int64, from 0. Standard deviations are of rewards and unbiased. Where all rewards that make a baseline are
    equal, a group of one among them, the advantage is exactly 0. A scale goes with a baseline of at least as many
    answers as it is of, since a small deviation would else divide a large remainder.
    """
    assert scale == "none" or baseline in _SCALES_OF[scale], f"{scale} does not divide what {baseline} leaves"
    if baseline == "none":
        return torch.where(rewards.isnan(), 0, rewards)
    everything = torch.zeros_like(groups)
    within = everything if baseline == "batch_mean" else groups
    advantages, num_known = _centred(rewards, within)
    if baseline == "leave_one_out":
        advantages = advantages * num_known / (num_known - 1)  # = r - (the others' mean)
    if scale != "none":
        advantages = advantages / (_deviation(rewards, groups if scale == "group_std" else everything) + 1e-4)
    return torch.where(carries_signal(rewards, within)[within], advantages, 0)


_SCALES_OF = {
    "group_std": ("group_mean", "leave_one_out"),
    "batch_std": ("group_mean", "leave_one_out", "batch_mean"),
}


def carries_signal(rewards: Tensor, groups: Tensor) -> Tensor:
    """Whether not all answers of a group have the same reward, [groups] bool: the others move nothing

    Yu et al. 2025, DAPO, eq. 11. rewards: [answers], NaN for none. groups: [answers] int64, from 0; a number that does
    not occur is a group without answers.
    """
    num_groups = _count(groups)
    known = ~rewards.isnan()
    groups, rewards = groups[known], rewards[known]
    highest = rewards.new_full((num_groups,), -torch.inf).scatter_reduce(0, groups, rewards, "amax")
    lowest = rewards.new_full((num_groups,), torch.inf).scatter_reduce(0, groups, rewards, "amin")
    return highest > lowest


def whitened(values: Tensor, *, keep_mean: bool = False) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8), over everything given: [any]

    PPO's and REINFORCE++'s advantages (Hu et al. 2025), over all tokens of a rollout. keep_mean: the mean stays what it
    was, for rewards. The variance is unbiased; a single value deviates by 0.
    """
    mean = values.mean()
    deviations = values - mean
    variance = deviations.square().sum() / max(values.numel() - 1, 1)
    scaled = deviations * torch.rsqrt(variance + 1e-8)
    return scaled + mean if keep_mean else scaled


def token_rewards(scores: Tensor, kl: Tensor, sequence: Tensor, *, kl_weight: float) -> Tensor:
    """-kl_weight KL at every token, and the answer's score at its last: [targets]

    Ziegler et al. 2019, eq. 2; Hu et al. 2025, REINFORCE++. scores: [sequences]; of an answer without targets it is not
    read. kl: [targets] in nats, estimates k1 of log p_old against the reference. sequence: [targets] int64, rising.
    """
    last = pad(sequence[1:] != sequence[:-1], (0, 1), value=True)[: len(sequence)]
    return torch.where(last, scores[sequence], 0) - kl_weight * kl


def returns_to_go(rewards: Tensor, sequence: Tensor, *, gamma: float) -> Tensor:
    """sum_k gamma^k r_{t+k} to the end of the answer, [targets]

    rewards: [targets]. sequence: [targets] int64, rising. Spans of 1, 2, 4... tokens are joined, so there are as many
    steps as a logarithm of the longest answer (Hillis and Steele 1986).
    """
    sums, span = rewards, 1
    while bool((same := sequence[span:] == sequence[:-span]).any()):
        sums = sums + pad(torch.where(same, gamma**span * sums[span:], 0), (0, span))
        span *= 2
    return sums


def gae(rewards: Tensor, values: Tensor, sequence: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """A_t = sum_k (gamma lam)^k d_{t+k}, d_t = r_t + gamma V_{t+1} - V_t; and the returns A_t + V_t: [targets] each

    Schulman et al. 2016, eq. 16. rewards, values: [targets]; after an answer's last token nothing is expected any more.
    sequence: [targets] int64, rising.
    """
    same = sequence[1:] == sequence[:-1]
    following = pad(torch.where(same, values[1:], 0), (0, 1))[: len(values)]
    advantages = returns_to_go(rewards + gamma * following - values, sequence, gamma=gamma * lam)
    return advantages, advantages + values


def soft_length_penalty(lengths: Tensor, *, longest: int, margin: int) -> Tensor:
    """0 up to longest - margin tokens, -1 from longest on, and a line between: [answers]

    Yu et al. 2025, DAPO, eq. 13, where they are called L_max and L_cache. lengths: [answers], in tokens.
    """
    return -((lengths - (longest - margin)) / margin).clamp(0, 1)


def adapted_kl_weight(kl_weight: float, *, kl: float, target: float, num_answers: int, horizon: int) -> float:
    """kl_weight (1 + num_answers / horizon clip(kl / target - 1, -0.2, 0.2))

    Ziegler et al. 2019, section 2.2. kl, target: of an answer, in nats. num_answers: that were made at this weight.
    horizon: how many answers it takes to change the weight by a fifth.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_weight * (1 + error * num_answers / horizon)


def _centred(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards less the mean of their group, 0 for NaN; and how many of that group are known: [answers] each."""
    known = ~rewards.isnan()
    num_known = _totals(known.to(rewards.dtype), groups)
    mean = _totals(torch.where(known, rewards, 0), groups) / num_known
    return torch.where(known, rewards - mean, 0), num_known


def _deviation(rewards: Tensor, groups: Tensor) -> Tensor:
    """The unbiased standard deviation of each one's group, [answers]."""
    centred, num_known = _centred(rewards, groups)
    return (_totals(centred.square(), groups) / (num_known - 1)).sqrt()


def _totals(values: Tensor, groups: Tensor) -> Tensor:
    """The sum over each one's group, [answers]."""
    return values.new_zeros(_count(groups)).index_add(0, groups, values)[groups]


def _count(groups: Tensor) -> int:
    return int(groups.max()) + 1 if len(groups) else 0
