"""A rollout's answers in their three forms: with their rewards, as tensors in a file, and as groups that steps see."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.data.examples import Origin
from luthier.data.sequences import TokenGroup, TokenSequence
from luthier.pipeline.prompts import Asked
from luthier.rollout.requests import Sample
from luthier.rollout.rewards import Reward
from luthier.rollout.scoring import Failure

__all__ = ["ScoredAnswer", "as_rows", "groups_of", "stored", "summed_up", "targets_of", "trained_on"]

_COLUMN = "column/"


@dataclass(frozen=True, slots=True, eq=False)
class ScoredAnswer:
    """An answer to the prompt that was asked at this place, with its reward, and what its length takes off that."""

    group: int
    asked: Asked
    sample: Sample
    reward: Reward
    length_penalty: float = 0.0

    @property
    def token_ids(self) -> Any:
        """[tokens] int32."""
        return self.sample.token_ids

    @property
    def score(self) -> float | None:
        """What is learned from; None where the answer could not be scored."""
        return None if isinstance(self.reward.total, Failure) else self.reward.total + self.length_penalty


def trained_on(answers: Sequence[ScoredAnswer], *, mask_truncated: bool) -> list[bool]:
    """Which of them teach. mask_truncated: those that were cut off do not (DAPO, overlong filtering)."""
    return [one.sample.finished or not mask_truncated for one in answers]


def stored(answers: Sequence[ScoredAnswer], trained: Sequence[bool]) -> dict[str, Tensor]:
    """As tensors: [answers] but for token_ids and prompt_ids, end to end, and prompt_lengths, [groups]. groups: counted
    from 0.
    """
    places = {place: number for number, place in enumerate(dict.fromkeys(one.group for one in answers))}
    sampled = [one.sample.logprobs for one, used in zip(answers, trained, strict=True) if used]
    return {
        "token_ids": torch.from_numpy(np.concatenate([one.token_ids for one in answers])),
        "lengths": torch.tensor([len(one.token_ids) for one in answers]),
        "groups": torch.tensor([places[one.group] for one in answers]),
        "trained": torch.tensor(list(trained)),
        "prompt_ids": torch.from_numpy(np.concatenate([one.token_ids for one in _prompts(answers)])),
        "prompt_lengths": torch.tensor([len(one.token_ids) for one in _prompts(answers)]),
        f"{_COLUMN}sampled": torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.float32), *sampled])),
    }


def _prompts(answers: Sequence[ScoredAnswer]) -> list[Asked]:
    return list({one.group: one.asked for one in answers}.values())


def targets_of(tensors: dict[str, Tensor]) -> Tensor:
    """Which answer each target is of, [targets] int64."""
    lengths = tensors["lengths"] * tensors["trained"]
    return torch.arange(len(lengths)).repeat_interleave(lengths)


def groups_of(tensors: dict[str, Tensor]) -> list[TokenGroup]:
    """As groups of sequences with their columns."""
    lengths, trained = tensors["lengths"].tolist(), tensors["trained"].tolist()
    answers = [piece.numpy() for piece in tensors["token_ids"].split(lengths)]
    asked = [piece.numpy() for piece in tensors["prompt_ids"].split(tensors["prompt_lengths"].tolist())]
    counts = [length * used for length, used in zip(lengths, trained, strict=True)]
    columns = {
        name.removeprefix(_COLUMN): [piece.numpy() for piece in tensor.split(counts)]
        for name, tensor in tensors.items()
        if name.startswith(_COLUMN)
    }
    origin = Origin("a rollout", 1)
    groups: list[TokenGroup] = []
    for group, members in groupby(enumerate(tensors["groups"].tolist()), key=lambda pair: pair[1]):
        sequences = []
        for i, _ in members:
            ids = np.concatenate([asked[group], answers[i]])
            learned = np.arange(len(ids)) >= (len(asked[group]) if trained[i] else len(ids))
            own = {name: pieces[i] for name, pieces in columns.items()}
            sequences.append(TokenSequence(ids, learned, origin, own))
        groups.append(TokenGroup(tuple(sequences)))
    return groups


def summed_up(usable: Sequence[ScoredAnswer], everything: Sequence[ScoredAnswer]) -> dict[str, float]:
    """What is told of answers, by the names that peers use; lengths are in tokens."""
    scores = [one.score for one in usable if one.score is not None]
    lengths = [float(len(one.token_ids)) for one in everything]
    groups = [[one.score for one in members] for _, members in groupby(usable, key=lambda one: one.group)]
    told = {
        "reward": statistics.fmean(scores),
        "reward_std": statistics.pstdev(scores),
        "frac_reward_zero_std": statistics.fmean(len(set(group)) == 1 for group in groups),
        "completions/mean_length": statistics.fmean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": statistics.fmean(not one.sample.finished for one in everything),
        "rewards/failed": 1 - len([one for one in everything if one.score is not None]) / len(everything),
        "rewards/length_correlation": _correlation(scores, [float(len(one.token_ids)) for one in usable]),
    }
    for name in usable[0].reward.parts:
        values = [one.reward.parts[name] for one in usable]
        numbers = [value for value in values if not isinstance(value, Failure)]
        told |= {f"rewards/{name}/mean": statistics.fmean(numbers), f"rewards/{name}/std": statistics.pstdev(numbers)}
    return told


def as_rows(everything: Sequence[ScoredAnswer], taught: Sequence[ScoredAnswer]) -> list[dict[str, Any]]:
    """For people to read: the prompt's last turn, the answer, its reward and its parts. taught: what was learned
    from.
    """
    learned = {id(one) for one in taught}
    return [
        {
            "prompt": one.asked.prompt.messages[-1].content,
            "from": str(one.asked.origin),
            "answer": one.sample.text,
            "finished": one.sample.finished,
            "tokens": len(one.token_ids),
            "reward": one.score,
            "parts": {name: _value(value) for name, value in one.reward.parts.items()},
            "learned_from": id(one) in learned,
        }
        for one in everything
    ]


def _value(value: float | Failure) -> float | str:
    return f"{value.reason}: {value.detail}" if isinstance(value, Failure) else value


def _correlation(ones: Sequence[float], others: Sequence[float]) -> float:
    """Pearson's; 0 where one of the two does not vary."""
    if len(set(ones)) < 2 or len(set(others)) < 2:
        return 0.0
    return statistics.correlation(ones, others)
